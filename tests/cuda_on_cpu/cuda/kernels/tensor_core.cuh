// In place of csrc/cuda/kernels/tensor_core.cuh. The layouts are those of the tables of the PTX
// ISA, written down from there and not from the kernels. A copy arrives as late as it may, and a
// sum of floats is as far off as the margin of a product allows, or nearly.
#pragma once

#include <type_traits>

#include "cuda/kernels/element.cuh"
#include "cuda_runtime.h"

namespace sparse_transcoder::cuda {
namespace {

inline unsigned char* block_memory() { return block().memory.data()->bytes; }

// "cp.async": 16 bytes, aligned to 16.
inline void copy_async(void* shared, const void* global, bool real) {
  const auto offset = static_cast<unsigned char*>(shared) - block_memory();
  require(offset >= 0 && offset % 16 == 0 && offset + 16 <= std::ssize(block().memory) * 128,
          "a copy to elsewhere than the block's memory");
  require(!real || reinterpret_cast<uintptr_t>(global) % 16 == 0, "a copy that is not aligned");
  std::memset(shared, Block::undefined, 16);
  block().copies[threadIdx.x].back().push_back({shared, real ? global : nullptr});
}
inline void commit_copies() { block().copies[threadIdx.x].emplace_back(); }
template <int pending>
void wait_copies() {
  auto& groups = block().copies[threadIdx.x];
  while (groups.size() > pending + 1) {  // and the open one
    for (const Block::Copy& copy : groups.front()) {
      if (copy.from)
        std::memcpy(copy.to, copy.from, 16);
      else
        std::memset(copy.to, 0, 16);
    }
    groups.erase(groups.begin());
  }
}

// Calls work(parts) once for the warp, where parts[lane] is what that lane gave.
template <typename Part, typename Work>
void together(Part& part, const Work& work) {
  Part* own = &part;
  double* lanes = block().lanes.data() + threadIdx.x / 32 * 32;
  std::memcpy(lanes + threadIdx.x % 32, &own, sizeof(own));
  block().sync_warp([&] {
    Part* parts[32];
    std::memcpy(parts, lanes, sizeof(parts));
    work(parts);
  });
}

// "ldmatrix", .m8n8 .x4: threads 0-7, 8-15, 16-23 and 24-31 hold the addresses of rows 0-7 of
// matrices 0, 1, 2 and 3. A row has 8 numbers of 16 bits; thread T gets those in columns 2 (T % 4)
// and 2 (T % 4) + 1 of row T / 4.
inline void load_matrices(unsigned (&to)[4], const void* line) {
  struct Part {
    const unsigned char* row;
    unsigned fragment[4];
  } part = {static_cast<const unsigned char*>(line), {}};
  const auto offset = part.row - block_memory();
  require(offset >= 0 && offset % 16 == 0 && offset + 16 <= std::ssize(block().memory) * 128,
          "a matrix outside of the block's memory");
  together(part, [](Part** parts) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      unsigned banks = 0;
      for (int row = 0; row < 8; ++row)
        banks |= 1u << reinterpret_cast<uintptr_t>(parts[8 * matrix + row]->row) / 16 % 8;
      require(banks == 0xff, "rows of a matrix that share a bank");
      for (int thread = 0; thread < 32; ++thread)
        for (int column = 0; column < 2; ++column)
          std::memcpy(
              reinterpret_cast<unsigned char*>(&parts[thread]->fragment[matrix]) + 2 * column,
              parts[8 * matrix + thread / 4]->row + 2 * (2 * (thread % 4) + column), 2);
    }
  });
  std::copy_n(part.fragment, 4, to);
}

inline double number(int8_t value) { return value; }
inline double number(__nv_bfloat16 value) { return __bfloat162float(value); }

// "Matrix Fragments for mma.m16n8k32" of .s8, and "for mma.m16n8k16" of .bf16 "with floating point
// type". Both have the same table of C and D.
template <typename Sum>
void multiply_fragments(Sum (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  constexpr bool integers = std::is_same_v<Sum, int>;
  using Number = std::conditional_t<integers, int8_t, __nv_bfloat16>;
  constexpr int depth = integers ? 32 : 16;
  struct Part {
    Number a[depth / 2], b[depth / 4];
    Sum c[4];
  } part;
  const unsigned b[] = {b0, b1};
  std::memcpy(part.a, a, sizeof(a));
  std::memcpy(part.b, b, sizeof(b));
  std::copy_n(sums, 4, part.c);
  together(part, [](Part** parts) {
    double A[16][depth], B[depth][8];
    for (int thread = 0; thread < 32; ++thread) {
      const int group = thread >> 2, in_group = thread % 4;
      for (int i = 0; i < depth / 2; ++i) {
        const double value = number(parts[thread]->a[i]);
        if constexpr (integers) {
          const int row = (i < 4 || (i >= 8 && i < 12)) ? group : group + 8;
          const int column = i < 8 ? in_group * 4 + (i & 3) : in_group * 4 + (i & 3) + 16;
          A[row][column] = value;
        } else {
          const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
          const int column = i < 4 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8;
          A[row][column] = value;
        }
      }
      for (int i = 0; i < depth / 4; ++i) {
        const double value = number(parts[thread]->b[i]);
        if constexpr (integers)
          B[i < 4 ? in_group * 4 + (i & 3) : in_group * 4 + (i & 3) + 16][group] = value;
        else
          B[i < 2 ? in_group * 2 + (i & 1) : in_group * 2 + (i & 1) + 8][group] = value;
      }
    }
    for (int thread = 0; thread < 32; ++thread)
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? thread >> 2 : (thread >> 2) + 8;
        const int column = thread % 4 * 2 + (i & 1);
        double sum = 0, terms = 0;
        for (int k = 0; k < depth; ++k) {
          sum += A[row][k] * B[k][column];
          terms += std::abs(A[row][k] * B[k][column]);
        }
        Sum& c = parts[thread]->c[i];
        if constexpr (integers) {
          c = static_cast<int>(static_cast<unsigned>(c) + static_cast<unsigned>(int(sum)));
        } else {
          const double off = 0.9 * 1.25 * 16 * 0x1p-22 * (std::abs(double(c)) + terms);
          c = static_cast<float>(c + sum + (row % 2 ? off : -off));
        }
      }
  });
  std::copy_n(part.c, 4, sums);
}

inline void multiply_add(int (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  multiply_fragments(sums, a, b0, b1);
}
inline void multiply_add(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  float added[4] = {};
  multiply_fragments(added, a, b0, b1);
  for (int i = 0; i < 4; ++i) sums[i] += added[i];
}

}  // namespace
}  // namespace sparse_transcoder::cuda
