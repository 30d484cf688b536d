#include "host.h"

#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <ggml-cpu.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>

namespace feature_server {
namespace {

using sparse_transcoder::Engine;
using sparse_transcoder::LayerRows;
using Clock = std::chrono::steady_clock;

// Rows of one batch: of all requests, generated tokens first.
constexpr int64_t max_rows = 512;
// Steps that wait for a slow reader before its sequence is parked.
constexpr int64_t max_steps = 512;
// Larger additions could leave the range of float16, which the cache may be stored in.
constexpr double max_delta = 1e6;
constexpr auto moment = std::chrono::milliseconds(100);

double seconds(Clock::time_point from) {
  return std::chrono::duration<double>(Clock::now() - from).count();
}

std::string meta(const llama_model* model, const char* key) {
  char text[256] = "";
  return llama_model_meta_val_str(model, key, text, sizeof(text)) < 0 ? "" : text;
}

void log_errors(ggml_log_level level, const char* text, void*) {
  if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

}  // namespace

Host::Host(const Options& options) : options_(options), pool_(nullptr, ggml_threadpool_free) {
  // The engine has threads of its own; those of torch would spin.
  at::set_num_threads(1);
  auto weights = sparse_transcoder::load_weights(options.transcoders, options.layers);
  llama_log_set(log_errors, nullptr);
  llama_backend_init();
  llama_model_params model = llama_model_default_params();
  model.n_gpu_layers = 0;
  if (!std::filesystem::exists(options.model))
    throw std::runtime_error(options.model + ": there is no such file");
  model_.reset(llama_model_load_from_file(options.model.c_str(), model));
  if (!model_) throw std::runtime_error(options.model + ": llama.cpp cannot load this model");
  vocab_ = llama_model_get_vocab(model_.get());
  width_ = llama_model_n_embd(model_.get());
  architecture_ = meta(model_.get(), "general.architecture");
  name_ = meta(model_.get(), "general.name");
  if (name_.empty()) name_ = std::filesystem::path(options.model).stem();
  set_ = std::filesystem::canonical(options.transcoders).filename();

  for (const auto& [layer, declared] : weights) {
    const std::string who = "layer " + std::to_string(layer);
    if (layer < 0 || layer >= llama_model_n_layer(model_.get()))
      throw std::invalid_argument(who + ": the model has " +
                                  std::to_string(llama_model_n_layer(model_.get())) + " layers");
    if (declared.W_enc.size(1) != width_)
      throw std::invalid_argument(who + ": the transcoder must read " + std::to_string(width_) +
                                  " numbers, as wide as the model, got " +
                                  std::to_string(declared.W_enc.size(1)));
    places_[layer] = find_place(architecture_, layer, declared.hook_in, declared.hook_out);
    const bool one_layer = declared.W_dec.defined() && declared.W_dec.size(0) == width_;
    if (!one_layer) places_[layer].write.clear();
  }
  engine_ = std::make_unique<const Engine>(
      std::move(weights),
      sparse_transcoder::Options{.top_k = options.top_k,
                                 .activation_threshold = static_cast<float>(options.threshold),
                                 .chunk_size = max_rows,
                                 .lanes = options.threads});
  for (const int64_t layer : engine_->layers()) {
    const int64_t numbers = max_rows * engine_->ranks(layer);
    results_[layer] = {std::vector<float>(numbers),
                       std::vector<float>(max_rows),
                       std::vector<int64_t>(numbers),
                       std::vector<int64_t>(max_rows),
                       {}};
  }
  tap_ = std::make_unique<Tap>(places_, width_, max_rows);
  // One pool that sleeps between batches: ggml's own would spin, or start threads in every batch.
  ggml_threadpool_params pool = ggml_threadpool_params_default(static_cast<int>(options.threads));
  pool.poll = 0;
  pool_.reset(ggml_threadpool_new(&pool));
  batch_ = llama_batch_init(max_rows, 0, 1);
  open(shared_, std::max<int64_t>(options.sequences, 2));  // two, for the proof
  prove_row_order();
  for (int64_t i = 0; i < options.sequences; ++i)
    shared_.slots.push_back({nullptr, static_cast<llama_seq_id>(i)});
  exact_.exact = true;  // opened when the first exact job comes
  exact_.slots.push_back({nullptr, 0});
  shared_.free_cells = exact_.free_cells = options.context;
  thread_ = std::thread([this] { run(); });
}

Host::~Host() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  thread_.join();
  llama_batch_free(batch_);
}

void Host::open(Context& context, int64_t sequences) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<uint32_t>(options_.context);
  // One batch is one pass of the graph.
  params.n_batch = params.n_ubatch = max_rows;
  params.n_seq_max = static_cast<uint32_t>(sequences);
  params.n_threads = params.n_threads_batch = static_cast<int32_t>(options_.threads);
  params.kv_unified = true;  // otherwise rows of sequences change places
  // A float32 model gives float32 rows, which a cache in float16 and flash attention would spoil.
  if (llama_model_ftype(model_.get()) == LLAMA_FTYPE_ALL_F32) {
    params.type_k = params.type_v = GGML_TYPE_F32;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  }
  params.cb_eval = &Tap::on_tensor;
  params.cb_eval_user_data = tap_.get();
  context.llama.reset(llama_init_from_model(model_.get(), params));
  if (!context.llama) throw std::runtime_error("llama.cpp cannot make a context for this model");
  llama_attach_threadpool(context.llama.get(), pool_.get(), pool_.get());
}

