#include "http.h"

#include <httplib.h>

#include <charconv>
#include <cmath>
#include <numeric>

#include "json_fields.h"
#include "page.h"

namespace feature_server {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t max_body = 1 << 20;
constexpr double bounds_s[] = {0.005, 0.02, 0.1, 0.5, 2, 10, 60};

double seconds(Clock::time_point from) {
  return std::chrono::duration<double>(Clock::now() - from).count();
}

std::string error_json(int status, const std::string& line) {
  return dump({{"error", {{"message", line}, {"code", status}}}}) + "\n";
}

// The shortest text that gives the same float32.
void append(std::string& text, float value) {
  if (!std::isfinite(value)) {
    text += "null";
    return;
  }
  char digits[32];
  text.append(digits, std::to_chars(digits, digits + sizeof(digits), value).ptr);
}

// {"5": [[index, value], ..], ..}
std::string features_json(const Job& job, const Step& step) {
  std::string text = "{";
  for (size_t i = 0; i < job.layers.size(); ++i) {
    text += (i ? ",\"" : "\"") + std::to_string(job.layers[i]) + "\":[";
    for (const Feature& feature : step.features[i]) {
      text += (text.back() == '[' ? "[" : ",[") + std::to_string(feature.index) + ",";
      append(text, feature.value);
      text += ']';
    }
    text += ']';
  }
  return text + "}";
}

struct Metrics {
  std::mutex mutex;
  std::map<std::pair<std::string, int>, int64_t> requests;
  struct Histogram {
    int64_t buckets[std::size(bounds_s) + 1] = {};
    double sum = 0;
  };
  std::map<std::string, Histogram> durations;
  int64_t in_flight = 0;
};

// A response from its request until its last byte is written.
class Scope {
 public:
  Scope(Metrics& metrics, std::string route) : metrics_(metrics), route_(std::move(route)) {
    const std::lock_guard lock(metrics_.mutex);
    ++metrics_.in_flight;
  }
  ~Scope() {
    const double took = seconds(start_);
    const std::lock_guard lock(metrics_.mutex);
    --metrics_.in_flight;
    ++metrics_.requests[{route_, status}];
    Metrics::Histogram& histogram = metrics_.durations[route_];
    histogram.sum += took;
    ++histogram.buckets[std::lower_bound(std::begin(bounds_s), std::end(bounds_s), took) -
                        std::begin(bounds_s)];
  }
  int status = 200;

 private:
  Metrics& metrics_;
  const std::string route_;
  const Clock::time_point start_ = Clock::now();
};

struct Call {
  const httplib::Request& request;
  httplib::Response& response;
  std::shared_ptr<Scope> scope;
};

// The scope lasts until the text is written.
void answer(const Call& call, std::string body, const char* type = "application/json") {
  const auto text = std::make_shared<std::string>(std::move(body));
  call.response.set_content_provider(
      text->size(), type,
      [text, scope = call.scope](size_t offset, size_t length, httplib::DataSink& sink) {
        return sink.write(text->data() + offset, length);
      });
}

}  // namespace

struct Http::Impl {
  explicit Impl(Host& host) : host(host) {
    for (const int64_t layer : host.engine().layers())
      sources[std::to_string(layer) + "-" + host.set()] = layer;
    set_up();
  }

  void set_up();
  template <typename Handle>
  httplib::Server::Handler wrap(const std::string& route, Handle handle);

  void completions(const Call& call, const Json& body);
  void topk_by_token(const Call& call, const Json& body);
  void all(const Call& call, const Json& body);
  void single(const Call& call, const Json& body);
  void steer_completion(const Call& call, const Json& body);
  void tokenize(const Call& call, const Json& body);
  Json capabilities() const;
  std::string metrics_text();

