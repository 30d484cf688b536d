// The rules that a declared layer must keep.
#pragma once

#include <sparse_transcoder/weights.h>

#include <string>

namespace sparse_transcoder {

// Shapes, types, devices and finite vectors. Throws c10::ValueError or c10::TypeError.
void check_weights(int64_t id, const LayerWeights& declared);

// "layer 41" or "layer 41 (path)": how errors name a layer.
std::string describe(int64_t id, const LayerWeights& declared);

}  // namespace sparse_transcoder
