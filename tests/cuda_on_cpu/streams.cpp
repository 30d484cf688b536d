#include "streams.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <deque>
#include <map>
#include <memory>
#include <random>

#include "cuda/kernels/kernels.h"
#include "cuda_runtime.h"

namespace {

struct Event {
  int64_t recorded = 0, done = 0;  // versions
};

struct Step {
  std::function<void()> work;
  std::shared_ptr<Event> record, wait;
  int64_t version = 0;
};

struct Queue {
  std::deque<Step> steps;
  std::vector<Step>* recorder = nullptr;  // while captured
};

struct Machine {
  std::map<int64_t, Queue> queues;
  std::mt19937_64 random;
  int64_t current = 0, pool = 100;
  bool at_once = false;

  void push(Queue& queue, Step step) {
    (queue.recorder ? queue.recorder->emplace_back() : queue.steps.emplace_back()) =
        std::move(step);
    if (at_once) run();
  }
  void record(Queue& queue, const std::shared_ptr<Event>& event) {
    push(queue, {{}, event, {}, ++event->recorded});
  }
  void wait(Queue& queue, const std::shared_ptr<Event>& event) {
    if (event->recorded > 0) push(queue, {{}, {}, event, event->recorded});
  }

  void run() {
    for (;;) {
      std::vector<Queue*> ready;
      bool left = false;
      for (auto& [id, queue] : queues) {
        left |= !queue.steps.empty();
        if (!queue.steps.empty() && !(queue.steps.front().wait &&
                                      queue.steps.front().wait->done < queue.steps.front().version))
          ready.push_back(&queue);
      }
      if (ready.empty()) {
        TORCH_CHECK(!left, "streams wait for each other");
        return;
      }
      Queue& queue = *ready[random() % ready.size()];
      const Step step = std::move(queue.steps.front());
      queue.steps.pop_front();
      if (step.work) step.work();
      if (step.record) step.record->done = std::max(step.record->done, step.version);
    }
  }
};

std::unique_ptr<Machine> machine;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  const at::Device device = at::kCPU;

  static Queue& queue(const c10::Stream& stream) { return machine->queues[stream.id()]; }
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
  void* getStreamNativeHandle(const c10::Stream stream) const override { return &queue(stream); }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex,
              c10::EventFlag) const override {
    if (!*event) *event = new std::shared_ptr<Event>(std::make_shared<Event>());
    machine->record(queue(stream), *static_cast<std::shared_ptr<Event>*>(*event));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event) machine->wait(queue(stream), *static_cast<std::shared_ptr<Event>*>(event));
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<std::shared_ptr<Event>*>(event);
  }
  bool queryEvent(void*) const override { return false; }
  void synchronizeStream(const c10::Stream&) const override { machine->run(); }
};

const c10::impl::DeviceGuardImplInterface* before = nullptr;

}  // namespace

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

void* current_stream() { return machine ? &machine->queues[machine->current] : nullptr; }

void enqueue(void* stream, std::function<void()> work) {
  if (stream)
    machine->push(*static_cast<Queue*>(stream), {std::move(work), {}, {}, 0});
  else
    work();
}

namespace sparse_transcoder::cuda {
namespace {

// What was captured: a stream's steps each. They were forked and are joined by whoever launches
// them.
struct Graph {
  std::vector<std::vector<Step>> streams;
};

Graph* capturing = nullptr;
constexpr int64_t first_captured = 1 << 20;

}  // namespace

int set_io(const Io* values, int64_t count, Io* io, void* stream) {
  enqueue(stream, [batch = std::vector<Io>(values, values + count), io] {
    std::copy(batch.begin(), batch.end(), io);
  });
  return 0;
}

int multiprocessors(int* count) {
  *count = 3;
  return 0;
}

int begin_capture(void** streams, int64_t count) {
  capturing = new Graph{std::vector<std::vector<Step>>(count)};
  for (int64_t i = 0; i < count; ++i) {
    Queue& queue = machine->queues[first_captured + i];
    queue.recorder = &capturing->streams[i];
    streams[i] = &queue;
  }
  return 0;
}

int end_capture(void** streams, int64_t count, void** graph) {
  for (int64_t i = 0; i < count; ++i) static_cast<Queue*>(streams[i])->recorder = nullptr;
  *graph = std::exchange(capturing, nullptr);
  return 0;
}

int launch_graph(void* graph, void* stream) {
  Queue& launcher = *static_cast<Queue*>(stream);
  const auto fork = std::make_shared<Event>();
  machine->record(launcher, fork);
  for (const std::vector<Step>& steps : static_cast<Graph*>(graph)->streams) {
    Queue& queue = machine->queues[machine->pool++];
    machine->wait(queue, fork);
    for (const Step& step : steps) machine->push(queue, step);
    const auto join = std::make_shared<Event>();
    machine->record(queue, join);
    machine->wait(launcher, join);
  }
  return 0;
}

void destroy_graph(void* graph) { delete static_cast<Graph*>(graph); }
bool is_capturing(void*) { return false; }

}  // namespace sparse_transcoder::cuda
