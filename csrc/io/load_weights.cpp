// Loads a circuit-tracer transcoder set: layer_{i}.safetensors + config.yaml.
#include <ATen/ATen.h>
#include <sparse_transcoder/weights.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <set>

#include "check_weights.h"
#include "io/safetensors.h"

namespace sparse_transcoder {
namespace {

namespace fs = std::filesystem;

constexpr int64_t scanned_bytes =
    int64_t{1} << 28;  // matrices checked for NaN at load; the Engine checks every encoder

constexpr uint64_t most_config_bytes = 10'000'000;

[[noreturn]] void not_found(const std::string& message) {
  throw FileNotFound({__func__, __FILE__, __LINE__}, message);
}

// What config.yaml declares. Read is the plain part of YAML that such files are written in: `key:
// value` lines and, under `transcoders:`, `- path` lines. Other keys, with whatever is nested under
// them, are ignored; ours in any other form are refused.
struct Config {
  std::map<std::string, std::string> values;
  std::vector<std::string> transcoders;

  std::string get(const std::string& key) const {
    const auto found = values.find(key);
    return found == values.end() ? "" : found->second;
  }
};

constexpr const char* blanks = " \t";

std::string trim(const std::string& text) {
  const auto first = text.find_first_not_of(blanks);
  return first == std::string::npos ? ""
                                    : text.substr(first, text.find_last_not_of(blanks) - first + 1);
}

// UTF-8 without control characters but tabs: what an error can quote.
bool is_text(const std::string& text) {
  for (const char c : text)
    if ((static_cast<unsigned char>(c) < 0x20 && c != '\t') || c == 0x7f) return false;
  return is_utf8(text);
}

// A plain or quoted scalar without its comment and quotes; false for any other YAML.
bool read_scalar(std::string& text) {
  text = trim(text);
  if (text.empty() || text[0] == '#') {
    text.clear();
    return true;
  }
  if (text[0] == '"' || text[0] == '\'') {
    const auto end = text.find(text[0], 1);
    if (end == std::string::npos) return false;
    const std::string rest = trim(text.substr(end + 1));
    text = text.substr(1, end - 1);
    return text.find('\\') == std::string::npos && (rest.empty() || rest[0] == '#');
  }
  if (std::string("[]{}&*!|>%@`?,").find(text[0]) != std::string::npos) return false;
  text = trim(text.substr(0, std::min(text.find(" #"), text.size())));
  if (text == "null" || text == "~") text.clear();
  return true;
}

Config read_config(const fs::path& path) {
  static const std::set<std::string> ours = {
      "model_kind", "feature_input_hook", "feature_output_hook", "transcoders", "activation", "k"};
  Config config;
  std::error_code error;
  TORCH_CHECK_VALUE(fs::is_regular_file(path, error), path.string(), ": must be a regular file");
  TORCH_CHECK_VALUE(fs::file_size(path, error) <= most_config_bytes, path.string(),
                    ": must have at most ", most_config_bytes, " bytes");
  std::ifstream file(path, std::ios::binary);
  if (!file) not_found(path.string() + ": cannot be opened");
  std::string line, key;
  for (int number = 1; std::getline(file, line); ++number) {
    const std::string where = path.string() + ": line " + std::to_string(number);
    if (number == 1 && line.compare(0, 3, "\xef\xbb\xbf") == 0) line.erase(0, 3);
    if (!line.empty() && line.back() == '\r') line.pop_back();
    TORCH_CHECK_VALUE(is_text(line) && line.size() < 10000, where,
                      ": must be UTF-8 text without control characters, shorter than 10000 bytes");
    const std::string content = trim(line);
    const bool boundary = content == "---" || content == "...";
    if (content.empty() || content[0] == '#' || boundary) {
      TORCH_CHECK_VALUE(!boundary || content == "..." || config.values.empty(), where,
                        ": must be one document, got a second");
      continue;
    }
    const bool item = content.compare(0, 2, "- ") == 0;
    if (item && key == "transcoders") {
      std::string entry = content.substr(2);
      TORCH_CHECK_VALUE(read_scalar(entry), where, ": must be `- path`, got ", quoted(content));
      config.transcoders.push_back(entry);
      continue;
    }
    if (std::string(blanks).find(line[0]) != std::string::npos ||
        item) {  // nested under the last key
      TORCH_CHECK_VALUE(!key.empty() && !ours.count(key), where,
                        ": must be `key: value` or, under transcoders, `- path`, got ",
                        quoted(content));
      continue;
    }
    auto colon = line.find(':');
    while (colon != std::string::npos && colon + 1 < line.size() &&
           std::string(blanks).find(line[colon + 1]) == std::string::npos)
      colon = line.find(':', colon + 1);
    key = line.substr(0, colon);
    TORCH_CHECK_VALUE(colon != std::string::npos && read_scalar(key) && !key.empty() &&
                          std::isalpha(static_cast<unsigned char>(key[0])),
                      where, ": must be `key: value`, got ", quoted(content));
    std::string value = line.substr(colon + 1);
    const bool plain = read_scalar(value);
    TORCH_CHECK_VALUE(plain || !ours.count(key), where, ": ", key, " must be a plain value, got ",
                      quoted(content));
    TORCH_CHECK_VALUE(key != "transcoders" || value.empty(), where,
                      ": transcoders must be a list of `- path` lines, got ", quoted(content));
    TORCH_CHECK_VALUE(config.values.emplace(key, value).second, where, ": ", quoted(key),
                      " is there twice");
  }
  return config;
}

std::optional<int64_t> parse_integer(const std::string& text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() ? std::optional(value)
                                                                  : std::nullopt;
}

// The layer number in a file name like layer_12.safetensors.
std::optional<int64_t> layer_number(const fs::path& path) {
  const std::string name = path.filename().string(), prefix = "layer_", suffix = ".safetensors";
  if (name.size() <= prefix.size() + suffix.size() || name.rfind(prefix, 0) != 0 ||
      path.extension() != suffix)
    return {};
  const auto number =
      parse_integer(name.substr(prefix.size(), name.size() - prefix.size() - suffix.size()));
  return number && *number >= 0 ? number : std::nullopt;
}

// Layer -> file: what config.yaml lists, in order, or every layer_{i}.safetensors.
std::map<int64_t, fs::path> layer_files(const fs::path& dir, const Config& config) {
  std::map<int64_t, fs::path> files;
  for (const std::string& entry : config.transcoders) {
    const fs::path relative(entry);
    const bool inside = !entry.empty() && relative.is_relative() &&
                        entry.find("://") == std::string::npos &&
                        std::find(relative.begin(), relative.end(), "..") == relative.end();
    TORCH_CHECK_VALUE(inside, (dir / "config.yaml").string(),
                      ": transcoders must be files inside this folder, got ", quoted(entry));
    files.emplace(files.size(), dir / relative);
  }
  if (!config.transcoders.empty()) return files;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(dir, error))
    if (const auto number = layer_number(entry.path()))
      TORCH_CHECK_VALUE(files.emplace(*number, entry.path()).second, entry.path().string(),
                        ": layer ", *number, " is there twice");
  if (error) not_found(dir.string() + ": cannot be listed: " + error.message());
  return files;
}

LayerWeights read_layer(int64_t id, const fs::path& path, const Config& config,
                        int64_t& scan_budget) {
  auto tensors = read_safetensors(path.string());
  const auto take = [&tensors](const char* name) {
    const auto node = tensors.extract(name);
    return node.empty() ? at::Tensor() : node.mapped();
  };
  LayerWeights w;
  w.source = path.string();
  const std::string who = describe(id, w);
  w.W_enc = take("W_enc");
  w.b_enc = take("b_enc");
  w.b_dec = take("b_dec");
  w.W_skip = take("W_skip");
  w.threshold = take("activation_function.threshold");
  if (const at::Tensor W_dec = take("W_dec"); W_dec.defined()) {
    TORCH_CHECK_VALUE(W_dec.dim() == 2, who, ": W_dec must be [F, H], got ", W_dec.sizes());
    w.W_dec = W_dec.t();
  }
  if (const at::Tensor k = take("k"); k.defined()) {
    TORCH_CHECK_VALUE(k.numel() == 1 && at::isIntegralType(k.scalar_type(), false), who,
                      ": k must be one integer, got ", c10::getDtypeNames(k.scalar_type()).first,
                      " ", k.sizes());
    w.k = k.item<int64_t>();
  }
  TORCH_CHECK_VALUE(tensors.empty(), who, ": tensor ", quoted(tensors.begin()->first),
                    " is not part of this layout");
  const std::string activation = config.get("activation");
  if (activation == "topk" && !w.k) {
    w.k = parse_integer(config.get("k"));
    TORCH_CHECK_VALUE(w.k, who, ": activation topk needs an integer k in config.yaml, got ",
                      quoted(config.get("k")));
  }
  TORCH_CHECK_VALUE(activation != "jumprelu" || w.threshold.defined(), who,
                    ": activation jumprelu needs activation_function.threshold, got none");
  w.hook_in = config.get("feature_input_hook");
  w.hook_out = config.get("feature_output_hook");

  check_weights(id, w);
  for (const auto& [matrix, name] :
       {std::pair(&w.W_enc, "W_enc"), {&w.W_dec, "W_dec"}, {&w.W_skip, "W_skip"}}) {
    if (!matrix->defined()) continue;
    scan_budget -= matrix->nbytes();
    if (scan_budget < 0) break;
    // A float32 sum is many times faster than a float64 one, and overflows only where entries are
    // huge: then float64 decides.
    const bool finite = std::isfinite(at::sum(*matrix, at::kFloat).item<double>()) ||
                        std::isfinite(at::sum(*matrix, at::kDouble).item<double>());
    TORCH_CHECK_VALUE(finite, who, ": ", name, " must be finite, got NaN or Inf");
  }
  return w;
}

void move_to(LayerWeights& w, at::Device device, const std::string& who) {
  for (at::Tensor* tensor : {&w.W_enc, &w.b_enc, &w.W_dec, &w.b_dec, &w.threshold, &w.W_skip}) {
    if (!tensor->defined()) continue;
    try {
      *tensor = tensor->to(device);
    } catch (const c10::OutOfMemoryError&) {
      TORCH_CHECK_WITH(OutOfMemoryError, false, who, ": out of memory: a tensor needs ",
                       tensor->nbytes(), " bytes on ", device,
                       "; load on cpu and encode with device_weight_bytes");
    }
  }
}

}  // namespace

