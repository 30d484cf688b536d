// The fields of a request, checked: a wrong one is refused by its name.
#pragma once

#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "host.h"

namespace feature_server {

using Json = nlohmann::json;

inline std::string dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace);
}

// Names are snake_case; clients may write camelCase.
class Fields {
 public:
  explicit Fields(const Json& object, std::string path = "")
      : object_(object), path_(std::move(path)) {
    if (!object.is_object()) wrong(path_.empty() ? "body" : path_, "an object", object);
    if (!path_.empty()) path_ += '.';
  }

  const Json* find(const std::string& name) {
    known_.insert(name);
    known_.insert(camel(name));
    for (const std::string& one : {name, camel(name)})
      if (const auto found = object_.find(one); found != object_.end() && !found->is_null())
        return &*found;
    return nullptr;
  }
  const Json& need(const std::string& name) {
    const Json* const found = find(name);
    if (!found) throw Refusal(400, path_ + name + ": is needed");
    return *found;
  }
  std::string text(const std::string& name) {
    const Json& found = need(name);
    if (!found.is_string()) wrong(path_ + name, "a string", found);
    return found.get<std::string>();
  }
  int64_t integer(const std::string& name, int64_t missing, int64_t min, int64_t max) {
    const Json* const found = find(name);
    return found ? integer(path_ + name, *found, min, max) : missing;
  }
  static int64_t integer(const std::string& name, const Json& json, int64_t min, int64_t max) {
    const bool fits = json.is_number_integer() &&
                      !(json.is_number_unsigned() && json.get<uint64_t>() > INT64_MAX);
    if (!fits || json.get<int64_t>() < min || json.get<int64_t>() > max)
      wrong(name, "an integer from " + std::to_string(min) + " to " + std::to_string(max), json);
    return json.get<int64_t>();
  }
  double number(const std::string& name, double missing, double min, double max) {
    const Json* const found = find(name);
    if (!found) return missing;
    const double value = found->is_number() ? found->get<double>() : NAN;
    if (!(value >= min && value <= max))
      wrong(path_ + name, "a number from " + Json(min).dump() + " to " + Json(max).dump(), *found);
    return value;
  }
  bool boolean(const std::string& name, bool missing) {
    const Json* const found = find(name);
    if (found && !found->is_boolean()) wrong(path_ + name, "true or false", *found);
    return found ? found->get<bool>() : missing;
  }
  // Empty where the field is missing.
  const Json& list(const std::string& name, size_t max) {
    static const Json empty = Json::array();
    const Json* const found = find(name);
    if (!found) return empty;
    if (!found->is_array() || found->size() > max)
      wrong(path_ + name, "a list of at most " + std::to_string(max), *found);
    return *found;
  }
  // No field but those that were asked for.
  void refuse_others() const {
    for (const auto& [name, value] : object_.items())
      if (!known_.count(name))
        throw Refusal(400, path_ + name.substr(0, 60) + ": there is no such field");
  }

  [[noreturn]] static void wrong(const std::string& name, const std::string& expected,
                                 const Json& got) {
    std::string text = got.is_structured() ? got.type_name() : dump(got);
    if (text.size() > 60) text = text.substr(0, 57) + "...";
    throw Refusal(400, name + ": must be " + expected + ", got " + text);
  }

 private:
  static std::string camel(const std::string& name) {
    std::string text;
    for (size_t i = 0; i < name.size(); ++i)
      text += name[i] == '_' && i + 1 < name.size()
                  ? static_cast<char>(std::toupper(static_cast<unsigned char>(name[++i])))
                  : name[i];
    return text;
  }

  const Json& object_;
  std::string path_;
  std::set<std::string> known_;
};

// Deep nesting is refused before it is built.
inline Json parse_body(const std::string& body) {
  const auto shallow = [](int depth, Json::parse_event_t, Json&) {
    if (depth > 16) throw Refusal(400, "body: must not be nested deeper than 16");
    return true;
  };
  try {
    return Json::parse(body, shallow);
  } catch (const Json::parse_error& error) {
    throw Refusal(400, "body: must be JSON, which it is not at byte " + std::to_string(error.byte));
  } catch (const Json::exception&) {
    throw Refusal(400, "body: must be JSON, got a number out of range");
  }
}

// Pieces of tokens may end inside a character; this hands out whole ones.
class WholeCharacters {
 public:
  std::string take(const std::string& piece) {
    pending_ += piece;
    size_t whole = pending_.size();
    for (size_t back = 1; back <= std::min<size_t>(3, pending_.size()); ++back) {
      const auto byte = static_cast<unsigned char>(pending_[pending_.size() - back]);
      if (byte < 0x80) break;
      if (byte < 0xC0) continue;  // inside a character
      const size_t length = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : 2;
      if (back < length) whole -= back;
      break;
    }
    std::string text = pending_.substr(0, whole);
    pending_.erase(0, whole);
    return text;
  }
  std::string rest() { return std::exchange(pending_, ""); }

 private:
  std::string pending_;
};

}  // namespace feature_server
