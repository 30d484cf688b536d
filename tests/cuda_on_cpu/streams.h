// Streams and events as a device has them: work waits in queues until somebody asks for it, and
// then runs in an order that is drawn by lot among all that events allow. A dependency that was
// forgotten shows as a wrong result.
#pragma once

#include <c10/core/Stream.h>

#include <cstdint>
#include <optional>
#include <vector>

// While it lives, CPU tensors are on a device with streams. The seed decides the order of work;
// with none it runs at once, for a host that waits for it.
class Streams {
 public:
  explicit Streams(std::optional<uint64_t> seed);
  ~Streams();

  c10::Stream stream(int64_t id) const;  // one of the caller's own
  void set_current(const c10::Stream& stream) const;
  void run_all() const;
};

// The native handle of torch's current stream; null where there are no Streams.
void* current_stream();

// Whether the device has tensor cores.
extern bool tensor_cores;

// How many of the next graphs cannot be made, and how many launches there were.
extern int64_t failing_graphs, launched_graphs;

// The int8 inputs of every chunk of rows that was screened in int8, in the order of their work.
extern std::vector<int64_t> int8_chunks;