std::map<int64_t, LayerWeights> load_weights(const std::string& dir, std::vector<int64_t> layers,
                                             at::Device device) {
  std::error_code error;
  if (!fs::is_directory(dir, error)) not_found(dir + ": there is no such folder");
  const fs::path config_path = fs::path(dir) / "config.yaml";
  const bool there = fs::symlink_status(config_path, error).type() !=
                     fs::file_type::not_found;  // also as a broken link
  const Config config = there ? read_config(config_path) : Config();
  const std::string kind = config.get("model_kind"), activation = config.get("activation");
  TORCH_CHECK_VALUE(kind.empty() || kind == "transcoder_set", config_path.string(),
                    ": model_kind must be transcoder_set, got ", quoted(kind));
  const std::set<std::string> known = {"", "relu", "jumprelu", "topk"};
  TORCH_CHECK_VALUE(known.count(activation), config_path.string(),
                    ": activation must be relu, jumprelu or topk, got ", quoted(activation));

  const auto files = layer_files(dir, config);
  if (files.empty()) not_found(dir + ": there is no layer_{i}.safetensors in this folder");
  if (layers.empty())
    for (const auto& [id, path] : files) layers.push_back(id);
  std::map<int64_t, LayerWeights> weights;
  int64_t scan_budget = scanned_bytes;
  for (const int64_t id : layers) {
    const auto file = files.find(id);
    if (file == files.end()) not_found(dir + ": there is no file for layer " + std::to_string(id));
    if (weights.count(id)) continue;
    LayerWeights& w = weights[id] = read_layer(id, file->second, config, scan_budget);
    if (!device.is_cpu()) move_to(w, device, describe(id, w));
  }
  return weights;
}

}  // namespace sparse_transcoder
