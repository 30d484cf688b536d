// Files: what is written is read, and a file that lies is refused with a reason.
#include <ATen/ATen.h>
#include <sparse_transcoder/weights.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <sstream>
#include <vector>

#include "check.h"
#include "fuzz.h"
#include "io/safetensors.h"

using namespace sparse_transcoder;

namespace {

// A folder that goes when the test ends.
class Folder {
 public:
  Folder() {
    std::string name =
        (std::filesystem::temp_directory_path() / "sparse_transcoder_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error(name + ": cannot be made");
    path_ = name;
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  std::string path(const std::string& name = "") const {
    return name.empty() ? path_ : path_ + "/" + name;
  }

  std::string write(const std::string& name, const std::string& bytes) const {
    std::ofstream file(path(name), std::ios::binary | std::ios::trunc);
    file << bytes;
    return path(name);
  }

 private:
  std::string path_;
};

// A file with this header and as many bytes of data, counting up.
std::string file_of(const std::string& header, size_t data_bytes, bool floats = true) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes.push_back(static_cast<char>(header.size() >> (8 * i)));
  bytes += header;
  for (size_t i = 0; i < data_bytes; ++i) {
    const float value = 0.25f * static_cast<float>(i / 4);
    char raw[4];
    std::memcpy(raw, &value, sizeof(raw));
    bytes.push_back(floats ? raw[i % 4] : static_cast<char>(i));
  }
  return bytes;
}

std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   int64_t begin, int64_t end) {
  std::ostringstream text;
  text << '"' << name << "\":{\"dtype\":\"" << dtype << "\",\"shape\":" << shape
       << ",\"data_offsets\":[" << begin << ',' << end << "]}";
  return text.str();
}

// A layer of 4 features and 3 inputs.
std::string layer_file() {
  return file_of("{\"__metadata__\":{\"format\":\"pt\"}," + tensor("W_enc", "F32", "[4,3]", 0, 48) +
                     ',' + tensor("b_enc", "F32", "[4]", 48, 64) + ',' +
                     tensor("W_dec", "F32", "[4,3]", 64, 112) + ',' +
                     tensor("b_dec", "F32", "[3]", 112, 124) + "}",
                 124);
}

// Whether the file was read. Every byte of what it holds is touched; any error but a refusal fails
// the test.
bool reads(const std::string& path) {
  try {
    int64_t bytes = 0;
    volatile char sink = 0;
    for (const auto& [name, t] : read_safetensors(path)) {
      EXPECT(t.is_contiguous());
      const auto* data = static_cast<const char*>(t.const_data_ptr());
      for (size_t i = 0; i < t.nbytes(); ++i) sink = static_cast<char>(sink ^ data[i]);
      bytes += static_cast<int64_t>(t.nbytes());
    }
    EXPECT(bytes <= static_cast<int64_t>(std::filesystem::file_size(path)));
    return true;
  } catch (const c10::ValueError& error) {
    const std::string text = error.what_without_backtrace();
    EXPECT(text.rfind(path + ": ", 0) == 0 && text.find('\n') == std::string::npos);
    return false;
  }
}

bool loads(const std::string& dir) {
  try {
    for (const auto& [id, w] : load_weights(dir))
      EXPECT(w.W_enc.defined() && w.W_enc.dim() == 2 && w.b_enc.dim() == 1);
    return true;
  } catch (const c10::ValueError&) {
  } catch (const c10::TypeError&) {
  } catch (const FileNotFound&) {
  }
  return false;
}

}  // namespace

TEST(weights_read_what_was_written) {
  const Folder folder;
  const auto tensors = read_safetensors(folder.write("f", layer_file()));
  EXPECT_EQUAL(tensors.size(), 4u);
  const at::Tensor all = at::arange(31) * 0.25f;
  EXPECT(tensors.at("W_enc").equal(all.narrow(0, 0, 12).view({4, 3})));
  EXPECT(tensors.at("b_enc").equal(all.narrow(0, 12, 4)));
  EXPECT(tensors.at("b_dec").equal(all.narrow(0, 28, 3)));
}

