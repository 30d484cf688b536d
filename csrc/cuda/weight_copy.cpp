#include "cuda/weight_copy.h"

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include "bounds.h"
#include "cuda/products.h"
#include "cuda/screen.h"
#include "cuda/streams.h"

namespace sparse_transcoder::cuda {
namespace {

// Of a bfloat16 number in its normal range: half a unit in the last of its 8 bits, relative.
constexpr double max_bf16_error = 0x1p-9;

// Calls block(first, count) for blocks of rows, so that no float64 copy of the matrix exists.
// inputs: the numbers of a row, with those that pad it.
template <typename Block>
void by_blocks(const at::Tensor& W_enc, int64_t inputs, const Block& block) {
  const int64_t features = W_enc.size(0);
  const int64_t size = std::max<int64_t>(1, (int64_t{1} << 20) / inputs);
  for (int64_t first = 0; first < features; first += size)
    block(first, std::min(size, features - first));
}

// ||w|| of every feature, [F] float64.
at::Tensor row_norms(const at::Tensor& W_enc) {
  at::Tensor norm = at::empty({W_enc.size(0)}, W_enc.options().dtype(at::kDouble));
  by_blocks(W_enc, W_enc.size(1), [&](int64_t first, int64_t count) {
    const at::Tensor rows = W_enc.narrow(0, first, count).to(at::kDouble);
    norm.narrow(0, first, count).copy_(at::linalg_vector_norm(rows, 2, {1}));
  });
  return norm;
}

// 1 or -1 for each input: the signs that R flips.
at::Tensor signs(int64_t size, at::Device device) {
  const at::Tensor made = at::empty({size}, at::kDouble);
  double* sign = made.mutable_data_ptr<double>();
  for (int64_t i = 0; i < size; ++i) sign[i] = flips_sign(static_cast<uint32_t>(i)) ? -1 : 1;
  return made.to(device);
}

// The product of rows with Hadamard's matrix, int8_mixed numbers at a time.
at::Tensor mix(const at::Tensor& rows) {
  at::Tensor mixed = rows;
  for (int64_t half = 1; half < int8_mixed; half *= 2) {
    const at::Tensor pairs = mixed.reshape({-1, 2, half}), a = pairs.select(1, 0),
                     b = pairs.select(1, 1);
    mixed = at::stack({a + b, a - b}, 1);
  }
  return mixed.reshape(rows.sizes());
}

// W_enc on the device, or in pinned host memory.
at::Tensor place(const Layer& layer, const Options& options, bool streamed) {
  const at::Tensor W_enc = layer.declared.W_enc.detach().contiguous();
  const auto refuse = [&](const std::string& where, const char* less) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, layer.name(), ": out of memory: the encoder needs ",
                     W_enc.nbytes(), " bytes ", where, "; ", less,
                     " device_weight_bytes needs less, got ", options.device_weight_bytes);
  };
  if (streamed) {
    try {
      return pinned(W_enc);
    } catch (const c10::Error&) {
      refuse("of pinned host memory", "a higher");
    }
  } else {
    try {
      return W_enc.to(layer.device);
    } catch (const c10::OutOfMemoryError&) {
      refuse("on " + layer.device.str(), "a lower");
    }
  }
  return W_enc;
}

}  // namespace

int64_t resident_bytes(const Layer& layer, const Options& options) {
  const at::Tensor& W_enc = layer.declared.W_enc;
  const bool copied = options.screening != Screening::off && layer.dtype != Dtype::bfloat16;
  return W_enc.numel() * (W_enc.element_size() + (copied ? 2 : 0)) +
         (makes_int8(layer, options) ? layer.features * int8_inputs(layer.hidden_size) : 0);
}

int64_t PreparedLayer::screening_bytes() const {
  int64_t bytes = 0;
  for (const at::Tensor* copy : {&bf16, &int8, &int8_scale, &int8_error})
    if (copy->defined()) bytes += copy->nbytes();
  return bytes;
}