  int64_t layer_of(Fields& fields, const std::string& name) const;
  void check_model(Fields& fields) const;
  Steer steer_of(Fields& fields, int64_t layer) const;
  JobPtr make_job(Fields& fields, bool completes);
  JobPtr reading_job(Fields& fields, std::vector<int64_t> layers, bool every_feature);
  // Every step of the job, as it comes. Ends the job where the client has left.
  template <typename Take>
  void read_steps(const Call& call, const JobPtr& job, Take take);
  void stream(const Call& call, std::vector<JobPtr> jobs,
              std::function<std::string(size_t job, const Step* step)> event);
  bool is_bos(const Job& job) const {
    return !job.tokens.empty() && job.tokens[0] == llama_vocab_bos(host_vocab);
  }

  Host& host;
  httplib::Server server;
  Metrics metrics;
  std::map<std::string, int64_t> sources;
  std::atomic<int64_t> number{0};
  const llama_vocab* host_vocab = host.vocab();
};

int64_t Http::Impl::layer_of(Fields& fields, const std::string& name) const {
  const Json& source = fields.need(name);
  const auto found = source.is_string() ? sources.find(source.get<std::string>()) : sources.end();
  if (found == sources.end()) {
    std::string known;
    for (const auto& [one, layer] : sources) known += (known.empty() ? "" : ", ") + one;
    Fields::wrong(name, "one of " + known, source);
  }
  return found->second;
}

void Http::Impl::check_model(Fields& fields) const {
  const Json* const model = fields.find("model");
  if (model && *model != host.name()) Fields::wrong("model", host.name(), *model);
}

Steer Http::Impl::steer_of(Fields& fields, int64_t layer) const {
  const sparse_transcoder::LayerWeights& weights = host.engine().weights(layer);
  if (!host.steers(layer))
    throw Refusal(400, "layer: " + std::to_string(layer) +
                           " cannot be steered: its decoder does not add to the residual stream of "
                           "this architecture");
  const std::string name = fields.find("feature") ? "feature" : "index";
  const Json& feature = fields.need(name);
  fields.need("strength");
  return {layer, Fields::integer(name, feature, 0, weights.W_enc.size(0) - 1),
          static_cast<float>(fields.number("strength", 0, -1e6, 1e6))};
}

JobPtr Http::Impl::make_job(Fields& fields, bool completes) {
  const auto job = std::make_shared<Job>();
  job->tokens = host.tokenize(fields.text("prompt"), host.adds_bos());
  job->name = std::to_string(++number);
  job->deadline = Clock::now() + std::chrono::milliseconds(static_cast<int64_t>(
                                     1e3 * fields.number("deadline", 600, 0.001, 86400)));
  if (!completes) return job;
  job->temperature = fields.number("temperature", 0, 0, 100);
  job->seed = static_cast<uint32_t>(fields.integer("seed", 0, 0, UINT32_MAX));
  job->exact = fields.boolean("exact", false);
  return job;
}

template <typename Take>
void Http::Impl::read_steps(const Call& call, const JobPtr& job, Take take) {
  Clock::time_point looked = Clock::now();
  Step step;
  for (bool ended = false; !ended;) {
    if (host.next(job, step, ended)) take(step);
    if (seconds(looked) < 0.1) continue;
    looked = Clock::now();
    if (call.request.is_connection_closed()) {
      host.cancel(job);
      throw Refusal(499, "the client has left");
    }
  }
}

// event(job, step) makes the text of a step, and with no step what follows the job's last one.
void Http::Impl::stream(const Call& call, std::vector<JobPtr> jobs,
                        std::function<std::string(size_t, const Step*)> event) {
  struct State {
    std::vector<JobPtr> jobs;
    size_t current = 0;
  };
  const auto state = std::make_shared<State>(State{std::move(jobs)});
  const auto write = [this, state, event](size_t, httplib::DataSink& sink) {
    std::string text;
    bool done = false;
    try {
      Step step;
      bool ended = false;
      const JobPtr& job = state->jobs[state->current];
      if (host.next(job, step, ended)) {
        text = event(state->current, &step);
      } else if (ended) {
        text = event(state->current, nullptr);
        done = ++state->current == state->jobs.size();
        if (done) text += "data: [DONE]\n\n";
      }
    } catch (const Refusal& refusal) {
      text = "event: error\ndata: " + error_json(refusal.status, refusal.what()) + "\n";
      for (const JobPtr& job : state->jobs) host.cancel(job);
      done = true;
    }
    if (text.empty() ? !sink.is_writable() : !sink.write(text.data(), text.size())) return false;
    if (done) sink.done();
    return true;
  };
  call.response.set_header("Cache-Control", "no-store");
  call.response.set_header("X-Accel-Buffering", "no");  // proxies must not hold events back
  call.response.set_chunked_content_provider("text/event-stream", write,
                                             [this, state, scope = call.scope](bool whole) {
                                               if (!whole)
                                                 for (const JobPtr& job : state->jobs)
                                                   host.cancel(job);
                                             });
}

