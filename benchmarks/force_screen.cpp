// Preloaded by crossovers.py: takes the place of the library's choose_screen, so that one process
// can time every choice.
#include "cpu/screen.h"

namespace sparse_transcoder {
namespace {
Choice forced;
}

Choice choose_screen(const ScreeningCopies&, int64_t) { return forced; }

}  // namespace sparse_transcoder

extern "C" void force(int sparse, int dense, int planes, double dense_share) {
  using sparse_transcoder::Arithmetic;
  sparse_transcoder::forced = {static_cast<Arithmetic>(sparse), static_cast<Arithmetic>(dense),
                               planes, dense_share};
}