// Two prompts in one batch, token by token in turn, must give the rows that each gives alone: the
// nearest row of all must be its own. Arithmetic differs by batch, so equality is too much to ask.
void Host::prove_row_order() {
  const std::vector<llama_token> texts[] = {tokenize("Rain fell on the old harbour", false),
                                            tokenize("def add(a, b): return a + b", false)};
  const int64_t layer = engine_->layers().front();
  const auto length = static_cast<int64_t>(std::min(texts[0].size(), texts[1].size()));
  const auto rows_of = [&](std::initializer_list<int> sequences) {
    llama_memory_clear(llama_get_memory(shared_.llama.get()), true);
    batch_.n_tokens = 0;
    for (int64_t position = 0; position < length; ++position)
      for (const int sequence : sequences) {
        const int row = batch_.n_tokens++;
        batch_.token[row] = texts[sequence][position];
        batch_.pos[row] = static_cast<llama_pos>(position);
        batch_.n_seq_id[row] = 1;
        batch_.seq_id[row][0] = sequence;
        batch_.logits[row] = 1;
      }
    tap_->begin(std::vector<bool>(batch_.n_tokens, true));
    tap_->read(layer);
    if (llama_decode(shared_.llama.get(), batch_) != 0)
      throw std::runtime_error("llama.cpp cannot read two short texts");
    const float* rows = tap_->rows(layer);
    return std::vector<float>(rows, rows + batch_.n_tokens * width_);
  };
  const std::vector<float> together = rows_of({0, 1}), alone[] = {rows_of({0}), rows_of({1})};
  for (int64_t row = 0; row < 2 * length; ++row) {
    double nearest = std::numeric_limits<double>::infinity();
    int64_t found = -1;
    for (int64_t other = 0; other < 2 * length; ++other) {
      double distance = 0;
      for (int64_t i = 0; i < width_; ++i)
        distance += std::pow(
            double{together[row * width_ + i]} - alone[other % 2][other / 2 * width_ + i], 2);
      if (distance < nearest) {
        nearest = distance;
        found = other;
      }
    }
    if (found != row)
      throw std::runtime_error("this llama.cpp gives rows of one sequence to another: row " +
                               std::to_string(row) + " of two texts is row " +
                               std::to_string(found));
  }
  llama_memory_clear(llama_get_memory(shared_.llama.get()), true);
}

std::vector<llama_token> Host::tokenize(const std::string& text, bool add_bos) const {
  const auto size = static_cast<int32_t>(text.size());
  std::vector<llama_token> tokens(text.size() + 2);
  const int32_t count = llama_tokenize(vocab_, text.data(), size, tokens.data(),
                                       static_cast<int32_t>(tokens.size()), add_bos, false);
  if (count < 0) throw Refusal(400, "prompt: the tokenizer cannot read it");
  tokens.resize(count);
  return tokens;
}