// OpenAI's completions, with the features of the tokens.
void Http::Impl::completions(const Call& call, const Json& body) {
  Fields fields(body);
  const JobPtr job = make_job(fields, true);
  check_model(fields);
  fields.find("user");
  job->max_tokens = fields.integer("max_tokens", 16, 0, host.options().context);
  bool delay = false;
  if (const Json* const wanted = fields.find("features")) {
    Fields inner(*wanted, "features");
    for (const Json& layer : inner.list("layers", 4096)) {
      if (!layer.is_number_integer() || !sources.count(Json(layer).dump() + "-" + host.set()) ||
          std::count(job->layers.begin(), job->layers.end(), layer.get<int64_t>()))
        Fields::wrong("features.layers", "different layers that have a transcoder", layer);
      job->layers.push_back(layer.get<int64_t>());
    }
    if (!inner.find("layers")) job->layers = host.engine().layers();
    job->top_k = inner.integer("top_k", host.options().top_k, 1, host.options().top_k);
    job->prompt_steps = inner.boolean("prompt", false);
    delay = job->reads_last = inner.boolean("delay", false);
    inner.refuse_others();
  }
  for (const Json& one : fields.list("steer", 64)) {
    Fields steer(one, "steer");
    const int64_t layer = Fields::integer("steer.layer", steer.need("layer"), 0, 4096);
    if (!sources.count(std::to_string(layer) + "-" + host.set()))
      Fields::wrong("steer.layer", "a layer that has a transcoder", layer);
    job->steer.push_back(steer_of(steer, layer));
    steer.refuse_others();
  }
  const bool streams = fields.boolean("stream", false);
  fields.refuse_others();
  host.submit({job});
  call.response.set_header("X-Request-Id", job->name);

  // {"position", "token", "text", ..} of what a step says; nothing where it says nothing yet.
  const auto characters = std::make_shared<WholeCharacters>();
  const auto say = [this, job, delay, characters](const Step& step, std::string* text) {
    std::string said;
    const auto token = [&](const char* kind, int64_t position, llama_token id, bool features) {
      *text = characters->take(host.piece(id));
      said = std::string(kind) + "\"position\":" + std::to_string(position) +
             ",\"token\":" + std::to_string(id) + ",\"text\":" + dump(*text);
      if (features) said += ",\"features\":" + features_json(*job, step);
    };
    std::vector<std::string> all;
    const bool has_features = !job->layers.empty();
    if (step.position < job->prompt_count && job->prompt_steps) {
      token("\"prompt\":true,", step.position, step.token, has_features);
      all.push_back(said);
      if (step.position + 1 == job->prompt_count) characters->rest();
      text->clear();
    }
    if (delay ? step.position >= job->prompt_count : step.next != LLAMA_TOKEN_NULL) {
      if (delay)
        token("", step.position, step.token, has_features);
      else
        token("", step.position + 1, step.next, has_features);
      if (!delay && has_features) said += ",\"read\":" + std::to_string(step.position);
      all.push_back(said);
    } else {
      text->clear();
    }
    return all;
  };
  const auto usage = [job] {
    return "\"usage\":" + dump({{"prompt_tokens", job->prompt_count},
                                {"completion_tokens", job->sampled_count},
                                {"total_tokens", job->prompt_count + job->sampled_count}});
  };
  const auto choice = [](const std::string& text, const Json& finish) {
    return "\"choices\":[" + dump({{"index", 0}, {"text", text}, {"finish_reason", finish}}) + "]";
  };
  const std::string head = "{\"object\":\"text_completion\",\"model\":" + dump(host.name()) + ",";

  if (streams)
    return stream(call, {job}, [=](size_t, const Step* step) -> std::string {
      if (!step)
        return "data: " + head + choice(characters->rest(), job->finish) + "," + usage() + "}\n\n";
      std::string events, text;
      for (const std::string& one : say(*step, &text)) {
        const bool prompt = one.rfind("\"prompt\"", 0) == 0;
        events += "data: {" + (prompt ? "" : choice(text, nullptr) + ",") + one + "}\n\n";
      }
      return events;
    });
  std::string tokens, whole;
  read_steps(call, job, [&](const Step& step) {
    std::string text;
    for (const std::string& one : say(step, &text))
      tokens += (tokens.empty() ? "{" : ",{") + one + "}";
    whole += text;
  });
  answer(call, head + choice(whole + characters->rest(), job->finish) + "," + usage() +
                   ",\"tokens\":[" + tokens + "]}\n");
}