TEST(weights_every_dtype) {
  const std::pair<const char*, at::ScalarType> dtypes[] = {
      {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf},  {"BF16", at::kBFloat16},
      {"I64", at::kLong},   {"I32", at::kInt},   {"I16", at::kShort}, {"I8", at::kChar},
      {"U8", at::kByte},    {"BOOL", at::kBool}};
  const Folder folder;
  for (const auto& [name, type] : dtypes)
    for (const std::string blanks :
         {"", " ", "   "}) {  // a header of any length: data need not be aligned
      const auto bytes = static_cast<int64_t>(3 * c10::elementSize(type));
      const std::string content =
          file_of(blanks + "{" + tensor("t", name, "[3]", 0, bytes) + "}", bytes, false);
      const at::Tensor t = read_safetensors(folder.write("f", content)).at("t");
      EXPECT(t.scalar_type() == type && t.numel() == 3);
      EXPECT(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % c10::elementSize(type) == 0);
      EXPECT(std::memcmp(t.const_data_ptr(), content.data() + content.size() - bytes, bytes) == 0);
    }
}

TEST(weights_outlive_their_file) {
  const Folder folder;
  at::Tensor t;
  {
    auto tensors = read_safetensors(folder.write("f", layer_file()));
    t = tensors.at("b_enc");
  }
  std::filesystem::remove(folder.path("f"));
  EXPECT_EQUAL(t[3].item<float>(), 3.75f);
}

TEST(weights_writing_to_them_leaves_the_file) {
  const Folder folder;
  const std::string path = folder.write("f", layer_file());
  read_safetensors(path).at("b_enc").fill_(-1);
  EXPECT_EQUAL(read_safetensors(path).at("b_enc")[3].item<float>(), 3.75f);
}

TEST(weights_refuse_malformed_files) {
  const Folder folder;
  const struct {
    std::string bytes, reason;
  } files[] = {
      {"", "a safetensors file has at least 8 bytes, got 0"},
      {std::string(7, '\0'), "at least 8 bytes, got 7"},
      {std::string(8, '\0'), "the header must be a JSON object"},
      {std::string(8, '\xff'), "the header must have at most 0 bytes, got 18446744073709551615"},
      {file_of("", 100), "the header must be a JSON object"},
      {file_of("[]", 0), "the header must be a JSON object"},
      {file_of("{", 0), "the header must be a JSON object"},
      {file_of("{}x", 0), "the header must be a JSON object"},
      {file_of(std::string(100000, '['), 0), "the header must be a JSON object"},
      {file_of("{\"a\":" + std::string(100000, '['), 0), "the header must be a JSON object"},
      {file_of("{\"a\":3}", 0), "tensor \"a\": must be described by a JSON object"},
      {file_of("{\"a\":{}}", 0), "tensor \"a\": dtype must be a string"},
      {file_of("{\"a\":{\"dtype\":7}}", 0), "tensor \"a\": dtype must be a string"},
      {file_of("{\"a\\n\":{}}", 0), "tensor \"a\\n\": dtype must be a string"},
      {file_of("{" + tensor("a", "F8", "[1]", 0, 1) + "}", 1), "got \"F8\""},
      {file_of("{" + tensor("a", "F32\\n", "[1]", 0, 4) + "}", 4), "got \"F32\\n\""},
      {file_of("{\"a\":{\"dtype\":\"F32\"}}", 0), "shape must be a list of integers"},
      {file_of("{\"a\":{\"dtype\":\"F32\",\"shape\":[1]}}", 4),
       "data_offsets must be a list of integers"},
      {file_of("{" + tensor("a", "F32", "1", 0, 4) + "}", 4), "shape must be a list of integers"},
      {file_of("{" + tensor("a", "F32", "[-1]", 0, 4) + "}", 4),
       "shape must hold non-negative integers"},
      {file_of("{" + tensor("a", "F32", "[1.0]", 0, 4) + "}", 4),
       "shape must hold non-negative integers"},
      {file_of("{" + tensor("a", "F32", "[18446744073709551615]", 0, 4) + "}", 4),
       "shape must hold non-negative integers"},
      {file_of("{" + tensor("a", "F32", "[99999999999999999999999]", 0, 4) + "}", 4),
       "shape must hold non-negative integers"},
      {file_of("{" + tensor("a", "F32", "[4611686018427387904,4]", 0, 0) + "}", 0), "is too large"},
      {file_of("{" + tensor("a", "F32", "[0,4611686018427387904,4]", 0, 0) + "}", 0),
       "is too large"},
      {file_of("{" + tensor("a", "F32", "[1,1,1,1,1,1,1,1,1]", 0, 4) + "}", 4),
       "shape must hold at most 8 integers, got 9"},
      {file_of("{" + tensor("a", "F32", "[2]", 0, 4) + "}", 4),
       "needs 8 bytes, data_offsets span 4"},
      {file_of("{" + tensor("a", "F32", "[1]", 4, 8) + "}", 4),
       "data_offsets must be [begin, end] within 4 bytes, got [4, 8]"},
      {file_of("{" + tensor("a", "F32", "[1]", 4, 0) + "}", 4),
       "data_offsets must be [begin, end] within"},
      {file_of("{" + tensor("a", "F32", "[1]", 0, 4) + "," + tensor("b", "F32", "[1]", 0, 4) + "}",
               8),
       "overlap"},
      {file_of("{" + tensor("a", "F32", "[2]", 0, 8) + "," + tensor("b", "F32", "[1]", 4, 8) + "}",
               8),
       "overlap"},
      {file_of("{" + tensor("a", "F32", "[1]", 0, 4) + "," + tensor("a", "F32", "[1]", 4, 8) + "}",
               8),
       "\"a\" is there twice"},
      {file_of("{" + tensor("a", "F32", "[1]", 0, 4) + "," + tensor("b", "F32", "[1]", 8, 12) + "}",
               12),
       "tensor \"b\" must begin at byte 4, where the tensors before it end, got 8"},
      {file_of("{" + tensor("a", "F32", "[1]", 4, 8) + "}", 8),
       "tensor \"a\" must begin at byte 0"},
      {file_of("{" + tensor("a", "F32", "[1]", 0, 4) + "," + tensor("b", "F32", "[0]", 2, 2) + "}",
               4),
       "\"b\" must not overlap"},
      {file_of("{" + tensor("a", "F32", "[1]", 0, 4) + "}", 5),
       "the tensors must fill the 5 bytes after the header, got 4"},
      {file_of("{}", 1), "the tensors must fill the 1 bytes after the header, got 0"},
  };
  for (const auto& file : files) {
    const std::string path = folder.write("f", file.bytes);
    EXPECT_THROWS(c10::ValueError, file.reason, read_safetensors(path));
    EXPECT_THROWS(c10::ValueError, path + ": ", read_safetensors(path));
  }
  EXPECT_THROWS(FileNotFound, folder.path("none") + ": cannot be opened: No such file",
                read_safetensors(folder.path("none")));
  EXPECT_THROWS(c10::ValueError, folder.path() + ": must be a regular file",
                read_safetensors(folder.path()));
  mkfifo(folder.path("pipe").c_str(), 0600);
  alarm(60);  // nobody writes to it
  EXPECT_THROWS(c10::ValueError, folder.path("pipe") + ": must be a regular file",
                read_safetensors(folder.path("pipe")));
  alarm(0);
}

