// The rules that a declared layer must keep.
#pragma once

#include <sparse_transcoder/weights.h>

#include <string>

namespace sparse_transcoder {

// Shapes, types, devices and finite vectors. Throws c10::ValueError or c10::TypeError.
void check_weights(int64_t id, const LayerWeights& declared);

// Whether a tensor's elements are in its memory as they are: false where that was freed or never
// there, and for one that is negated when it is read.
bool is_plain(const at::Tensor& tensor);

// "layer 41" or "layer 41 (path)": how errors name a layer.
std::string describe(int64_t id, const LayerWeights& declared);

}  // namespace sparse_transcoder
