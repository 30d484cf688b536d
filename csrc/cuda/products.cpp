#include "cuda/products.h"

#include <ATen/ATen.h>

#include "cuda/kernels/kernels.h"
#include "cuda/streams.h"

namespace sparse_transcoder {

void multiply(at::Tensor out, const at::Tensor& left, const at::Tensor& right) {
  if (left.scalar_type() == at::kFloat)
    at::mm_out(out, left, right.t());
  else
    at::mm_out(out, left, right.t(), at::kFloat);
}

void copy_to(at::Tensor to, const at::Tensor& from) { to.copy_(from, /*non_blocking=*/true); }

at::Tensor pinned(const at::Tensor& from) {
  void* memory = nullptr;
  check_cuda(cuda::allocate_pinned(&memory, from.nbytes()));
  const at::Tensor copy = at::from_blob(memory, from.sizes(), cuda::free_pinned, from.options());
  copy.copy_(from);
  return copy;
}

}  // namespace sparse_transcoder
