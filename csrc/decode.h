// Reconstruction from sparse features, on any device.
#pragma once

#include <sparse_transcoder/features.h>

#include "layer.h"

namespace sparse_transcoder {

// y [N, n * H] for entries grouped by row: row n has features [row_begin[n], row_begin[n + 1]). x
// [N, H] or undefined.
at::Tensor decode_rows(const Layer& layer, const SparseFeatures& features, const at::Tensor& x);

}  // namespace sparse_transcoder
