#include "decode.h"

#include <ATen/ATen.h>

namespace sparse_transcoder {
namespace {

constexpr int64_t gathered_bytes = 32 << 20;  // decoder columns gathered at a time

}  // namespace

at::Tensor decode_rows(const Layer& layer, const SparseFeatures& features, const at::Tensor& x) {
  const std::string who = "layer " + std::to_string(layer.id);
  const LayerWeights& weights = layer.declared;
  TORCH_CHECK_VALUE(weights.W_dec.defined(), who,
                    ": decode needs W_dec, which the checkpoint does not have");
  TORCH_CHECK_VALUE(!weights.W_skip.defined() || x.defined(), who,
                    ": the skip connection needs the hidden states, got none");
  const int64_t rows = features.row_begin.size(0) - 1, written = weights.W_dec.size(0);
  const at::Tensor columns = weights.W_dec.detach().t();  // [F, n * H]
  at::Tensor y = at::zeros({rows, written}, columns.options().dtype(at::kFloat));
  const at::Tensor begins = features.row_begin.cpu();
  const int64_t* begin = begins.const_data_ptr<int64_t>();
  // Whole rows at a time: decoder columns are gathered, scaled, and summed by row in the order of
  // the entries.
  const int64_t block = std::max<int64_t>(1, gathered_bytes / (4 * written));
  for (int64_t row = 0, last; row < rows; row = last) {
    for (last = row + 1; last < rows && begin[last + 1] - begin[row] <= block;) ++last;
    const int64_t count = begin[last] - begin[row];
    if (count == 0) continue;
    const at::Tensor gathered =
        at::index_select(columns, 0, features.features.narrow(0, begin[row], count))
            .to(at::kFloat)
            .contiguous();
    gathered.mul_(features.activations.narrow(0, begin[row], count).unsqueeze(1));
    y.narrow(0, row, last - row)
        .copy_(
            at::segment_reduce(gathered, "sum", features.row_begin.slice(0, row, last + 1).diff()));
  }
  // A bias of [H] and the skip connection belong to the first of the layers that the decoder writes
  // to.
  if (weights.b_dec.defined())
    y.narrow(1, 0, weights.b_dec.size(0)).add_(weights.b_dec.detach().to(at::kFloat));
  if (weights.W_skip.defined())
    y.narrow(1, 0, layer.hidden_size)
        .add_(at::matmul(x.to(at::kDouble), weights.W_skip.detach().to(at::kDouble).t())
                  .to(at::kFloat));
  return y;
}

}  // namespace sparse_transcoder
