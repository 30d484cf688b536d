#include "cpu/screen.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <sstream>
#include <string>

namespace sparse_transcoder::cpu {

ScreenChoice choose_screen(const WeightCopies& copies, const Crossovers& crossovers,
                           int64_t row_count) {
  ScreenChoice choice = {};
  choice.dense = copies.int16.defined() ? ScreenType::int16 : ScreenType::float32;
  choice.sparse =
      copies.int8.defined() && row_count <= crossovers.int8_rows ? ScreenType::int8 : choice.dense;
  choice.planes = row_count <= crossovers.two_planes_rows ? 2 : 1;
  choice.max_share =
      choice.dense == ScreenType::int16 ? crossovers.max_share_int16 : crossovers.max_share_float32;
  return choice;
}

Crossovers active_crossovers() {
  Crossovers crossovers = active_kernels().crossovers;
  const char* variable = std::getenv("SPARSE_TRANSCODER_CROSSOVERS");
  std::istringstream settings(variable == nullptr ? "" : variable);
  for (std::string setting; settings >> setting;) {
    std::istringstream value(setting.substr(setting.find('=') + 1));
    const std::string name = setting.substr(0, setting.find('='));
    if (name == "int8_rows")
      value >> crossovers.int8_rows;
    else if (name == "two_planes_rows")
      value >> crossovers.two_planes_rows;
    else if (name == "max_share_float32")
      value >> crossovers.max_share_float32;
    else if (name == "max_share_int16")
      value >> crossovers.max_share_int16;
    else
      value.setstate(std::ios::failbit);
    TORCH_CHECK_VALUE(value && value.eof(),
                      "SPARSE_TRANSCODER_CROSSOVERS must hold name=value with the names "
                      "int8_rows, "
                      "two_planes_rows, max_share_float32 and max_share_int16, got ",
                      setting);
  }
  return crossovers;
}

}  // namespace sparse_transcoder::cpu
