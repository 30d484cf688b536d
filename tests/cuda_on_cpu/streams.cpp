#include "streams.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <deque>
#include <map>
#include <memory>
#include <random>

#include "cuda/kernels/kernels.h"
#include "cuda_runtime.h"

namespace {

// Whether a stream has come to where an event was recorded.
using Reached = std::shared_ptr<bool>;

// Recording it again changes nothing for those that wait already.
struct Event {
  Reached last;
};

struct Step {
  std::function<void()> work;
  Reached record, wait;
};

// The ready stream of the highest rank goes on. A rank is drawn by lot and again now and then, so
// that one stream gets far ahead of another.
struct Stream {
  std::deque<Step> steps;
  uint64_t rank = 0;
};

struct Machine {
  std::map<int64_t, Stream> streams;
  std::mt19937_64 random;
  int64_t current = 0, pool = 100;
  bool at_once = false;

  void push(Stream& stream, Step step) {
    stream.steps.push_back(std::move(step));
    if (at_once) run();
  }
  void record(Stream& stream, Event& event) {
    event.last = std::make_shared<bool>(false);
    push(stream, {{}, event.last, {}});
  }
  void wait(Stream& stream, const Event& event) {
    if (event.last) push(stream, {{}, {}, event.last});
  }

  void run() {
    for (;;) {
      Stream* next = nullptr;
      bool left = false;
      for (auto& [id, stream] : streams) {
        left |= !stream.steps.empty();
        if (stream.steps.empty()) continue;
        const Reached& wait = stream.steps.front().wait;
        if (wait && !*wait) continue;
        if (stream.rank == 0 || random() % 16 == 0) stream.rank = random();
        if (!next || stream.rank > next->rank) next = &stream;
      }
      if (!next) {
        TORCH_CHECK(!left, "streams wait for each other");
        return;
      }
      const Step step = std::move(next->steps.front());
      next->steps.pop_front();
      if (step.work) step.work();
      if (step.record) *step.record = true;
    }
  }
};

std::unique_ptr<Machine> machine;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  const at::Device device = at::kCPU;

  static Stream& queued(const c10::Stream& stream) { return machine->streams[stream.id()]; }
  c10::Stream as_stream(int64_t id) const { return c10::Stream(c10::Stream::UNSAFE, device, id); }

  c10::DeviceType type() const override { return at::kCPU; }
  c10::Device exchangeDevice(c10::Device) const override { return device; }
  c10::Device getDevice() const override { return device; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return as_stream(machine->current); }
  c10::Stream getDefaultStream(c10::Device) const override { return as_stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override {
    return as_stream(machine->pool++);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return as_stream(std::exchange(machine->current, stream.id()));
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return &queued(stream); }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex,
              c10::EventFlag) const override {
    if (!*event) *event = new Event;
    machine->record(queued(stream), *static_cast<Event*>(*event));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event) machine->wait(queued(stream), *static_cast<Event*>(event));
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
  bool queryEvent(void*) const override { return false; }
  void synchronizeStream(const c10::Stream&) const override { machine->run(); }
};

const c10::impl::DeviceGuardImplInterface* before = nullptr;

}  // namespace

bool tensor_cores = true;
int64_t failing_graphs = 0, launched_graphs = 0;
std::vector<int64_t> int8_chunks;

Streams::Streams(std::optional<uint64_t> seed) {
  machine = std::make_unique<Machine>();
  machine->at_once = !seed;
  machine->random.seed(seed.value_or(0));
  static const Guard guard;
  before = c10::impl::device_guard_impl_registry[static_cast<size_t>(at::kCPU)].exchange(&guard);
}

Streams::~Streams() {
  c10::impl::device_guard_impl_registry[static_cast<size_t>(at::kCPU)].store(before);
  machine.reset();
}

c10::Stream Streams::stream(int64_t id) const {
  return c10::Stream(c10::Stream::UNSAFE, at::kCPU, id);
}
void Streams::set_current(const c10::Stream& stream) const { machine->current = stream.id(); }
void Streams::run_all() const { machine->run(); }

void* current_stream() { return machine ? &machine->streams[machine->current] : nullptr; }

void enqueue(void* stream, std::function<void()> work) {
  if (stream)
    machine->push(*static_cast<Stream*>(stream), {std::move(work), {}, {}});
  else
    work();
}

namespace {

// A graph: steps, and for each the one that must run before it, or -1.
struct Graph {
  std::vector<std::pair<std::function<void()>, int64_t>> steps;
};

}  // namespace

void enqueue(sparse_transcoder::cuda::Queue& queue, std::function<void()> work) {
  if (!queue.graph) return enqueue(queue.stream, std::move(work));
  auto& steps = static_cast<Graph*>(queue.graph)->steps;
  steps.emplace_back(std::move(work), reinterpret_cast<int64_t>(queue.last) - 1);
  queue.last = reinterpret_cast<void*>(steps.size());
}

namespace sparse_transcoder::cuda {

int set_layer_pointers(const LayerPointers* values, int64_t count, LayerPointers* layers,
                       Queue& queue) {
  enqueue(queue, [batch = std::vector<LayerPointers>(values, values + count), layers] {
    std::copy(batch.begin(), batch.end(), layers);
  });
  return 0;
}

bool built() { return true; }

int multiprocessors(int* count) {
  *count = 3;
  return 0;
}

int shared_memory(int* bytes) {
  *bytes = 228 << 10;
  return 0;
}

int has_tensor_cores(bool* has) {
  *has = tensor_cores;
  return 0;
}

const char* error_name(int) { return "cudaErrorOfTheTests"; }
const char* error_text(int) { return "a graph that fails"; }

int make_graph(void** graph) {
  *graph = new Graph;
  return 0;
}

int finish_graph(void* graph, void** executable) {
  const bool fails = failing_graphs-- > 0;
  *executable = fails ? nullptr : graph;
  if (fails) delete static_cast<Graph*>(graph);
  return fails ? 999 : 0;
}

// Each step runs on a stream of its own, so that only what the graph says orders them.
int launch_graph(void* executable, void* stream) {
  Stream& launcher = *static_cast<Stream*>(stream);
  Event fork;
  machine->record(launcher, fork);
  std::vector<Event> done;
  for (const auto& [work, before] : static_cast<Graph*>(executable)->steps) {
    Stream& own = machine->streams[machine->pool++];
    machine->wait(own, before < 0 ? fork : done[before]);
    machine->push(own, {work, {}, {}});
    machine->record(own, done.emplace_back());
  }
  for (const Event& event : done) machine->wait(launcher, event);
  ++launched_graphs;
  return 0;
}

void destroy_graph(void* executable) { delete static_cast<Graph*>(executable); }
bool is_capturing(void*) { return false; }

}  // namespace sparse_transcoder::cuda
