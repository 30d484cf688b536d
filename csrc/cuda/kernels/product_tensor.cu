// The screen's product of up to 64 rows on tensor cores: every weight is read once, and the rows
// once for each block of features. Weights and rows pass through shared memory, some stages ahead
// of what is multiplied.
#include <type_traits>

#include "cuda/kernels/element.cuh"
#include "cuda/kernels/kernels.h"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/tensor_core.cuh"

namespace sparse_transcoder::cuda {
namespace {

constexpr int block_features = tensor_features;
constexpr int stage_bytes = 128;  // of each feature and row that are in shared memory at a time
constexpr int step_bytes = 32;    // that one instruction multiplies
constexpr int piece = 16;         // bytes that one thread copies at a time
constexpr int pieces = stage_bytes / piece;
constexpr int side = 16;  // features of one instruction, and rows of two

// A row in int8 is two planes, whose sums are apart: those of the high bytes, then the low ones.
template <typename Sum>
constexpr bool is_int8 = std::is_same<Sum, int>::value;
template <typename Sum>
constexpr int planes = is_int8<Sum> ? 2 : 1;

// A stage in shared memory: a line for each feature, and for each row of each plane.
template <typename Sum, int max_rows>
constexpr int stage_size = (block_features + planes<Sum> * max_rows) * stage_bytes;

// Where a line's piece is in its stage. Eight lines at the same piece lie in different banks.
__device__ int place(int line, int piece_of_line) {
  constexpr int lines_of_banks = 128 / stage_bytes;
  return line * stage_bytes + (piece_of_line ^ (line / lines_of_banks) % pieces) * piece;
}

// A block for block_features features. Shared memory holds so many stages: one is multiplied, the
// others come. width: the bytes of a feature and of a row's plane, a multiple of 16. Rows from
// row_count on and features from `count` on are taken as zeros and not written.
template <typename Sum, int max_rows, int stages, int blocks_at_once>
__global__ void __launch_bounds__(threads, blocks_at_once)
    product_tensor_kernel(const char* __restrict__ rows, int row_count, const char* __restrict__ w,
                          const float* __restrict__ scale, int64_t count, int width,
                          float* __restrict__ scores) {
  constexpr int row_warps = max_rows > side ? 2 : 1;
  constexpr int warp_rows = max_rows / row_warps;
  constexpr int warp_features = block_features * row_warps / warps;
  const int64_t row_bytes = is_int8<Sum> ? int8_row_bytes : width;
  const int64_t block_first = int64_t{blockIdx.x} * block_features;
  const int left = int(min(count - block_first, int64_t{block_features}));
  w += block_first * width;
  scores += block_first;
  unsigned char* memory = block_memory();

  // A thread copies the same piece of some lines, stage by stage.
  const int first_line = threadIdx.x / pieces, piece_of_line = threadIdx.x % pieces;
  const char* copied_w = w + first_line * int64_t{width} + piece_of_line * piece;
  const char* copied_rows = rows + piece_of_line * piece;
  int bytes_left = width - piece_of_line * piece;
  const auto begin_copies = [&](unsigned char* to) {
    constexpr int lines = threads / pieces;  // between two of a thread
    const char* from = copied_w;
#pragma unroll
    for (int i = 0; i < block_features; i += lines, from += lines * width)
      copy_async(to + place(first_line + i, piece_of_line), from,
                 bytes_left > 0 && first_line + i < left);
#pragma unroll
    for (int i = 0; i < planes<Sum> * max_rows; i += lines) {
      const int line = first_line + i, row = line % max_rows, plane = line / max_rows;
      if (planes<Sum> * max_rows % lines != 0 && plane >= planes<Sum>) break;
      copy_async(to + place(block_features + line, piece_of_line),
                 copied_rows + row * row_bytes + plane * int8_plane_bytes,
                 bytes_left > 0 && row < row_count);
    }
    copied_w += stage_bytes;
    copied_rows += stage_bytes;
    bytes_left -= stage_bytes;
  };

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_feature = warp / row_warps * warp_features;
  const int first_row = warp % row_warps * warp_rows;
  // Three blocks with as many sums leave a thread no registers for more.
  constexpr int steps_at_once = stages == 2 ? 1 : 4;
  Sum sums[planes<Sum>][warp_features / side][warp_rows / 8][4] = {};
  const auto multiply_stage = [&](const unsigned char* from) {
#pragma unroll(steps_at_once)
    for (int step = 0; step < stage_bytes / step_bytes; ++step) {
      unsigned a[warp_features / side][4];
#pragma unroll
      for (int f = 0; f < warp_features / side; ++f)
        load_matrices(a[f],
                      from + place(first_feature + f * side + lane % 16, step * 2 + lane / 16));
#pragma unroll
      for (int plane = 0; plane < planes<Sum>; ++plane)
#pragma unroll
        for (int r = 0; r < warp_rows / side; ++r) {
          unsigned b[4];  // of eight rows, then of the next eight
          const int line = block_features + plane * max_rows + first_row + r * side;
          load_matrices(b, from + place(line + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
          for (int f = 0; f < warp_features / side; ++f) {
            multiply_add(sums[plane][f][2 * r], a[f], b[0], b[1]);
            multiply_add(sums[plane][f][2 * r + 1], a[f], b[2], b[3]);
          }
        }
    }
  };

  const int stage_count = (width + stage_bytes - 1) / stage_bytes;
  constexpr int size = stage_size<Sum, max_rows>;
#pragma unroll
  for (int stage = 0; stage < stages - 1; ++stage) {
    if (stage < stage_count) begin_copies(memory + stage * size);
    commit_copies();
  }
  int slot = 0;
#pragma unroll 1
  for (int stage = 0; stage < stage_count; ++stage) {
    wait_copies<stages - 2>();
    __syncthreads();  // all copies of this stage are there, and nobody reads the one before it
    const int before = slot > 0 ? slot - size : (stages - 1) * size;
    if (stage + stages - 1 < stage_count) begin_copies(memory + before);
    commit_copies();
    multiply_stage(memory + slot);
    slot = slot < (stages - 1) * size ? slot + size : 0;
  }

#pragma unroll
  for (int r = 0; r < warp_rows / 4; ++r) {
    const int row = first_row + r / 2 * 8 + lane % 4 * 2 + r % 2;
    if (row >= row_count) continue;
#pragma unroll
    for (int f = 0; f < warp_features / 8; ++f) {
      const int feature = first_feature + f * 8 + lane / 4, of_four = f % 2 * 2 + r % 2;
      if (feature >= left) continue;
      const Sum sum = sums[0][f / 2][r / 2][of_four];
      if constexpr (is_int8<Sum>) {
        const unsigned both = (unsigned(sum) << 8) + unsigned(sums[1][f / 2][r / 2][of_four]);
        const float row_scale =
            *reinterpret_cast<const float*>(rows + row * row_bytes + 2 * int8_plane_bytes);
        // As in product_int8.
        scores[row * count + feature] = float(int(both)) * row_scale * scale[block_first + feature];
      } else {
        scores[row * count + feature] = sum;
      }
    }
  }
}

// Whether the multiprocessor with the most of the grid's blocks has fewer of them where it works on
// three at once than where it works on two, or two have no room. Two need `memory` bytes of it.
int third_block_pays(int64_t blocks, int memory, bool* pays) {
  constexpr int of_system = 1024;  // bytes of shared memory that the system takes per block
  int sms = 0, all_memory = 0, status = multiprocessors(&sms);
  if (status == cudaSuccess) status = shared_memory(&all_memory);
  if (status != cudaSuccess) return status;
  const auto most = [&](int64_t at_once) {
    return (blocks + at_once * sms - 1) / (at_once * sms) * at_once;
  };
  *pays = most(3) < most(2) || memory + 2 * of_system > all_memory;
  return status;
}

// With as many stages and blocks at once as an H100 was fastest with.
template <typename Sum, int max_rows>
int multiply_rows(const void* rows, int64_t row_count, const void* w, const float* scale,
                  int64_t count, int64_t width, float* scores, Queue& queue) {
  constexpr int lines = planes<Sum> * max_rows, bytes = stage_size<Sum, max_rows>;
  const int64_t blocks = (count + block_features - 1) / block_features;
  auto kernel = product_tensor_kernel<Sum, max_rows, 3, (lines < 64 ? 3 : 2)>;
  int stages = 3;
  if constexpr (lines == 64) {
    bool three = false;
    const int status = third_block_pays(blocks, 2 * stages * bytes, &three);
    if (status != cudaSuccess) return status;
    if (three) {
      kernel = product_tensor_kernel<Sum, max_rows, 2, 3>;
      stages = 2;
    }
  }
  return launch(kernel, Grid(unsigned(blocks), unsigned(stages * bytes)), queue,
                static_cast<const char*>(rows), int(row_count), static_cast<const char*>(w), scale,
                count, int(width), scores);
}

template <typename Sum>
int multiply(const void* rows, int64_t row_count, const void* w, const float* scale, int64_t count,
             int64_t width, float* scores, Queue& queue) {
  const auto multiply_some = row_count <= 16   ? multiply_rows<Sum, 16>
                             : row_count <= 32 ? multiply_rows<Sum, 32>
                                               : multiply_rows<Sum, 64>;
  return multiply_some(rows, row_count, w, scale, count, width, scores, queue);
}
static_assert(max_tensor_rows == 64);

}  // namespace

int product_tensor_int8(const int8_t* rows, int64_t row_count, const int8_t* w, const float* scale,
                        int64_t first, int64_t count, int64_t inputs, float* scores, Queue& queue) {
  return multiply<int>(rows, row_count, w + first * inputs, scale + first, count, inputs, scores,
                       queue);
}

int product_tensor_bf16(const void* x, int64_t rows, const void* w, int64_t first, int64_t count,
                        int64_t size, float* scores, Queue& queue) {
  const auto* weights = static_cast<const __nv_bfloat16*>(w) + first * size;
  return multiply<float>(x, rows, weights, nullptr, count, size * int64_t{sizeof(*weights)}, scores,
                         queue);
}

}  // namespace sparse_transcoder::cuda
