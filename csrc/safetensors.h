// Reader of the safetensors format (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON header, raw
// data.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

namespace sparse_transcoder {

// Tensors of the file, by name, over a private memory map: pages are read when touched, and the map lives as long as a tensor
// does. Every header field is checked before it is used; a malformed file throws c10::ValueError with the path and the reason.
std::map<std::string, at::Tensor> read_safetensors(const std::string& path);

}  // namespace sparse_transcoder