std::string Host::piece(llama_token token) const {
  std::string text(64, '\0');
  int32_t size = llama_token_to_piece(vocab_, token, text.data(), 64, 0, true);
  if (size < 0) {
    text.resize(-size);
    size = llama_token_to_piece(vocab_, token, text.data(), -size, 0, true);
  }
  text.resize(std::max(size, 0));
  return text;
}

bool Host::is_special(llama_token token) const {
  return llama_vocab_is_control(vocab_, token) || llama_vocab_is_eog(vocab_, token);
}

void Host::submit(const std::vector<JobPtr>& jobs) {
  for (const JobPtr& job : jobs) {
    job->prompt_count = static_cast<int64_t>(job->tokens.size());
    if (job->prompt_count == 0)
      throw Refusal(400, "prompt: must have at least one token, got none");
    if (job->prompt_count + job->max_tokens > options_.context)
      throw Refusal(400, "prompt: its " + std::to_string(job->prompt_count) + " tokens and " +
                             std::to_string(job->max_tokens) +
                             " new ones must fit in the context of " +
                             std::to_string(options_.context));
    for (const Steer& steer : job->steer) {
      std::vector<float>& delta = job->deltas[steer.layer];
      delta.resize(width_);
      const std::vector<float> direction = engine_->decoder_direction(steer.layer, steer.feature);
      for (int64_t i = 0; i < width_; ++i) delta[i] += steer.strength * direction[i];
    }
    for (const auto& [layer, delta] : job->deltas)
      for (const float one : delta)
        if (!(std::abs(one) <= max_delta))
          throw Refusal(400, "steer: the sum of layer " + std::to_string(layer) +
                                 " must stay within 1e6, strength times decoder direction");
    job->sampler.reset(llama_sampler_chain_init(llama_sampler_chain_default_params()));
    const auto add = [&](llama_sampler* one) { llama_sampler_chain_add(job->sampler.get(), one); };
    if (job->frequency_penalty != 0)
      add(llama_sampler_init_penalties(llama_vocab_n_tokens(vocab_), 256, 1.0f,
                                       static_cast<float>(job->frequency_penalty), 0.0f));
    if (job->temperature > 0) {
      add(llama_sampler_init_temp(static_cast<float>(job->temperature)));
      add(llama_sampler_init_dist(job->seed));
    } else {
      add(llama_sampler_init_greedy());
    }
  }
  const std::lock_guard lock(mutex_);
  if (draining_) throw Refusal(503, "the server is shutting down");
  if (stats_.running + stats_.waiting + static_cast<int64_t>(jobs.size()) >
      options_.sequences + options_.queue) {
    ++stats_.rejected;
    throw Refusal(503, "the queue is full");
  }
  for (const JobPtr& job : jobs) waiting_.push_back(job);
  stats_.waiting += static_cast<int64_t>(jobs.size());
  work_.notify_all();
}

bool Host::next(const JobPtr& job, Step& step, bool& ended) {
  std::unique_lock lock(mutex_);
  job->ready.wait_for(lock, moment, [&] { return !job->steps.empty() || job->ended; });
  ended = false;
  if (!job->steps.empty()) {
    step = std::move(job->steps.front());
    job->steps.pop_front();
    work_.notify_all();
    return true;
  }
  if (job->ended && job->refusal) throw *job->refusal;
  ended = job->ended;
  return false;
}

void Host::cancel(const JobPtr& job) {
  const std::lock_guard lock(mutex_);
  if (job->ended || job->cancelled) return;
  job->cancelled = true;
  ++stats_.cancelled;
  work_.notify_all();
}

void Host::drain() {
  const std::lock_guard lock(mutex_);
  draining_ = true;
}

void Host::end_all(const std::string& line) {
  const std::lock_guard lock(mutex_);
  for (const Context* context : {&shared_, &exact_})
    for (const Slot& slot : context->slots)
      if (slot.job) refuse(slot.job, 503, line);
  for (const JobPtr& job : waiting_) refuse(job, 503, line);
  work_.notify_all();
}

Stats Host::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