TEST(weights_accept_empty_tensors) {
  const Folder folder;
  const std::string header = "{" + tensor("a", "F32", "[0,3]", 0, 0) + "," +
                             tensor("b", "F32", "[]", 0, 4) + "," +
                             tensor("c", "F32", "[0]", 4, 4) + "}";
  const auto tensors = read_safetensors(folder.write("f", file_of(header, 4)));
  EXPECT_EQUAL(tensors.at("a").numel(), 0);
  EXPECT_EQUAL(tensors.at("c").numel(), 0);
  EXPECT_EQUAL(tensors.at("b").dim(), 0);
}

TEST(weights_truncated_anywhere) {
  const Folder folder;
  const std::string whole = layer_file();
  for (size_t size = 0; size < whole.size(); ++size)
    EXPECT(!reads(folder.write("f", whole.substr(0, size))));
  EXPECT(reads(folder.write("f", whole)));
}

TEST(weights_random_bytes) {
  const Folder folder;
  const std::string whole = layer_file();
  const size_t header_end = whole.size() - 124;
  std::mt19937 random_bits(5);
  int read = 0, loaded = 0;
  for (int i = 0; i < 4000; ++i) {
    std::string bytes = whole;
    const int changes = 1 + static_cast<int>(random_bits() % 4);
    for (int j = 0; j < changes; ++j) {
      char& byte = bytes[random_bits() % (i % 8 == 0 ? whole.size() : header_end)];
      const char likely[] = "0123456789[]{},:\"-e. ";
      byte = i % 2 ? static_cast<char>(byte ^ (1 << random_bits() % 8))
                   : likely[random_bits() % (sizeof(likely) - 1)];
    }
    read += reads(folder.write("layer_0.safetensors", bytes));
    loaded += loads(folder.path());
  }
  EXPECT(read > 0 && read < 4000);
  EXPECT(loaded > 0 && loaded <= read);
}

TEST(weights_fuzz_corpus) {
  int inputs = 0;
  for (const auto& entry : std::filesystem::directory_iterator(FUZZ_CORPUS)) {
    std::ifstream file(entry.path(), std::ios::binary);
    std::stringstream bytes;
    bytes << file.rdbuf();
    const std::string wrong = try_folder(bytes.str());
    if (!wrong.empty())
      check::fail(__FILE__, __LINE__, entry.path().string() + ": an error " + wrong);
    ++inputs;
  }
  EXPECT(inputs >= 10);
}