JobPtr Http::Impl::reading_job(Fields& fields, std::vector<int64_t> layers, bool every_feature) {
  const JobPtr job = make_job(fields, false);
  check_model(fields);
  job->layers = std::move(layers);
  job->prompt_steps = true;
  job->every_feature = every_feature;
  job->top_k = host.options().top_k;
  return job;
}

void Http::Impl::topk_by_token(const Call& call, const Json& body) {
  Fields fields(body);
  const JobPtr job = reading_job(fields, {layer_of(fields, "source")}, false);
  job->top_k =
      fields.integer("top_k", std::min<int64_t>(5, host.options().top_k), 1, host.options().top_k);
  const bool ignores_bos = fields.boolean("ignore_bos", true) && is_bos(*job);
  host.submit({job});
  call.response.set_header("X-Request-Id", job->name);
  std::string results, tokens;
  read_steps(call, job, [&](const Step& step) {
    const std::string token = dump(host.piece(step.token));
    tokens += (tokens.empty() ? "" : ",") + token;
    if (ignores_bos && step.position == 0) return;
    results += (results.empty() ? "" : ",") +
               ("{\"tokenPosition\":" + std::to_string(step.position)) + ",\"token\":" + token +
               ",\"isSpecial\":" + (host.is_special(step.token) ? "true" : "false") +
               ",\"topFeatures\":[";
    for (const Feature& feature : step.features[0]) {
      results += results.back() == '[' ? "" : ",";
      results += "{\"featureIndex\":" + std::to_string(feature.index) + ",\"activationValue\":";
      append(results, feature.value);
      results += '}';
    }
    results += "]}";
  });
  answer(call, "{\"results\":[" + results + "],\"tokens\":[" + tokens + "]}\n");
}

namespace {

// [v0,v1,..],"sumValues":..,"maxValue":..,"maxValueIndex":..
std::string values_json(const std::vector<float>& values) {
  std::string text = "[";
  for (const float value : values) {
    text += text.size() > 1 ? "," : "";
    append(text, value);
  }
  const auto max = std::max_element(values.begin(), values.end());
  text += "],\"sumValues\":";
  append(text, std::accumulate(values.begin(), values.end(), 0.0f));
  text += ",\"maxValue\":";
  append(text, *max);
  return text + ",\"maxValueIndex\":" + std::to_string(max - values.begin());
}

}  // namespace

