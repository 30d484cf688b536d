#include "io/safetensors.h"

#include <ATen/ATen.h>
#include <fcntl.h>
#include <sparse_transcoder/weights.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>
#include <vector>

namespace sparse_transcoder {
namespace {

constexpr int64_t most_header_bytes = 100'000'000;  // the limit of the format's own reader

// A whole file, mapped privately: writing to a tensor changes its copy of the page, never the file.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    // Without blocking: a named pipe must be refused, not waited for.
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (file < 0) {
      const std::string reason = std::strerror(errno);
      throw FileNotFound({__func__, __FILE__, __LINE__}, path + ": cannot be opened: " + reason);
    }
    struct stat status;
    const bool regular = fstat(file, &status) == 0 && S_ISREG(status.st_mode);
    size_ = regular ? status.st_size : 0;
    if (size_ > 0)
      data_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file, 0);
    const std::string reason = std::strerror(errno);
    close(file);
    TORCH_CHECK_VALUE(regular, path, ": must be a regular file");
    TORCH_CHECK_VALUE(data_ != MAP_FAILED, path, ": cannot be mapped: ", reason);
  }
  ~MappedFile() {
    if (data_ != nullptr && data_ != MAP_FAILED) munmap(data_, size_);
  }
  MappedFile(const MappedFile&) = delete;

  char* data() const { return static_cast<char*>(data_); }
  int64_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

const std::map<std::string, at::ScalarType>& dtypes() {
  static const std::map<std::string, at::ScalarType> table = {
      {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf},  {"BF16", at::kBFloat16},
      {"I64", at::kLong},   {"I32", at::kInt},   {"I16", at::kShort}, {"I8", at::kChar},
      {"U8", at::kByte},    {"BOOL", at::kBool}};
  return table;
}

// A header field as a list of non-negative integers.
std::vector<int64_t> integers(const nlohmann::json& entry, const char* key,
                              const std::string& who) {
  const auto field = entry.find(key);
  TORCH_CHECK_VALUE(field != entry.end() && field->is_array(), who, ": ", key,
                    " must be a list of integers");
  TORCH_CHECK_VALUE(field->size() <= 8, who, ": ", key, " must hold at most 8 integers, got ",
                    field->size());
  std::vector<int64_t> values;
  for (const auto& item : *field) {
    TORCH_CHECK_VALUE(item.is_number_unsigned() && item.get<uint64_t>() <= INT64_MAX, who, ": ",
                      key, " must hold non-negative integers");
    values.push_back(item.get<int64_t>());
  }
  return values;
}

}  // namespace

std::string quoted(const std::string& text) {
  const std::string shown = text.size() <= 100 ? text : text.substr(0, 100) + "...";
  return nlohmann::json(shown).dump(-1, ' ', /*ensure_ascii=*/true,
                                    nlohmann::json::error_handler_t::replace);
}

bool is_utf8(const std::string& text) {
  try {
    static_cast<void>(nlohmann::json(text).dump());
    return true;
  } catch (const nlohmann::json::type_error&) {
    return false;
  }
}