void Host::run() {
  std::unique_lock lock(mutex_);
  while (!stop_) {
    drop_dead_jobs();
    admit();
    const bool shared = step(shared_, lock), exact = step(exact_, lock);
    if (!shared && !exact && !stop_) work_.wait_for(lock, moment);
  }
}

// First come, first served; a job that no cache has cells for stops those behind it of its kind.
void Host::admit() {
  bool stopped[2] = {false, false};
  for (auto waiting = waiting_.begin(); waiting != waiting_.end();) {
    const JobPtr job = *waiting;
    Context& context = job->exact ? exact_ : shared_;
    const int64_t cells = job->prompt_count + job->max_tokens;
    const auto slot = std::find_if(context.slots.begin(), context.slots.end(),
                                   [](const Slot& one) { return !one.job; });
    if (stopped[job->exact] || slot == context.slots.end() || cells > context.free_cells) {
      stopped[job->exact] = true;
      ++waiting;
      continue;
    }
    waiting = waiting_.erase(waiting);
    --stats_.waiting;
    ++stats_.running;
    context.free_cells -= cells;
    slot->job = job;
  }
}

void Host::refuse(const JobPtr& job, int status, const std::string& line) {
  if (!job->refusal) job->refusal.emplace(status, line);
}

void Host::end(Context& context, Slot& slot) {
  context.free_cells += slot.job->prompt_count + slot.job->max_tokens;
  if (context.llama)
    llama_memory_seq_rm(llama_get_memory(context.llama.get()), slot.sequence, -1, -1);
  slot.job->ended = true;
  slot.job->ready.notify_all();
  slot.job = nullptr;
  --stats_.running;
}

void Host::drop_dead_jobs() {
  const auto now = Clock::now();
  const auto is_dead = [&](const JobPtr& job) {
    if (now >= job->deadline) refuse(job, 504, "deadline: the request's time is over");
    return job->cancelled || job->refusal;
  };
  for (Context* context : {&shared_, &exact_})
    for (Slot& slot : context->slots)
      if (slot.job && is_dead(slot.job)) end(*context, slot);
  for (auto waiting = waiting_.begin(); waiting != waiting_.end();) {
    if (!is_dead(*waiting)) {
      ++waiting;
      continue;
    }
    (*waiting)->ended = true;
    (*waiting)->ready.notify_all();
    --stats_.waiting;
    waiting = waiting_.erase(waiting);
  }
}

// Steps that reading tokens [position, position + count) gives.
int64_t Host::step_count(const Job& job, int64_t position, int64_t count) {
  const int64_t first = job.prompt_steps ? 0 : job.prompt_count - 1;
  return std::max<int64_t>(0, position + count - std::max(position, first));
}

// What the next batch reads: the one new token of every sequence first, then prompts. A job whose
// reader is behind is left out.
std::vector<Host::Part> Host::plan(Context& context) {
  std::vector<Part> parts;
  int64_t rows = 0;
  for (const bool prompts : {false, true})
    for (size_t i = 0; i < context.slots.size(); ++i) {
      Slot& slot = context.slots[(context.first + i) % context.slots.size()];
      if (!slot.job || prompts != (slot.job->read_count < slot.job->prompt_count)) continue;
      const Job& job = *slot.job;
      const auto left = static_cast<int64_t>(job.tokens.size()) - job.read_count;
      const int64_t room = max_steps - static_cast<int64_t>(job.steps.size());
      int64_t count = std::min(left, max_rows - rows);
      // An exact job's pieces of a prompt must not depend on how fast its reader is.
      if (step_count(job, job.read_count, count) > room) {
        if (context.exact || !job.prompt_steps) continue;
        count = room;
      }
      if (count == 0) continue;
      const bool last = job.read_count + count == static_cast<int64_t>(job.tokens.size());
      parts.push_back({&slot, rows, count, step_count(job, job.read_count, count),
                       last && job.sampled_count < job.max_tokens});
      rows += count;
    }
  context.first = (context.first + 1) % context.slots.size();
  return parts;
}