PreparedLayer prepare_layer(const Layer& layer, const Options& options, bool streamed) {
  const at::Tensor W_enc = place(layer, options, streamed);
  try {
    PreparedLayer prepared = {layer, W_enc, streamed,
                              LayerBounds(layer, row_norms(W_enc).to(layer.device))};
    const c10::DeviceGuard guard(layer.device);
    check_cuda(has_tensor_cores(&prepared.tensor_cores));
    if (options.screening != Screening::off) {
      prepared.bf16_screen = layer.dtype == Dtype::bfloat16 || !streamed;
      if (prepared.bf16_screen && layer.dtype != Dtype::bfloat16) add_bf16_copy(prepared);
      if (!streamed && makes_int8(layer, options)) {
        try {
          add_int8_copy(prepared);
        } catch (const c10::OutOfMemoryError&) {
          if (options.screening != Screening::automatic) throw;
          prepared.int8 = prepared.int8_scale = at::Tensor();  // the bfloat16 screen needs none
        }
        if (prepared.int8.defined() && options.screening == Screening::automatic) {
          try {
            prepared.int8_trial = std::make_unique<Int8Trial>(layer.features);
          } catch (const c10::Error&) {  // no memory can be pinned: int8 is never left
          }
        }
      }
    }
    return prepared;
  } catch (const c10::OutOfMemoryError&) {
    const int64_t copies =
        streamed ? 0 : resident_bytes(layer, options) - static_cast<int64_t>(W_enc.nbytes());
    TORCH_CHECK_WITH(OutOfMemoryError, false, layer.name(),
                     ": out of memory: the screening copies need ", copies, " bytes on ",
                     layer.device, ", and more while they and the bounds are made; ",
                     "screening \"int16\" makes none of int8, \"off\" none at all, and a lower "
                     "device_weight_bytes needs less");
  }
}

void add_bf16_copy(PreparedLayer& layer) {
  const at::Tensor& W_enc = layer.W_enc;
  layer.bf16 = at::empty_like(W_enc, at::kBFloat16);
  at::Tensor error = at::empty({W_enc.size(0)}, W_enc.options().dtype(at::kDouble));
  by_blocks(W_enc, W_enc.size(1), [&](int64_t first, int64_t count) {
    const at::Tensor rows = W_enc.narrow(0, first, count);
    at::Tensor copy = layer.bf16.narrow(0, first, count);
    copy.copy_(rows);
    error.narrow(0, first, count)
        .copy_(at::linalg_vector_norm(rows.to(at::kDouble) - copy.to(at::kDouble), 2, {1}));
  });
  error.mul_(round_up);
  at::Tensor& norm = layer.bounds.norm;
  const double share =
      std::clamp((error / norm.to(at::kDouble)).max().item<double>(), 0x1p-30, max_bf16_error);
  layer.bf16_error = static_cast<float>(share * round_up);
  norm = at::maximum(norm, (error / share).to(at::kFloat));
}

void add_int8_copy(PreparedLayer& layer) {
  const int64_t inputs = int8_inputs(layer.hidden_size);
  layer.int8 = at::empty({layer.features, inputs}, layer.W_enc.options().dtype(at::kChar));
  layer.int8_scale = at::empty({layer.features}, layer.bias.options());
  at::Tensor error = at::empty({layer.features}, layer.bias.options().dtype(at::kDouble)),
             squares = at::empty_like(error);
  const at::Tensor flips = signs(layer.hidden_size, layer.device);
  by_blocks(layer.W_enc, inputs, [&](int64_t first, int64_t count) {
    const at::Tensor rows = layer.W_enc.narrow(0, first, count).to(at::kDouble) * flips;
    const at::Tensor z = mix(at::constant_pad_nd(rows, {0, inputs - layer.hidden_size}));
    at::Tensor scale = (z.abs().amax(1) / 127).to(at::kFloat);
    scale.masked_fill_((scale >= min_int8_scale).logical_and_(at::isfinite(scale)).logical_not_(),
                       0);
    const at::Tensor wide = scale.to(at::kDouble).unsqueeze(1);
    const at::Tensor p = at::where(wide > 0, at::round(z / wide), 0);
    layer.int8.narrow(0, first, count).copy_(p);
    layer.int8_scale.narrow(0, first, count).copy_(scale / int8_mixed);
    error.narrow(0, first, count).copy_(at::linalg_vector_norm(z - wide * p, 2, {1}));
    squares.narrow(0, first, count).copy_(p.square().sum(1));
  });
  layer.int8_norm = static_cast<float>(std::sqrt(squares.max().item<double>()) * round_up);
  layer.int8_error = ((error / std::sqrt(static_cast<double>(int8_mixed)) +
                       layer.bounds.norm.to(at::kDouble) * int8_share) *
                      round_up)
                         .to(at::kFloat)
                         .clamp_min_(FLT_MIN);
}

}  // namespace sparse_transcoder::cuda