// The strongest features of a prompt, with their value at every token: of all that are kept.
void Http::Impl::all(const Call& call, const Json& body) {
  Fields fields(body);
  std::vector<int64_t> layers;
  for (const Json& one : fields.list("selected_sources", 4096)) {
    const Json holder = {{"selected_sources", one}};
    Fields inner(holder);
    layers.push_back(layer_of(inner, "selected_sources"));
  }
  const Json* const set = fields.find("source_set");
  if (set && *set != host.set()) Fields::wrong("source_set", host.set(), *set);
  std::sort(layers.begin(), layers.end());
  layers.erase(std::unique(layers.begin(), layers.end()), layers.end());
  if (layers.empty()) layers = host.engine().layers();
  const JobPtr job = reading_job(fields, layers, true);
  const int64_t wanted = fields.integer("num_results", 25, 1, 1000);
  const bool ignores_bos = fields.boolean("ignore_bos", true) && is_bos(*job);
  std::vector<int64_t> sort_by;
  for (const Json& one : fields.list("sort_by_token_indexes", 4096))
    sort_by.push_back(Fields::integer("sort_by_token_indexes", one, 0,
                                      static_cast<int64_t>(job->tokens.size()) - 1));
  host.submit({job});
  call.response.set_header("X-Request-Id", job->name);

  std::map<std::pair<int64_t, int64_t>, std::vector<float>> found;  // by layer and feature
  std::string tokens;
  read_steps(call, job, [&](const Step& step) {
    tokens += (tokens.empty() ? "" : ",") + dump(host.piece(step.token));
    if (ignores_bos && step.position == 0) return;
    for (size_t i = 0; i < job->layers.size(); ++i)
      for (const Feature& feature : step.features[i]) {
        std::vector<float>& values = found[{job->layers[i], feature.index}];
        values.resize(job->prompt_count);
        values[step.position] = feature.value;
      }
  });
  std::vector<std::pair<double, std::pair<int64_t, int64_t>>> order;
  for (const auto& [name, values] : found) {
    double key = sort_by.empty() ? *std::max_element(values.begin(), values.end()) : 0;
    for (const int64_t token : sort_by) key += values[token];
    order.push_back({-key, name});
  }
  std::sort(order.begin(), order.end());
  if (static_cast<int64_t>(order.size()) > wanted) order.resize(wanted);
  std::string text;
  for (const auto& [key, name] : order)
    text += (text.empty() ? "" : ",") +
            ("{\"source\":" + dump(std::to_string(name.first) + "-" + host.set())) +
            ",\"index\":" + std::to_string(name.second) +
            ",\"values\":" + values_json(found.at(name)) + "}";
  answer(call, "{\"activations\":[" + text + "],\"tokens\":[" + tokens + "],\"counts\":null}\n");
}

void Http::Impl::single(const Call& call, const Json& body) {
  Fields fields(body);
  const int64_t layer = layer_of(fields, "source");
  const JobPtr job = reading_job(fields, {layer}, true);
  const int64_t feature = Fields::integer("index", fields.need("index"), 0,
                                          host.engine().weights(layer).W_enc.size(0) - 1);
  const bool ignores_bos = fields.boolean("ignore_bos", true) && is_bos(*job);
  host.submit({job});
  call.response.set_header("X-Request-Id", job->name);
  std::vector<float> values;
  std::string tokens;
  read_steps(call, job, [&](const Step& step) {
    tokens += (tokens.empty() ? "" : ",") + dump(host.piece(step.token));
    values.push_back(0);
    if (ignores_bos && step.position == 0) return;
    for (const Feature& one : step.features[0])
      if (one.index == feature) values.back() = one.value;
  });
  answer(call,
         "{\"activation\":{\"values\":" + values_json(values) + "},\"tokens\":[" + tokens + "]}\n");
}

