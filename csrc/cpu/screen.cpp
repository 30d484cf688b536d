#include "cpu/screen.h"

namespace sparse_transcoder::cpu {
namespace {

constexpr double int16_share = 0.2;  // as CpuKernels::dense_share, for the int16 screen

}  // namespace

ScreenChoice choose_screen(const WeightCopies& copies, int64_t row_count) {
  const CpuKernels& kernel = cpu_kernels();
  const ScreenType dense = copies.int16.defined() ? ScreenType::int16 : ScreenType::float32;
  const bool int8 = copies.int8.defined() && row_count <= kernel.int8_rows;
  return {int8 ? ScreenType::int8 : dense, dense, row_count <= kernel.two_planes_rows ? 2 : 1,
          dense == ScreenType::int16 ? int16_share : kernel.dense_share};
}

}  // namespace sparse_transcoder::cpu