bool Host::step(Context& context, std::unique_lock<std::mutex>& lock) {
  const std::vector<Part> parts = plan(context);
  if (parts.empty()) return false;
  lock.unlock();
  std::vector<std::vector<Step>> steps(parts.size());
  std::string fault;
  try {
    decode(context, parts);
    encode(parts, steps);
    for (size_t i = 0; i < parts.size(); ++i)
      if (parts[i].samples) sample(context, parts[i], steps[i].back());
  } catch (const c10::Error& error) {
    fault = error.what_without_backtrace();
  } catch (const std::exception& error) {
    fault = error.what();
  }
  lock.lock();
  if (!fault.empty()) {
    // What is in the cache cannot be trusted, so every job of the context ends with its next look.
    for (const Slot& slot : context.slots)
      if (slot.job) refuse(slot.job, 500, fault);
    if (context.llama) llama_memory_clear(llama_get_memory(context.llama.get()), true);
    return true;
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    Job& job = *parts[i].slot->job;
    job.read_count += parts[i].count;
    for (Step& one : steps[i]) job.steps.push_back(std::move(one));
    job.ready.notify_all();
    // Nothing is left to read, or all that is left is a token whose features nobody wants.
    const auto left = static_cast<int64_t>(job.tokens.size()) - job.read_count;
    const bool sampled_all = job.sampled_count == job.max_tokens || job.finish == "stop";
    if (sampled_all && (left == 0 || (left == 1 && job.sampled_count > 0 && !job.reads_last)))
      end(context, *parts[i].slot);
  }
  return true;
}

void Host::decode(Context& context, const std::vector<Part>& parts) {
  if (!context.llama) open(context, 1);
  const int64_t last_layer = llama_model_n_layer(model_.get()) - 1;
  batch_.n_tokens = 0;
  std::vector<bool> has_output;
  for (const Part& part : parts) {
    const Job& job = *part.slot->job;
    // The graph's last layer has the rows alone that give an output.
    const bool reads_last_layer =
        std::find(job.layers.begin(), job.layers.end(), last_layer) != job.layers.end();
    for (int64_t i = 0; i < part.count; ++i) {
      const int row = batch_.n_tokens++;
      batch_.token[row] = job.tokens[job.read_count + i];
      batch_.pos[row] = static_cast<llama_pos>(job.read_count + i);
      batch_.n_seq_id[row] = 1;
      batch_.seq_id[row][0] = part.slot->sequence;
      batch_.logits[row] = (reads_last_layer && i >= part.count - part.steps) ||
                           (part.samples && i + 1 == part.count);
      has_output.push_back(batch_.logits[row]);
    }
  }
  tap_->begin(std::move(has_output));
  for (const Part& part : parts) {
    for (const int64_t layer : part.slot->job->layers) tap_->read(layer);
    for (const auto& [layer, delta] : part.slot->job->deltas)
      tap_->change({layer, part.first, part.count, delta.data()});
  }
  const auto start = Clock::now();
  const int status = llama_decode(context.llama.get(), batch_);
  if (status != 0)
    throw std::runtime_error("llama.cpp cannot read this batch: " + std::to_string(status));
  const std::lock_guard lock(mutex_);
  stats_.decode_s += seconds(start);
  ++stats_.decode_calls;
}