void Http::Impl::steer_completion(const Call& call, const Json& body) {
  Fields fields(body);
  if (const Json* const method = fields.find("steer_method");
      method && *method != "SIMPLE_ADDITIVE")
    Fields::wrong("steer_method", "SIMPLE_ADDITIVE", *method);
  const double multiplier = fields.number("strength_multiplier", 1, -1e6, 1e6);
  std::vector<Steer> steer;
  for (const Json& one : fields.list("features", 64)) {
    Fields feature(one, "features");
    steer.push_back(steer_of(feature, layer_of(feature, "source")));
    steer.back().strength *= static_cast<float>(multiplier);
  }
  std::vector<JobPtr> jobs;
  std::vector<std::string> types;
  for (const Json& type : fields.list("types", 2)) {
    if (type != "STEERED" && type != "DEFAULT") Fields::wrong("types", "STEERED or DEFAULT", type);
    types.push_back(type);
    jobs.push_back(make_job(fields, true));
    jobs.back()->max_tokens = fields.integer("n_completion_tokens", 16, 0, host.options().context);
    jobs.back()->frequency_penalty = fields.number("freq_penalty", 0, -2, 2);
    if (type == "STEERED") jobs.back()->steer = steer;
  }
  if (jobs.empty()) throw Refusal(400, "types: must name STEERED, DEFAULT or both");
  check_model(fields);
  host.submit(jobs);

  const std::string prompt = fields.text("prompt");
  const auto outputs = [types](const std::vector<std::string>& texts) {
    Json list = Json::array();
    for (size_t i = 0; i < texts.size(); ++i)
      list.push_back({{"type", types[i]}, {"output", texts[i]}});
    return dump({{"outputs", list}});
  };
  if (fields.boolean("stream", false)) {
    const auto texts = std::make_shared<std::vector<std::string>>(types.size(), prompt);
    const auto characters = std::make_shared<std::vector<WholeCharacters>>(types.size());
    return stream(call, jobs, [=, this](size_t job, const Step* step) -> std::string {
      WholeCharacters& one = (*characters)[job];
      if (step && step->next == LLAMA_TOKEN_NULL) return "";
      (*texts)[job] += step ? one.take(host.piece(step->next)) : one.rest();
      return "data: " + outputs(*texts) + "\n\n";
    });
  }
  std::vector<std::string> texts(types.size(), prompt);
  try {
    for (size_t i = 0; i < jobs.size(); ++i)
      read_steps(call, jobs[i], [&](const Step& step) {
        if (step.next != LLAMA_TOKEN_NULL) texts[i] += host.piece(step.next);
      });
  } catch (const Refusal&) {
    for (const JobPtr& job : jobs) host.cancel(job);
    throw;
  }
  answer(call, outputs(texts) + "\n");
}

void Http::Impl::tokenize(const Call& call, const Json& body) {
  Fields fields(body);
  check_model(fields);
  const bool bos = fields.boolean("prepend_bos", host.adds_bos());
  std::vector<llama_token> tokens = host.tokenize(fields.text("text"), false);
  if (bos) tokens.insert(tokens.begin(), llama_vocab_bos(host_vocab));
  Json texts = Json::array();
  for (const llama_token token : tokens) texts.push_back(host.piece(token));
  answer(call, dump({{"tokens", tokens}, {"tokenStrings", texts}, {"prependBos", bos}}) + "\n");
}

Json Http::Impl::capabilities() const {
  Json layers = Json::array();
  for (const auto& [source, layer] : sources) {
    const auto& weights = host.engine().weights(layer);
    layers.push_back({{"layer", layer},
                      {"source", source},
                      {"hookIn", weights.hook_in},
                      {"features", weights.W_enc.size(0)},
                      {"steers", host.steers(layer)}});
  }
  const Options& options = host.options();
  return {{"model", host.name()},          {"architecture", host.architecture()},
          {"sourceSet", host.set()},       {"layers", layers},
          {"topK", options.top_k},         {"threshold", options.threshold},
          {"context", options.context},    {"sequences", options.sequences},
          {"queue", options.queue},        {"steerMethods", {"SIMPLE_ADDITIVE"}},
          {"prependsBos", host.adds_bos()}};
}

