// Which screen finds the candidates of a call, what multiplies for it, and what the int8 screen's
// parts share.
#pragma once

#include <ATen/core/Tensor.h>
#include <sparse_transcoder/options.h>

#include <algorithm>

#include "backend.h"
#include "cuda/kernels/kernels.h"
#include "cuda/weight_copy.h"
#include "layer.h"

namespace sparse_transcoder::cuda {

// "auto" makes an int8 copy of encoders of at least so many weights: reading fewer takes less time
// than the other steps.
constexpr int64_t min_int8_weights = int64_t{1} << 24;

// Whether a layer whose weights stay on the device gets an int8 copy. Where device_weight_bytes
// bounds the memory, "auto" leaves it to weights.
inline bool makes_int8(const Layer& layer, const Options& options) {
  if (layer.hidden_size > max_int8_inputs) return false;
  return options.screening == Screening::int8 ||
         (options.screening == Screening::automatic && options.device_weight_bytes < 0 &&
          layer.features * layer.hidden_size >= min_int8_weights);
}

// What multiplies for the screen of a call: own kernels, which a graph can hold, or torch's.
enum class Product { few_rows, few_rows_int8, tensor_bf16, tensor_int8, library };

// Once per call of a layer, since its int8 screen may be on trial.
inline Product choose_product(const PreparedLayer& layer, const Request& request) {
  // On an H100 the tensor cores are as fast from 5 rows on as the kernels of few rows, or faster.
  // The latter never round rows to bfloat16, and let fewer features through where others would.
  constexpr int64_t min_rows = 5, min_rounded_rows = few_rows + 1;
  const int64_t row_count = request.row_count();
  const bool tensor = layer.tensor_cores && row_count <= max_tensor_rows,
             few = row_count <= few_rows;
  if (layer.int8.defined() && (tensor || few) && (!layer.int8_trial || layer.int8_trial->next()))
    return tensor && row_count >= min_rows ? Product::tensor_int8 : Product::few_rows_int8;
  const at::Tensor& screened = layer.bf16.defined() ? layer.bf16 : layer.W_enc;
  const bool aligned = layer.hidden_size % tensor_inputs == 0 &&
                       reinterpret_cast<uintptr_t>(screened.const_data_ptr()) % 16 == 0,
             rounds = request.hidden.dtype != at::kBFloat16 || layer.input_bias.defined() ||
                      layer.ln_weight.defined();
  if (tensor && layer.bf16_screen && aligned && row_count >= (rounds ? min_rounded_rows : min_rows))
    return Product::tensor_bf16;
  return few ? Product::few_rows : Product::library;
}

}  // namespace sparse_transcoder::cuda
