// What a caller may choose.
#pragma once

#include <cstdint>

namespace sparse_transcoder {

// Which approximate arithmetic finds the candidates. It never changes a result. Rows of copies
// are padded to multiples of 64 inputs, of int8 on CUDA to 128.
enum class Screening {
  // The fastest. CPU: int8 and, for float32 weights, int16 copies: 1 + 2 bytes per weight. CUDA:
  // bfloat16, a copy of 2 bytes per weight where the weights are not stored so; and for up to 64
  // rows of large layers int8, 1 byte per weight, unless device_weight_bytes bounds the memory.
  // int8 is left for a while where a layer's last calls showed that it does not pay.
  automatic,
  // A float32 product of the stored weights: no copy of them is made.
  off,
  // CPU: an int16 copy alone, 2 bytes per weight. CUDA: as automatic, without int8.
  int16,
  // CPU: an int8 copy alone, 1 byte per weight. CUDA: as automatic, and int8 for up to 64 rows of
  // every layer whose weights stay on the device.
  int8,
};

struct Options {
  static constexpr int64_t layer_k = 0;  // as top_k: each layer's own k, from its checkpoint
  int64_t top_k = 20;                    // features returned per row
  // tau: a feature is kept when its activation is positive and at least this.
  float activation_threshold = 1.0f;
  int64_t chunk_size = 512;  // rows worked on at a time: bounds the workspace, not the result
  // CPU: workers of one call, on threads of the engine's own; 0 takes torch's thread count, and on
  // a process's main thread torch's threads. CUDA: streams; 0 takes up to 4.
  int64_t lanes = 0;
  Screening screening = Screening::automatic;
  // CUDA: calls whose shapes were seen before are replayed as a graph where a layer has up to 64
  // rows.
  bool use_graphs = true;
  // -1: every layer is encoded where its weights are. Otherwise layers whose weights are on the CPU
  // are encoded on the current CUDA device. Those whose encoders fit in this many bytes, in the
  // order of the layers, are copied there. The others stay in pinned host memory and stream through
  // two device buffers.
  int64_t device_weight_bytes = -1;
};

}  // namespace sparse_transcoder
