// Errors of this library beside c10::ValueError, c10::TypeError and c10::IndexError.
#pragma once

#include <c10/util/Exception.h>
#include <sparse_transcoder/api.h>

namespace sparse_transcoder {

// A file or folder that is not there.
struct SPARSE_TRANSCODER_API FileNotFound : c10::Error {
  using Error::Error;
};

}  // namespace sparse_transcoder
