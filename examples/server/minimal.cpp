// The features of a text's last token: minimal m.gguf TRANSCODERS TEXT
#include <ggml-backend.h>
#include <llama.h>
#include <sparse_transcoder/engine.h>

#include <cstdio>

std::string place;       // llama.cpp's name for what a layer's MLP reads
std::vector<float> row;  // of the last token

bool on_tensor(ggml_tensor* tensor, bool asks, void*) {
  const bool mine = place == tensor->name;
  if (mine && !asks)  // copied at once: the tensor's memory is used again
    ggml_backend_tensor_get(tensor, row.data(), (tensor->ne[1] - 1) * tensor->nb[1],
                            row.size() * sizeof(float));
  return mine || !asks;
}

int main(int, char** arguments) {
  const sparse_transcoder::Engine engine(sparse_transcoder::load_weights(arguments[2]));
  const int64_t layer = engine.layers().front(), k = engine.ranks(layer);
  place = "ffn_norm-" + std::to_string(layer);
  row.resize(engine.weights(layer).W_enc.size(1));

  llama_model* model = llama_model_load_from_file(arguments[1], llama_model_default_params());
  llama_context_params params = llama_context_default_params();
  params.cb_eval = &on_tensor;
  params.n_threads = params.n_threads_batch = 1;  // more need a pool that does not spin
  llama_context* context = llama_init_from_model(model, params);
  std::string text = arguments[3];
  std::vector<llama_token> tokens(text.size() + 1);
  const int count = llama_tokenize(llama_model_get_vocab(model), text.data(), text.size(),
                                   tokens.data(), tokens.size(), true, false);
  llama_decode(context, llama_batch_get_one(tokens.data(), count));

  std::vector<float> activations(k), sparsity(1);
  std::vector<int64_t> indices(k);
  const sparse_transcoder::LayerRows rows[] = {
      {layer, row.data(), 1, activations.data(), indices.data(), sparsity.data()}};
  engine.encode(rows);  // allocates nothing from the second call on
  for (int64_t rank = 0; rank < k && activations[rank] > 0; ++rank)
    std::printf("%lld %.9g\n", static_cast<long long>(indices[rank]), activations[rank]);
  llama_free(context);
  llama_model_free(model);
}
