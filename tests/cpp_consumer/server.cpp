// Loads a transcoder set, encodes on one engine from four threads, and prints each token's
// strongest features.
#include <ATen/ops/from_blob.h>
#include <sparse_transcoder/engine.h>

#include <cstdio>
#include <thread>
#include <vector>

using namespace sparse_transcoder;

int main(int count, char** arguments) try {
  if (count != 2) return std::fprintf(stderr, "usage: server <transcoder folder>\n"), 2;
  const Engine engine(load_weights(arguments[1]),
                      {.top_k = 5, .activation_threshold = 0.5f});  // memory-mapped

  // Hidden states [T, H] of each layer, in the caller's own memory.
  constexpr int64_t tokens = 6;
  std::map<int64_t, std::vector<float>> states;
  std::map<int64_t, at::Tensor> hidden;
  for (const int64_t layer : engine.layers()) {
    const int64_t size = engine.weights(layer).W_enc.size(1);
    std::vector<float>& state = states[layer];
    for (int64_t i = 0; i < tokens * size; ++i)
      state.push_back(static_cast<float>(i * 37 % 101 - 50) / 16);
    hidden[layer] = at::from_blob(state.data(), {tokens, size});
  }

  // All layers at once, from as many threads as you like: the same bits in each.
  std::map<int64_t, Features> results[4];
  std::vector<std::thread> threads;
  for (auto& result : results) threads.emplace_back([&] { result = engine.encode(hidden); });
  for (std::thread& thread : threads) thread.join();

  for (const auto& [layer, features] : results[0]) {
    for (const auto& other : results)
      if (!other.at(layer).activations.equal(features.activations) ||
          !other.at(layer).indices.equal(features.indices) ||
          !other.at(layer).sparsity.equal(features.sparsity))
        return std::fprintf(stderr, "layer %ld: threads disagree\n", static_cast<long>(layer)), 1;
    const float *value = features.activations.const_data_ptr<float>(),
                *sparsity = features.sparsity.const_data_ptr<float>();
    const int64_t* index = features.indices.const_data_ptr<int64_t>();
    for (int64_t token = 0; token < tokens; ++token) {
      std::printf("layer %ld, token %ld, active %.9g:", static_cast<long>(layer),
                  static_cast<long>(token), sparsity[token]);
      for (int64_t i = 0; i < features.indices.size(1); ++i, ++index, ++value)
        std::printf(" %ld=%.9g", static_cast<long>(*index), *value);
      std::printf("\n");
    }
  }
} catch (const c10::Error& error) {
  return std::fprintf(stderr, "%s\n", error.what_without_backtrace()), 1;
}
