// What transcoders read in a model's graph, and what is added to it: llama.cpp shows every tensor
// that was computed, and the tap copies or changes the rows of some.
#pragma once

#include <ggml.h>

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

namespace feature_server {

// The graph's names for the places of one layer: "ffn_norm-5".
struct Place {
  std::string read;   // the hook that the transcoder reads
  std::string write;  // where a decoder's direction is added; empty where that cannot be exact
};

// The place of a layer's hooks, "mlp.hook_in" for one, in graphs of this architecture. Throws
// std::invalid_argument, with the names that there are, where the graph does not show the hook.
Place find_place(const std::string& architecture, int64_t layer, const std::string& hook_in,
                 const std::string& hook_out);

class Tap {
 public:
  // Adds delta [width] to rows [first, first + count) of the batch, after the layer.
  struct Change {
    int64_t layer, first, count;
    const float* delta;
  };

  Tap(const std::map<int64_t, Place>& places, int64_t width, int64_t max_rows);

  // Says what the next batch is wanted for. has_output: by row; the graph's last layer has these
  // rows alone.
  void begin(std::vector<bool> has_output);
  void read(int64_t layer) { layers_.at(layer).wanted = true; }
  void change(const Change& change) { changes_.push_back(change); }

  // [rows of the batch, width] of a layer that was read. Rows that the graph did not have are
  // those of an earlier batch. Throws std::runtime_error where the graph had something else.
  const float* rows(int64_t layer) const;

  // llama_context_params.cb_eval, with the Tap as its data.
  static bool on_tensor(ggml_tensor* tensor, bool asks, void* tap);

 private:
  struct Layer {
    std::vector<float> rows;
    bool wanted = false, seen = false;
  };
  struct Here {
    int64_t layer;
    bool reads, writes;
  };
  bool wants(const Here& here) const;
  void take(ggml_tensor* tensor, const Here& here);
  // The row of the tensor that holds this row of the batch, -1 where none does.
  int64_t row_of(const ggml_tensor* tensor, int64_t row) const;

  const int64_t width_;
  std::map<int64_t, Layer> layers_;
  std::unordered_map<std::string, Here> names_;
  std::vector<Change> changes_;
  std::vector<int64_t> output_rows_;
  std::vector<float> row_;
  std::string fault_;
};

}  // namespace feature_server
