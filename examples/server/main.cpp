// feature_server: a language model, the features of its tokens, and HTTP, in one process.
#include <pthread.h>
#include <signal.h>

#include <charconv>
#include <cstdio>
#include <filesystem>
#include <functional>
#include <sstream>

#include "http.h"

using namespace feature_server;

namespace {

constexpr const char* usage =
    "usage: feature_server --model m.gguf --transcoders DIR [--host 127.0.0.1] [--port 5002]\n"
    "       [--threads n] [--sequences 8] [--queue 16] [--context 4096] [--layers 5,10]\n"
    "       [--top-k 32] [--threshold 1.0] [--drain 30] [--dump DIR]\n";

template <typename T>
T number(const std::string& name, const std::string& text, T min, T max) {
  T value = {};
  const char* const end = text.data() + text.size();
  const auto [last, error] = std::from_chars(text.data(), end, value);
  if (error != std::errc() || last != end || !(value >= min && value <= max)) {
    std::ostringstream line;
    line << name << " must be a number from " << min << " to " << max << ", got " << text;
    throw std::invalid_argument(line.str());
  }
  return value;
}

Options parse(int count, char** arguments) {
  Options options;
  options.threads = std::max<int64_t>(1, std::thread::hardware_concurrency() / 2);
  const auto integer = [](int64_t& field, int64_t min, int64_t max) {
    return [&field, min, max](const std::string& name, const std::string& text) {
      field = number<int64_t>(name, text, min, max);
    };
  };
  const auto text = [](std::string& field) {
    return [&field](const std::string&, const std::string& value) { field = value; };
  };
  const std::map<std::string, std::function<void(const std::string&, const std::string&)>> known = {
      {"--model", text(options.model)},
      {"--transcoders", text(options.transcoders)},
      {"--host", text(options.host)},
      {"--dump", text(options.dump)},
      {"--port", integer(options.port, 0, 65535)},
      {"--threads", integer(options.threads, 1, 256)},
      {"--sequences", integer(options.sequences, 1, 256)},
      {"--queue", integer(options.queue, 0, 4096)},
      {"--context", integer(options.context, 256, 1 << 20)},
      {"--top-k", integer(options.top_k, 1, 4096)},
      {"--drain", integer(options.drain, 0, 3600)},
      {"--threshold",
       [&](const std::string& name, const std::string& value) {
         options.threshold = number<double>(name, value, 0, 1e30);
       }},
      {"--layers",
       [&](const std::string& name, const std::string& value) {
         std::istringstream list(value);
         for (std::string one; std::getline(list, one, ',');)
           options.layers.push_back(number<int64_t>(name, one, 0, 4096));
       }},
  };
  for (int i = 1; i < count; i += 2) {
    const std::string name = arguments[i];
    const auto found = known.find(name);
    if (found == known.end()) throw std::invalid_argument("there is no option " + name);
    if (i + 1 == count) throw std::invalid_argument(name + " needs a value");
    found->second(name, arguments[i + 1]);
  }
  if (options.model.empty() || options.transcoders.empty())
    throw std::invalid_argument("--model and --transcoders are needed");
  if (!options.dump.empty() && !std::filesystem::is_directory(options.dump))
    throw std::invalid_argument("--dump must be a folder, got " + options.dump);
  return options;
}

int serve(const Options& options) {
  // Before any thread starts, so that none is interrupted: one thread waits for these.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);

  Host host(options);
  Http http(host);
  const int port = http.bind();
  std::printf("listening on http://%s:%d\n", options.host.c_str(), port);
  std::fflush(stdout);
  std::thread stopper([&] {
    int signal = 0;
    sigwait(&signals, &signal);
    const int64_t cut = http.drain();
    if (cut > 0) {
      std::fprintf(stderr, "%lld responses were cut after --drain %lld seconds\n",
                   static_cast<long long>(cut), static_cast<long long>(options.drain));
      std::_Exit(1);  // a client that never reads holds its thread
    }
    http.stop();
  });
  http.serve();
  stopper.join();
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  Options options;
  try {
    options = parse(count, arguments);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n%s", error.what(), usage);
    return 2;
  }
  try {
    return serve(options);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "%s\n", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return 1;
}