std::string Http::Impl::metrics_text() {
  std::string text;
  const auto begin = [&](const std::string& name, const char* type, const char* help) {
    text += "# HELP sparse_transcoder_" + name + " " + help + "\n# TYPE sparse_transcoder_" + name +
            " " + type + "\n";
  };
  const auto line = [&](const std::string& name, const std::string& labels, double value) {
    text += "sparse_transcoder_" + name + (labels.empty() ? "" : "{" + labels + "}") + " " +
            Json(value).dump() + "\n";
  };
  const auto one = [&](const std::string& name, const char* type, const char* help, double value) {
    begin(name, type, help);
    line(name, "", value);
  };
  const Stats stats = host.stats();
  const sparse_transcoder::Memory memory = host.engine().memory();
  begin("http_requests_total", "counter", "Responses, by route and status.");
  {
    const std::lock_guard lock(metrics.mutex);
    for (const auto& [key, count] : metrics.requests)
      line("http_requests_total",
           "route=\"" + key.first + "\",code=\"" + std::to_string(key.second) + "\"",
           static_cast<double>(count));
    begin("http_request_duration_seconds", "histogram", "From the request to its last byte.");
    for (const auto& [route, histogram] : metrics.durations) {
      const std::string name = "http_request_duration_seconds", label = "route=\"" + route + "\"";
      int64_t count = 0;
      for (size_t i = 0; i <= std::size(bounds_s); ++i) {
        count += histogram.buckets[i];
        const std::string le = i < std::size(bounds_s) ? Json(bounds_s[i]).dump() : "+Inf";
        line(name + "_bucket", label + ",le=\"" + le + "\"", static_cast<double>(count));
      }
      line(name + "_sum", label, histogram.sum);
      line(name + "_count", label, static_cast<double>(count));
    }
    one("in_flight", "gauge", "Responses that are not yet written.",
        static_cast<double>(metrics.in_flight));
  }
  begin("encode_duration_seconds", "summary",
        "Of the engine's calls: wall is their time, phases are summed over workers.");
  const std::pair<const char*, double> phases[] = {{"wall", stats.encode_s},
                                                   {"prepare", stats.prepare_ms / 1e3},
                                                   {"screen", stats.screen_ms / 1e3},
                                                   {"rescreen", stats.rescreen_ms / 1e3},
                                                   {"compute", stats.compute_ms / 1e3},
                                                   {"finish", stats.finish_ms / 1e3}};
  for (const auto& [phase, value] : phases) {
    const std::string label = std::string("phase=\"") + phase + "\"";
    line("encode_duration_seconds_sum", label, value);
    line("encode_duration_seconds_count", label, static_cast<double>(stats.encode_calls));
  }
  begin("decode_duration_seconds", "summary", "Of llama.cpp's batches.");
  line("decode_duration_seconds_sum", "", stats.decode_s);
  line("decode_duration_seconds_count", "", static_cast<double>(stats.decode_calls));
  begin("encoded_rows_total", "counter", "Rows encoded, by layer.");
  for (const auto& [layer, count] : stats.encoded_rows)
    line("encoded_rows_total", "layer=\"" + std::to_string(layer) + "\"",
         static_cast<double>(count));
  begin("active_features_total", "counter", "Active features of those rows.");
  for (const auto& [layer, count] : stats.active_features)
    line("active_features_total", "layer=\"" + std::to_string(layer) + "\"",
         static_cast<double>(count));
  const auto number_of = [](int64_t value) { return static_cast<double>(value); };
  one("queue_depth", "gauge", "Requests that wait for a sequence.", number_of(stats.waiting));
  one("sequences_busy", "gauge", "Requests that run.", number_of(stats.running));
  one("rejected_total", "counter", "Requests refused since the queue was full.",
      number_of(stats.rejected));
  one("cancelled_total", "counter", "Requests whose client left.", number_of(stats.cancelled));
  one("generated_tokens_total", "counter", "Tokens sampled.", number_of(stats.generated));
  begin("weight_bytes", "gauge", "Bytes of the transcoders.");
  line("weight_bytes", "kind=\"declared\"", number_of(memory.weight_bytes));
  line("weight_bytes", "kind=\"gates\"", number_of(memory.gate_bytes));
  line("weight_bytes", "kind=\"screening\"", number_of(memory.screening_bytes));
  one("workspace_bytes", "gauge", "Bytes of the engine's workspaces.",
      number_of(memory.workspace_bytes));
  begin("build_info", "gauge", "What runs.");
  line("build_info",
       "model=" + dump(host.name()) + ",architecture=\"" + host.architecture() +
           "\",instruction_set=\"" + std::string(sparse_transcoder::cpu_instruction_set()) + "\"",
       1);
  return text;
}

