// What this backend leaves to torch's kernels, on the current stream, and its pinned tensors.
#pragma once

#include <ATen/core/Tensor.h>

namespace sparse_transcoder {

// out [n, f] = left [n, h] right [f, h]^T, added up in float32.
void multiply(at::Tensor out, const at::Tensor& left, const at::Tensor& right);
void copy_to(at::Tensor to, const at::Tensor& from);
// A copy in host memory that the device can read while the host goes on. It takes no more memory
// than the tensor does; torch's own pinned memory is up to twice as much, and kept for good.
at::Tensor pinned(const at::Tensor& from);

}  // namespace sparse_transcoder