std::map<std::string, at::Tensor> read_safetensors(const std::string& path) {
  const auto file = std::make_shared<MappedFile>(path);
  TORCH_CHECK_VALUE(file->size() >= 8, path, ": a safetensors file has at least 8 bytes, got ",
                    file->size());
  uint64_t header_bytes = 0;
  for (int i = 0; i < 8; ++i)
    header_bytes |= uint64_t{static_cast<unsigned char>(file->data()[i])} << (8 * i);
  const int64_t most = std::min(file->size() - 8, most_header_bytes);
  TORCH_CHECK_VALUE(header_bytes <= static_cast<uint64_t>(most), path,
                    ": the header must have at most ", most, " bytes, got ", header_bytes);
  const auto header_end = static_cast<int64_t>(8 + header_bytes);
  const int64_t data_bytes = file->size() - header_end;

  // Depth is bounded by a callback, so that a hostile header cannot exhaust the stack. The format
  // forbids a name twice.
  bool shallow = true;
  std::set<std::string> names;
  std::string twice;
  const auto watch = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    if (depth == 1 && event == nlohmann::json::parse_event_t::key &&
        !names.insert(parsed.get<std::string>()).second)
      twice = quoted(parsed.get<std::string>());
    return shallow &= depth < 8;
  };
  const auto header = nlohmann::json::parse(file->data() + 8, file->data() + header_end, watch,
                                            /*allow_exceptions=*/false);
  TORCH_CHECK_VALUE(shallow && header.is_object(), path, ": the header must be a JSON object");
  TORCH_CHECK_VALUE(twice.empty(), path, ": tensor ", twice, " is there twice");

  std::map<std::string, at::Tensor> tensors;
  std::vector<std::tuple<int64_t, int64_t, std::string>> spans;  // begin, end and name of each
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    const std::string who = path + ": tensor " + quoted(name);
    TORCH_CHECK_VALUE(entry.is_object(), who, ": must be described by a JSON object");
    const auto dtype_name = entry.find("dtype");
    TORCH_CHECK_VALUE(dtype_name != entry.end() && dtype_name->is_string(), who,
                      ": dtype must be a string");
    const auto dtype = dtypes().find(dtype_name->get<std::string>());
    TORCH_CHECK_VALUE(dtype != dtypes().end(), who,
                      ": dtype must be one of F64 F32 F16 BF16 I64 I32 I16 I8 U8 BOOL, got ",
                      quoted(dtype_name->get<std::string>()));
    const std::vector<int64_t> shape = integers(entry, "shape", who),
                               offsets = integers(entry, "data_offsets", who);
    int64_t bytes = c10::elementSize(dtype->second),
            span = bytes;  // a size of 0 counts as 1 in strides
    bool fits = true;
    for (const int64_t size : shape) {
      fits = fits && !__builtin_mul_overflow(span, std::max<int64_t>(size, 1), &span);
      bytes = fits ? bytes * size : 0;
    }
    TORCH_CHECK_VALUE(fits, who, ": shape ", at::IntArrayRef(shape), " is too large");
    TORCH_CHECK_VALUE(offsets.size() == 2 && offsets[0] <= offsets[1] && offsets[1] <= data_bytes,
                      who, ": data_offsets must be [begin, end] within ", data_bytes,
                      " bytes, got ", at::IntArrayRef(offsets));
    TORCH_CHECK_VALUE(offsets[1] - offsets[0] == bytes, who, ": shape ", at::IntArrayRef(shape),
                      " needs ", bytes, " bytes, data_offsets span ", offsets[1] - offsets[0]);
    spans.emplace_back(offsets[0], offsets[1], name);
    char* data = file->data() + header_end + offsets[0];
    at::Tensor tensor =
        at::from_blob(data, shape, [file](void*) {}, at::TensorOptions(dtype->second));
    if (reinterpret_cast<uintptr_t>(data) % c10::elementSize(dtype->second) !=
        0) {  // a header of odd length
      at::Tensor aligned = at::empty(shape, tensor.options());
      if (bytes > 0) std::memcpy(aligned.mutable_data_ptr(), data, bytes);
      tensor = aligned;
    }
    tensors.emplace(name, tensor);
  }
  // The tensors fill the data without a hole, as the format demands: nothing else can hide in it.
  std::sort(spans.begin(), spans.end());
  int64_t filled = 0;
  for (const auto& [begin, end, name] : spans) {
    TORCH_CHECK_VALUE(begin >= filled, path, ": tensor ", quoted(name),
                      " must not overlap another tensor, got bytes ", begin, " to ", end,
                      " after one that ends at ", filled);
    TORCH_CHECK_VALUE(begin == filled, path, ": tensor ", quoted(name), " must begin at byte ",
                      filled, ", where the tensors before it end, got ", begin);
    filled = end;
  }
  TORCH_CHECK_VALUE(filled == data_bytes, path, ": the tensors must fill the ", data_bytes,
                    " bytes after the header, got ", filled);
  return tensors;
}

}  // namespace sparse_transcoder
