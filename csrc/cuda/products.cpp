#include "cuda/products.h"

#include <ATen/ATen.h>

namespace sparse_transcoder {

void multiply(at::Tensor out, const at::Tensor& left, const at::Tensor& right) {
  if (left.scalar_type() == at::kFloat)
    at::mm_out(out, left, right.t());
  else
    at::mm_out(out, left, right.t(), at::kFloat);
}

void copy_to(at::Tensor to, const at::Tensor& from) { to.copy_(from, /*non_blocking=*/true); }

at::Tensor pinned(const at::Tensor& from) { return from.pin_memory(); }

}  // namespace sparse_transcoder
