// Reader of the safetensors format (https://github.com/huggingface/safetensors): 8 bytes of header
// length, a JSON header, raw data.
#pragma once

#include <ATen/core/Tensor.h>
#include <sparse_transcoder/api.h>

#include <map>
#include <string>

namespace sparse_transcoder {

// Tensors of the file, by name, over a private memory map: pages are read when touched, and the map
// lives as long as a tensor does. Every header field is checked before it is used, and the tensors
// must fill the data without a hole. A malformed file throws c10::ValueError with the path and the
// reason.
// Exported for the Python module.
SPARSE_TRANSCODER_API std::map<std::string, at::Tensor> read_safetensors(const std::string& path);

// The beginning of a file's own words as a JSON string: one short line of ASCII, whatever they
// hold.
std::string quoted(const std::string& text);

bool is_utf8(const std::string& text);

}  // namespace sparse_transcoder