TEST(weights_random_config) {
  const Folder folder;
  folder.write("layer_0.safetensors", layer_file());
  const std::string whole =
      "model_name: none\nmodel_kind: transcoder_set\nfeature_input_hook: \"mlp.hook_in\"  # "
      "here\nactivation: topk\nk: 3\n"
      "transcoders:\n  - layer_0.safetensors\n";
  std::mt19937 random_bits(6);
  int loaded = 0;
  for (int i = 0; i < 3000; ++i) {
    std::string text = whole;
    for (int j = 1 + static_cast<int>(random_bits() % 3); j > 0; --j)
      text[random_bits() % text.size()] =
          i % 2 ? static_cast<char>(random_bits()) : "\n:-'\"# /.\0k9"[random_bits() % 13];
    if (i % 10 == 0) text.resize(random_bits() % text.size());
    folder.write("config.yaml", text);
    loaded += loads(folder.path());
  }
  EXPECT(loaded > 0 && loaded < 3000);
}

TEST(weights_load_a_set) {
  const Folder folder;
  EXPECT_THROWS(FileNotFound, folder.path("none") + ": there is no such folder",
                load_weights(folder.path("none")));
  EXPECT_THROWS(FileNotFound, "there is no layer_{i}.safetensors in this folder",
                load_weights(folder.path()));
  for (const char* name : {"layer_0.safetensors", "layer_12.safetensors"})
    folder.write(name, layer_file());
  folder.write("layer_x.safetensors", "not read");
  folder.write("config.yaml", "model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\n");
  const auto weights = load_weights(folder.path());
  EXPECT_EQUAL(weights.size(), 2u);
  const LayerWeights& w = weights.at(12);
  EXPECT_EQUAL(w.W_dec.sizes(), at::IntArrayRef({3, 4}));
  EXPECT_EQUAL(w.hook_in, std::string("mlp.hook_in"));
  EXPECT_EQUAL(w.source, folder.path("layer_12.safetensors"));
  EXPECT(!w.k && !w.threshold.defined());
  EXPECT_EQUAL(load_weights(folder.path(), {12}).size(), 1u);
  EXPECT_THROWS(FileNotFound, "there is no file for layer 3", load_weights(folder.path(), {3}));
  folder.write("layer_12.safetensors", "broken");
  EXPECT_EQUAL(load_weights(folder.path(), {0}).size(), 1u);  // the other is not opened
  EXPECT_THROWS(c10::ValueError, folder.path("layer_12.safetensors") + ": ",
                load_weights(folder.path()));
  folder.write("layer_12.safetensors", file_of("{" + tensor("a\\nb", "F32", "[1]", 0, 4) + "," +
                                                   tensor("W_enc", "F32", "[1,1]", 4, 8) + "," +
                                                   tensor("b_enc", "F32", "[1]", 8, 12) + "}",
                                               12));
  EXPECT_THROWS(c10::ValueError, "tensor \"a\\nb\" is not part of this layout",
                load_weights(folder.path()));
  folder.write("layer_12.safetensors", layer_file());
  for (const char* text : {"a: \x1b[31m\n", "a: \xff\n", "a: b\rc\n", "a: \x7f\n"}) {
    folder.write("config.yaml", text);
    EXPECT_THROWS(c10::ValueError,
                  "config.yaml: line 1: must be UTF-8 text without control characters",
                  load_weights(folder.path()));
  }
  folder.write("config.yaml", "a:\tb\t# \xc3\xa9\r\n");
  EXPECT_EQUAL(load_weights(folder.path()).size(), 2u);
  folder.write("config.yaml", std::string(10'000'001, '\n'));
  EXPECT_THROWS(c10::ValueError, "config.yaml: must have at most 10000000 bytes",
                load_weights(folder.path()));
  std::filesystem::remove(folder.path("config.yaml"));
  std::filesystem::create_symlink("config.yaml",
                                  folder.path("config.yaml"));  // what it declares cannot be known
  EXPECT_THROWS(c10::ValueError, "config.yaml: must be a regular file",
                load_weights(folder.path()));
  std::filesystem::remove(folder.path("config.yaml"));
  folder.write("config.yaml",
               "model_kind: transcoder_set\ntranscoders:\n  - ../layer_0.safetensors\n");
  EXPECT_THROWS(c10::ValueError, "transcoders must be files inside this folder",
                load_weights(folder.path()));
}
