// The CUDA path's own sequence of steps, csrc/encode_cuda.cpp, on CPU tensors with kernels whose threads are CPU threads.
// Products are as far off as their margin allows, or nearly: towards one side for even features, the other for odd ones.
#include <torch/library.h>

#include "encode_cuda.cpp"

namespace sparse_transcoder {

void multiply(at::Tensor& out, const at::Tensor& left, const at::Tensor& right) {
  at::Tensor x = left.to(at::kDouble), w = right.to(at::kDouble);
  const bool float32 = left.scalar_type() == at::kFloat;
  if (float32) {  // as TF32 does
    const auto cut = [](const at::Tensor& t) { return t.to(at::kFloat).view(at::kInt).bitwise_and(~0x1fff).view(at::kFloat); };
    x = cut(x).to(at::kDouble);
    w = cut(w).to(at::kDouble);
  }
  const at::Tensor off = at::matmul(x.abs(), w.abs().t()) * (0.9 * sum_roundoff(left.size(1), false));
  const at::Tensor sign = at::arange(w.size(0)).remainder(2) * 2 - 1;
  out.copy_(at::matmul(x, w.t()) + off * sign);
}

void check_cuda(int status) { TORCH_CHECK(status == 0, "error ", status); }

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> encode(const at::Tensor& hidden, const at::Tensor& W_enc, const at::Tensor& b_enc,
                                                      const std::optional<at::Tensor>& threshold, std::optional<int64_t> k,
                                                      const std::optional<at::Tensor>& input_bias,
                                                      const std::optional<at::Tensor>& ln_weight,
                                                      const std::optional<at::Tensor>& ln_bias, int64_t top_k, double tau,
                                                      bool screening, int64_t chunk, int64_t scores, int64_t room) {
  const at::Tensor none;
  Options options;
  options.top_k = top_k;
  options.activation_threshold = static_cast<float>(tau);
  options.chunk_size = chunk;
  options.screening = Screening::off;
  LayerWeights weights;
  weights.W_enc = W_enc;
  weights.b_enc = b_enc;
  weights.threshold = threshold.value_or(none);
  weights.k = k;
  weights.input_bias = input_bias.value_or(none);
  weights.ln_weight = ln_weight.value_or(none);
  weights.ln_bias = ln_bias.value_or(none);
  Layer layer(0, weights, options, {at::kCPU, false});
  layer.bf16_screen = screening;
  if (screening && layer.dtype != kernels::Dtype::bfloat16) add_bf16_copy(layer.copies, layer.W_enc, "layer 0", layer.norm);
  CudaPlan plan = plan_cuda({&layer}, options, 3);
  plan.scores = std::max(scores, plan.rows);
  plan.widened = plan.widened > 0 ? std::max(scores, plan.hidden_size) : 0;
  plan.capacity = kernels::cuda::segment + room;  // lists that are thinned early
  const CudaBuffers buffers(plan, at::kCPU);
  const int64_t rows = hidden.size(0) * hidden.size(1);
  Request request = {
      &layer,
      hidden,
      {at::full({rows, layer.top_k}, -1.0f), at::full({rows, layer.top_k}, -1, at::kLong), at::full({rows}, -1.0f)}};
  const kernels::cuda::Io io = {hidden.const_data_ptr(),
                                hidden.size(1),
                                {hidden.stride(0), hidden.stride(1), hidden.stride(2)},
                                request.out.activations.mutable_data_ptr<float>(),
                                request.out.indices.mutable_data_ptr<int64_t>(),
                                request.out.sparsity.mutable_data_ptr<float>()};
  const int64_t step = chunk_rows(request, plan);
  for (int64_t first = 0; first < rows; first += step)
    encode_rows(request, first, std::min(step, rows - first), layer.W_enc, &io, buffers, plan, nullptr);
  return {request.out.activations, request.out.indices, request.out.sparsity};
}

}  // namespace
}  // namespace sparse_transcoder

TORCH_LIBRARY(cuda_on_cpu, library) {
  library.def(
      "encode(Tensor hidden, Tensor W_enc, Tensor b_enc, Tensor? threshold, int? k, Tensor? input_bias, Tensor? ln_weight, "
      "Tensor? ln_bias, int top_k, float tau, bool screening, int chunk, int scores, int room) -> (Tensor, Tensor, Tensor)",
      &sparse_transcoder::encode);
}
