// A folder that lies, as libFuzzer makes it up: it is loaded or refused with a reason. The input,
// cut at its first two NULs, is config.yaml (none where it is empty), the header of
// layer_0.safetensors, and its data; after an empty header the data are the whole file.
#include "fuzz.h"

#include <ATen/ATen.h>
#include <sparse_transcoder/weights.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>

#include "io/safetensors.h"

using namespace sparse_transcoder;

namespace {

// The process's own folder; it goes when the process ends.
const std::string& folder() {
  static const struct Folder {
    std::string path =
        (std::filesystem::temp_directory_path() / "sparse_transcoder_XXXXXX").string();
    Folder() {
      if (mkdtemp(path.data()) == nullptr) std::abort();
    }
    ~Folder() {
      std::error_code ignored;
      std::filesystem::remove_all(path, ignored);
    }
  } made;
  return made.path;
}

void write(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// Reads every byte, so that one out of bounds is noticed.
void touch(const at::Tensor& t) {
  if (!t.defined()) return;
  const at::Tensor stored = t.is_contiguous() ? t : t.t();
  volatile char sink = 0;
  const auto* data = static_cast<const char*>(stored.const_data_ptr());
  for (size_t i = 0; i < stored.nbytes(); ++i) sink = static_cast<char>(sink ^ data[i]);
}

// Empty, or what is wrong with an error's text: it must name the folder, in one line that a
// terminal can show.
std::string complaint(const std::string& text) {
  if (text.find(folder()) == std::string::npos) return "names no file: " + text;
  for (const char c : text)
    if ((static_cast<unsigned char>(c) < 0x20 && c != '\t') || c == 0x7f)
      return "holds a control character: " + text;
  return "";
}

std::string refusal(const std::function<void()>& read) {
  try {
    read();
    return "";
  } catch (const c10::ValueError& error) {
    return complaint(error.what_without_backtrace());
  } catch (const c10::TypeError& error) {
    return complaint(error.what_without_backtrace());
  } catch (const FileNotFound& error) {
    return complaint(error.what_without_backtrace());
  } catch (const std::exception& error) {
    return std::string("is not a user's error: ") + error.what();
  }
}

}  // namespace

std::string try_folder(const std::string& input) {
  const size_t first = std::min(input.find('\0'), input.size());
  const size_t second = std::min(input.find('\0', first + 1), input.size());
  const std::string config = input.substr(0, first);
  const std::string header = first < second ? input.substr(first + 1, second - first - 1) : "";
  std::string file;
  if (!header.empty())
    for (int i = 0; i < 8; ++i) file.push_back(static_cast<char>(header.size() >> (8 * i)));
  file += header + (second < input.size() ? input.substr(second + 1) : "");

  const std::string path = folder() + "/layer_0.safetensors",
                    config_path = folder() + "/config.yaml";
  write(path, file);
  config.empty() ? static_cast<void>(std::remove(config_path.c_str())) : write(config_path, config);
  std::string wrong = refusal([&] {
    for (const auto& [name, tensor] : read_safetensors(path)) touch(tensor);
  });
  if (!wrong.empty()) return wrong;
  return refusal([&] {
    for (const auto& [id, w] : load_weights(folder()))
      for (const at::Tensor& tensor : {w.W_enc, w.b_enc, w.W_dec, w.b_dec, w.threshold, w.W_skip})
        touch(tensor);
  });
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string wrong = try_folder(std::string(reinterpret_cast<const char*>(data), size));
  if (wrong.empty()) return 0;
  std::fprintf(stderr, "an error %s\n", wrong.c_str());
  std::abort();
}
