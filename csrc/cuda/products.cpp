// What the CUDA path leaves to torch's kernels, on the current stream.
#include <ATen/ATen.h>

#include "cuda/streams.h"

namespace sparse_transcoder {

void multiply(at::Tensor out, const at::Tensor& left, const at::Tensor& right) {
  if (left.scalar_type() == at::kFloat)
    at::mm_out(out, left, right.t());
  else
    at::mm_out(out, left, right.t(), at::kFloat);
}

void copy_to(at::Tensor to, const at::Tensor& from) { to.copy_(from, /*non_blocking=*/true); }

}  // namespace sparse_transcoder