// All rows of all jobs and layers in one call, and their steps.
void Host::encode(const std::vector<Part>& parts, std::vector<std::vector<Step>>& steps) {
  std::vector<LayerRows> calls;
  const auto start = Clock::now();
  for (auto& [layer, results] : results_) {
    results.every.clear();
    const int64_t k = engine_->ranks(layer);
    for (const Part& part : parts) {
      const Job& job = *part.slot->job;
      const bool wanted =
          std::find(job.layers.begin(), job.layers.end(), layer) != job.layers.end();
      if (!wanted || part.steps == 0) continue;
      const int64_t first = part.first + part.count - part.steps;
      const float* rows = tap_->rows(layer) + first * width_;
      if (job.every_feature) {
        results.every[part.first] = engine_->encode_sparse(
            layer, at::from_blob(const_cast<float*>(rows), {part.steps, width_}));
      } else if (!calls.empty() && calls.back().layer == layer &&
                 static_cast<const float*>(calls.back().hidden) + calls.back().row_count * width_ ==
                     rows) {
        calls.back().row_count += part.steps;  // more rows in one block are faster
      } else {
        calls.push_back({layer, rows, part.steps, results.activations.data() + first * k,
                         results.indices.data() + first * k, results.sparsity.data() + first,
                         results.active.data() + first});
      }
    }
  }
  sparse_transcoder::Explanation told = {};
  if (!calls.empty()) engine_->encode(calls, &told);
  const double encode_s = seconds(start);

  for (size_t p = 0; p < parts.size(); ++p) {
    const Part& part = parts[p];
    const Job& job = *part.slot->job;
    if (!options_.dump.empty()) dump(job, part);
    const int64_t first_step = part.count - part.steps;
    for (int64_t i = first_step; i < part.count; ++i) {
      Step step = {job.read_count + i, job.tokens[job.read_count + i], LLAMA_TOKEN_NULL, {}};
      const int64_t row = part.first + i;
      for (const int64_t layer : job.layers) {
        const Results& results = results_.at(layer);
        std::vector<Feature>& list = step.features.emplace_back();
        if (job.every_feature) {
          const auto& every = results.every.at(part.first);
          const int64_t* begin = every.row_begin.const_data_ptr<int64_t>() + i - first_step;
          for (int64_t entry = begin[0]; entry < begin[1]; ++entry)
            list.push_back({every.features.const_data_ptr<int64_t>()[entry],
                            every.activations.const_data_ptr<float>()[entry]});
          continue;
        }
        const int64_t k = engine_->ranks(layer), first = row * k;
        for (int64_t rank = first; rank < first + std::min(k, job.top_k); ++rank)
          if (results.activations[rank] != 0)
            list.push_back({results.indices[rank], results.activations[rank]});
      }
      steps[p].push_back(std::move(step));
    }
  }

  const std::lock_guard lock(mutex_);
  if (!calls.empty()) {
    stats_.encode_s += encode_s;
    ++stats_.encode_calls;
  }
  stats_.prepare_ms += told.prepare_ms;
  stats_.screen_ms += told.screen_ms;
  stats_.rescreen_ms += told.rescreen_ms;
  stats_.compute_ms += told.compute_ms;
  stats_.finish_ms += told.finish_ms;
  for (const LayerRows& rows : calls) {
    stats_.encoded_rows[rows.layer] += rows.row_count;
    for (int64_t row = 0; row < rows.row_count; ++row)
      stats_.active_features[rows.layer] += std::max<int64_t>(rows.active[row], 0);
  }
}

void Host::sample(Context& context, const Part& part, Step& last) {
  Job& job = *part.slot->job;
  const int row = static_cast<int>(part.first + part.count - 1);
  const float* logits = llama_get_logits_ith(context.llama.get(), row);
  const int64_t count = llama_vocab_n_tokens(vocab_);
  if (!logits || !std::all_of(logits, logits + count, [](float one) { return std::isfinite(one); }))
    throw std::runtime_error("the model's output is not finite");
  const llama_token token = llama_sampler_sample(job.sampler.get(), context.llama.get(), row);
  const std::lock_guard lock(mutex_);
  ++stats_.generated;
  if (llama_vocab_is_eog(vocab_, token)) {
    job.finish = "stop";
    return;
  }
  last.next = token;
  job.tokens.push_back(token);
  ++job.sampled_count;
}

// The rows of a job's steps, as the model gave them: float32 [steps, H] in
// <dump>/<job>-<layer>.f32.
void Host::dump(const Job& job, const Part& part) const {
  if (part.steps == 0) return;
  const bool begins =
      job.read_count + part.count - part.steps == (job.prompt_steps ? 0 : job.prompt_count - 1);
  for (const int64_t layer : job.layers) {
    std::ofstream file(options_.dump + "/" + job.name + "-" + std::to_string(layer) + ".f32",
                       std::ios::binary | (begins ? std::ios::trunc : std::ios::app));
    const int64_t first = part.first + part.count - part.steps;
    file.write(reinterpret_cast<const char*>(tap_->rows(layer) + first * width_),
               part.steps * width_ * static_cast<int64_t>(sizeof(float)));
    if (!file) throw std::runtime_error("--dump: cannot write into " + options_.dump);
  }
}

}  // namespace feature_server
