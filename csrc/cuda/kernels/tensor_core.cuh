// Tensor cores, and copies to shared memory that a thread does not wait for: PTX instructions as
// functions. The tests' CPU simulation has a file of this name in its place.
#pragma once

#include <cuda_runtime.h>

namespace sparse_transcoder::cuda {
namespace {

// The shared memory that the block's launch asked for.
__device__ inline unsigned char* block_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
// Devices that has_tensor_cores denies: nothing of this runs there.
__device__ inline void copy_async(void*, const void*, bool) {}
__device__ inline void commit_copies() {}
template <int>
__device__ void wait_copies() {}
__device__ inline void load_matrices(unsigned (&)[4], const void*) {}
__device__ inline void multiply_add(int (&)[4], const unsigned (&)[4], unsigned, unsigned) {}
__device__ inline void multiply_add(float (&)[4], const unsigned (&)[4], unsigned, unsigned) {}
#else

__device__ inline unsigned shared_address(const void* shared) {
  return unsigned(__cvta_generic_to_shared(shared));
}

// Begins to copy 16 bytes of global memory to shared memory, or zeros where `real` is false. What
// is there is undefined until wait_copies.
__device__ inline void copy_async(void* shared, const void* global, bool real) {
  asm volatile(
      "cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
      "l"(global), "r"(real ? 16 : 0)
      : "memory");
}
// Ends a group of the thread's copies.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for the thread's own copies, without those of its last `pending` groups.
template <int pending>
__device__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four matrices of 8 lines with 16 bytes each. Lane i gives the address of line i % 8 of matrix
// i / 8 and gets bytes 4 (i % 4) to 4 (i % 4) + 3 of line i / 4 of each.
__device__ inline void load_matrices(unsigned (&to)[4], const void* line) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(line))
               : "memory");
}

// sums [16, 8] += a [16, 32 bytes] b [8, 32 bytes]^T, of int8 numbers in int32 or of bfloat16
// numbers in float32. An instruction adds up the latter from zero, and a float32 addition, which
// rounds to nearest, adds the result: the instruction would cut bits off the sum. Of lane i, a[0]
// has line i / 4, a[1] line i / 4 + 8, both of bytes 4 (i % 4) to 4 (i % 4) + 3; a[2] and a[3] have
// the same lines 16 bytes on. b0 and b1 are like a[0] and a[2]. sums[0] and sums[1] are of line i /
// 4 and columns 2 (i % 4) and 2 (i % 4) + 1; sums[2] and sums[3] are of line i / 4 + 8.
__device__ inline void multiply_add(int (&sums)[4], const unsigned (&a)[4], unsigned b0,
                                    unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void multiply_add(float (&sums)[4], const unsigned (&a)[4], unsigned b0,
                                    unsigned b1) {
  float added[4];
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %10, %10, %10};"
      : "=f"(added[0]), "=f"(added[1]), "=f"(added[2]), "=f"(added[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] += added[i];
}
#endif

}  // namespace
}  // namespace sparse_transcoder::cuda
