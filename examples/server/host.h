// What runs the model: one thread owns llama.cpp's contexts, reads tokens of all requests in one
// batch, encodes the rows of that batch in one call, and hands each token's features to its job.
#pragma once

#include <llama.h>
#include <sparse_transcoder/engine.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <random>
#include <stdexcept>
#include <thread>

#include "tap.h"

namespace feature_server {

struct Options {
  std::string model, transcoders, host = "127.0.0.1", dump;
  int64_t port = 5002, threads = 1, sequences = 8, queue = 16, context = 4096, top_k = 32,
          drain = 30;
  double threshold = 1;
  std::vector<int64_t> layers;
};

// What a client is told: an HTTP status and one line.
struct Refusal : std::runtime_error {
  Refusal(int status, const std::string& line) : std::runtime_error(line), status(status) {}
  int status;
};

struct Feature {
  int64_t index;
  float value;
};

// What reading one token gave.
struct Step {
  int64_t position;
  llama_token token;
  llama_token next = LLAMA_TOKEN_NULL;         // sampled after it
  std::vector<std::vector<Feature>> features;  // one list for each layer of the job
};

struct Steer {
  int64_t layer, feature;
  float strength;
};

// One request for the model. Its maker fills in the first part; the rest is the host's.
struct Job {
  std::vector<llama_token> tokens;  // the prompt; what is sampled is appended
  int64_t max_tokens = 0;           // to sample; 0 reads the prompt alone
  double temperature = 0, frequency_penalty = 0;
  uint32_t seed = 0;
  bool exact = false;           // in a context of its own: no neighbour can change a bit
  bool prompt_steps = false;    // a step for every token of the prompt, not the last alone
  bool reads_last = false;      // the last sampled token is read, too, for its features
  bool every_feature = false;   // all that are kept, by index; otherwise the top_k, strongest first
  std::vector<int64_t> layers;  // to encode
  int64_t top_k = 0;
  std::vector<Steer> steer;
  std::chrono::steady_clock::time_point deadline = std::chrono::steady_clock::time_point::max();
  std::string name;  // of its files with --dump

  int64_t prompt_count = 0, read_count = 0, sampled_count = 0;
  std::map<int64_t, std::vector<float>> deltas;  // by layer
  std::unique_ptr<llama_sampler, decltype(&llama_sampler_free)> sampler{nullptr,
                                                                        llama_sampler_free};
  std::deque<Step> steps;  // that nobody has taken yet
  bool cancelled = false, ended = false;
  std::string finish = "length";  // or "stop"
  std::optional<Refusal> refusal;
  std::condition_variable ready;
};
using JobPtr = std::shared_ptr<Job>;

struct Stats {
  std::map<int64_t, int64_t> encoded_rows, active_features;
  double prepare_ms = 0, screen_ms = 0, rescreen_ms = 0, compute_ms = 0, finish_ms = 0;
  double encode_s = 0, decode_s = 0;
  int64_t encode_calls = 0, decode_calls = 0, rejected = 0, cancelled = 0, generated = 0;
  int64_t waiting = 0, running = 0;
};

class Host {
 public:
  // Loads all, and proves that the model's rows are those of the right sequence. Throws
  // std::exception with one line.
  explicit Host(const Options& options);
  ~Host();

  // The tokens of a text. Throws Refusal.
  std::vector<llama_token> tokenize(const std::string& text, bool add_bos) const;
  std::string piece(llama_token token) const;
  bool is_special(llama_token token) const;
  bool adds_bos() const { return llama_vocab_get_add_bos(vocab_); }
  const llama_vocab* vocab() const { return vocab_; }

  // All of them or none. Throws Refusal: 503 where the queue is full or the server drains, 400
  // where a job can never run.
  void submit(const std::vector<JobPtr>& jobs);
  // Takes the job's next step, or waits for it a moment. False: there is none yet, or job.ended was
  // set and there will be none. Throws the job's Refusal once its steps are taken.
  bool next(const JobPtr& job, Step& step, bool& ended);
  // Its client has left.
  void cancel(const JobPtr& job);
  // No new jobs from now on.
  void drain();
  bool draining() const { return draining_; }
  // Ends every job with a refusal.
  void end_all(const std::string& line);

  Stats stats() const;
  const sparse_transcoder::Engine& engine() const { return *engine_; }
  const Options& options() const { return options_; }
  bool steers(int64_t layer) const { return !places_.at(layer).write.empty(); }
  const std::string& name() const { return name_; }
  const std::string& set() const { return set_; }
  std::string architecture() const { return architecture_; }

 private:
  struct Slot {
    JobPtr job;
    llama_seq_id sequence;
  };
  // A context of llama.cpp and the jobs in its sequences.
  struct Context {
    std::unique_ptr<llama_context, decltype(&llama_free)> llama{nullptr, llama_free};
    std::vector<Slot> slots;
    int64_t free_cells = 0;  // of the cache, for tokens
    bool exact = false;
    size_t first = 0;  // the slot that is served first, in turn
  };
  // Tokens of one job in a batch: rows [first, first + count). The last of them give steps, and
  // nobody wants the features of the others.
  struct Part {
    Slot* slot;
    int64_t first, count, steps;
    bool samples;
  };

  void open(Context& context, int64_t sequences);
  void prove_row_order();
  void run();
  void admit();
  void end(Context& context, Slot& slot);
  void refuse(const JobPtr& job, int status, const std::string& line);
  void drop_dead_jobs();
  std::vector<Part> plan(Context& context);
  bool step(Context& context, std::unique_lock<std::mutex>& lock);
  void decode(Context& context, const std::vector<Part>& parts);
  void encode(const std::vector<Part>& parts, std::vector<std::vector<Step>>& steps);
  void sample(Context& context, const Part& part, Step& last);
  void dump(const Job& job, const Part& part) const;
  static int64_t step_count(const Job& job, int64_t position, int64_t count);

  const Options options_;
  std::map<int64_t, Place> places_;
  std::unique_ptr<llama_model, decltype(&llama_model_free)> model_{nullptr, llama_model_free};
  const llama_vocab* vocab_ = nullptr;
  std::string name_, set_, architecture_;
  int64_t width_ = 0;
  std::unique_ptr<const sparse_transcoder::Engine> engine_;
  std::unique_ptr<Tap> tap_;
  std::unique_ptr<ggml_threadpool, void (*)(ggml_threadpool*)> pool_;
  Context shared_, exact_;
  llama_batch batch_ = {};

  // Results of a batch, by layer.
  struct Results {
    std::vector<float> activations, sparsity;
    std::vector<int64_t> indices, active;
    std::map<int64_t, sparse_transcoder::SparseFeatures> every;  // by first row of a part
  };
  std::map<int64_t, Results> results_;

  mutable std::mutex mutex_;  // guards what follows, and the host's part of every job
  std::condition_variable work_;
  std::deque<JobPtr> waiting_;
  Stats stats_;
  bool stop_ = false;
  std::atomic<bool> draining_{false};
  std::thread thread_;
};

}  // namespace feature_server