template <typename Handle>
httplib::Server::Handler Http::Impl::wrap(const std::string& route, Handle handle) {
  return [this, route, handle](const httplib::Request& request, httplib::Response& response) {
    const Call call = {request, response, std::make_shared<Scope>(metrics, route)};
    const auto refuse = [&](int status, const std::string& line) {
      response.status = call.scope->status = status;
      if (status == 503) response.set_header("Retry-After", "1");
      response.set_content(error_json(status, line), "application/json");
    };
    try {
      handle(call);
    } catch (const Refusal& refusal) {
      refuse(refusal.status, refusal.what());
    } catch (const c10::Error& error) {
      refuse(500, error.what_without_backtrace());
    } catch (const std::exception& error) {
      refuse(500, error.what());
    }
  };
}

void Http::Impl::set_up() {
  const auto post = [this](const std::string& route,
                           void (Impl::*handle)(const Call&, const Json&)) {
    server.Post(route, wrap(route, [this, handle](const Call& call) {
                  (this->*handle)(call, parse_body(call.request.body));
                }));
  };
  post("/v1/completions", &Impl::completions);
  post("/v1/activation/topk-by-token", &Impl::topk_by_token);
  post("/v1/activation/all", &Impl::all);
  post("/v1/activation/single", &Impl::single);
  post("/v1/steer/completion", &Impl::steer_completion);
  post("/v1/tokenize", &Impl::tokenize);
  server.Get("/v1/capabilities", wrap("/v1/capabilities", [this](const Call& call) {
               answer(call, dump(capabilities()) + "\n");
             }));
  server.Get("/health", wrap("/health", [this](const Call& call) {
               if (host.draining()) throw Refusal(503, "the server is shutting down");
               answer(call, "{\"status\":\"ok\"}\n");
             }));
  server.Get("/metrics", wrap("/metrics", [this](const Call& call) {
               answer(call, metrics_text(), "text/plain; version=0.0.4");
             }));
  server.Get("/",
             wrap("/", [](const Call& call) { answer(call, page, "text/html; charset=utf-8"); }));
  server.set_error_handler([](const httplib::Request&, httplib::Response& response) {
    if (!response.body.empty()) return;
    const char* const line = response.status == 413   ? "body: must be at most 1 MiB"
                             : response.status == 404 ? "there is no such route"
                                                      : "the request cannot be read";
    response.set_content(error_json(response.status, line), "application/json");
  });
  server.set_payload_max_length(max_body);
  server.set_read_timeout(10);
  server.set_write_timeout(600);  // a slow reader parks its own sequence
  server.set_keep_alive_timeout(5);
  server.set_tcp_nodelay(true);
  // Without SO_REUSEPORT, httplib's default: two servers would share a port in silence.
  server.set_socket_options([](socket_t socket) {
    const int yes = 1;
    setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  });
  // A thread for every job that can be in the house, and some to refuse the others at once.
  const auto threads = static_cast<size_t>(host.options().sequences + host.options().queue + 64);
  server.new_task_queue = [threads] { return new httplib::ThreadPool(8, threads); };
}

Http::Http(Host& host) : impl_(std::make_unique<Impl>(host)) {}
Http::~Http() = default;

int Http::bind() {
  const Options& options = impl_->host.options();
  const int port = options.port == 0 ? impl_->server.bind_to_any_port(options.host)
                   : impl_->server.bind_to_port(options.host, static_cast<int>(options.port))
                       ? static_cast<int>(options.port)
                       : -1;
  if (port < 0)
    throw std::runtime_error("cannot listen on " + options.host + ":" +
                             std::to_string(options.port));
  return port;
}

void Http::serve() { impl_->server.listen_after_bind(); }

int64_t Http::drain() {
  impl_->host.drain();
  const auto start = Clock::now();
  const auto open = [&] {
    const std::lock_guard lock(impl_->metrics.mutex);
    return impl_->metrics.in_flight;
  };
  const auto wait = [&](double limit_s) {
    while (open() > 0 && seconds(start) < limit_s)
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
  };
  const auto limit_s = static_cast<double>(impl_->host.options().drain);
  wait(limit_s);
  if (open() > 0) impl_->host.end_all("the server is shutting down");
  wait(limit_s + 2);
  return open();
}

void Http::stop() { impl_->server.stop(); }

}  // namespace feature_server
