// The Python module: names, defaults, docstrings and error types. No logic.
#include <ATen/ops/_sparse_csr_tensor_unsafe.h>
#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <sparse_transcoder/engine.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "io/safetensors.h"

namespace py = pybind11;
using namespace sparse_transcoder;

namespace {

// A user's mistake becomes Python's own exception with the message alone; anything else is a
// RuntimeError.
void translate(std::exception_ptr exception) {
  try {
    if (exception) std::rethrow_exception(exception);
  } catch (const FileNotFound& e) {
    PyErr_SetString(PyExc_FileNotFoundError, e.what_without_backtrace());
  } catch (const c10::ValueError& e) {
    PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
  } catch (const c10::TypeError& e) {
    PyErr_SetString(PyExc_TypeError, e.what_without_backtrace());
  } catch (const c10::IndexError& e) {
    PyErr_SetString(PyExc_KeyError, e.what_without_backtrace());
  } catch (const c10::OutOfMemoryError& e) {
    py::set_error(py::module_::import("torch").attr("OutOfMemoryError"),
                  e.what_without_backtrace());
  } catch (const c10::Error& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
  }
}

// torch says once per process that sparse CSR tensors are in beta. The handler is the thread's own
// and drops that sentence, so that no warning filter decides whether encode_sparse succeeds.
class SilentHandler : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

at::Tensor to_csr(const SparseFeatures& found, int64_t features) {
  SilentHandler silent;
  const c10::WarningUtils::WarningHandlerGuard guard(&silent);
  return at::_sparse_csr_tensor_unsafe(found.row_begin, found.features, found.activations,
                                       {found.row_begin.numel() - 1, features},
                                       found.activations.options().layout(at::kSparseCsr));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ engine of sparse_transcoder.";
  py::register_local_exception_translator(&translate);
  using OptionalTensor = std::optional<at::Tensor>;
  using release_gil = py::call_guard<py::gil_scoped_release>;

  py::class_<LayerWeights>(m, "LayerWeights",
                           "One layer's declared weights; see sparse_transcoder.TranscoderWeights.")
      .def(py::init([](at::Tensor W_enc, at::Tensor b_enc, OptionalTensor W_dec,
                       OptionalTensor b_dec, int64_t write_layers, OptionalTensor threshold,
                       std::optional<int64_t> k, OptionalTensor W_skip, OptionalTensor input_bias,
                       OptionalTensor ln_weight, OptionalTensor ln_bias, std::string hook_in,
                       std::string hook_out, std::string source) {
             const at::Tensor none;
             return LayerWeights{W_enc,
                                 b_enc,
                                 W_dec.value_or(none),
                                 b_dec.value_or(none),
                                 write_layers,
                                 threshold.value_or(none),
                                 k,
                                 W_skip.value_or(none),
                                 input_bias.value_or(none),
                                 ln_weight.value_or(none),
                                 ln_bias.value_or(none),
                                 hook_in,
                                 hook_out,
                                 source};
           }),
           py::kw_only(), py::arg("W_enc"), py::arg("b_enc"), py::arg("W_dec"), py::arg("b_dec"),
           py::arg("write_layers"), py::arg("threshold"), py::arg("k"), py::arg("W_skip"),
           py::arg("input_bias"), py::arg("ln_weight"), py::arg("ln_bias"), py::arg("hook_in"),
           py::arg("hook_out"), py::arg("source"))
      .def_readonly("W_enc", &LayerWeights::W_enc)
      .def_readonly("b_enc", &LayerWeights::b_enc)
      .def_readonly("W_dec", &LayerWeights::W_dec)
      .def_readonly("b_dec", &LayerWeights::b_dec)
      .def_readonly("write_layers", &LayerWeights::write_layers)
      .def_readonly("threshold", &LayerWeights::threshold)
      .def_readonly("k", &LayerWeights::k)
      .def_readonly("W_skip", &LayerWeights::W_skip)
      .def_readonly("input_bias", &LayerWeights::input_bias)
      .def_readonly("ln_weight", &LayerWeights::ln_weight)
      .def_readonly("ln_bias", &LayerWeights::ln_bias)
      .def_readonly("hook_in", &LayerWeights::hook_in)
      .def_readonly("hook_out", &LayerWeights::hook_out)
      .def_readonly("source", &LayerWeights::source);

  m.def("cuda_kernels", &cuda_kernels, "Whether this build has CUDA kernels.");
  m.def("load_weights", &load_weights, py::arg("dir"), py::arg("layers"), py::arg("device"),
        release_gil(),
        "Reads layer_{i}.safetensors and config.yaml of a transcoder set; every layer when layers "
        "is empty.");
  m.def("read_safetensors", &read_safetensors, py::arg("path"), release_gil(),
        "The tensors of a safetensors file, memory-mapped: nothing but the header is read here.");

  m.def(
      "cpu_instruction_set", &cpu_instruction_set,
      "The instruction set that encodes on the CPU: the best of this machine, or the one that the "
      "environment variable SPARSE_TRANSCODER_CPU names.");

  py::enum_<Screening>(m, "Screening", "Which approximate arithmetic finds the candidates.")
      .value("auto", Screening::automatic)
      .value("off", Screening::off)
      .value("int16", Screening::int16)
      .value("int8", Screening::int8);

  py::class_<Explanation>(m, "Explanation",
                          "What a call did; see sparse_transcoder.SparseTranscoderEncoder.explain.")
      .def_readonly("instruction_set", &Explanation::instruction_set)
      .def_readonly("rows", &Explanation::rows)
      .def_readonly("features", &Explanation::features)
      .def_readonly("fallback_rows", &Explanation::fallback_rows)
      .def_readonly("pairs_int8", &Explanation::pairs_int8)
      .def_readonly("pairs_int16", &Explanation::pairs_int16)
      .def_readonly("pairs_float32", &Explanation::pairs_float32)
      .def_readonly("survivors", &Explanation::survivors)
      .def_readonly("ambiguous", &Explanation::ambiguous)
      .def_readonly("computed", &Explanation::computed)
      .def_readonly("prepare_ms", &Explanation::prepare_ms)
      .def_readonly("screen_ms", &Explanation::screen_ms)
      .def_readonly("rescreen_ms", &Explanation::rescreen_ms)
      .def_readonly("compute_ms", &Explanation::compute_ms)
      .def_readonly("finish_ms", &Explanation::finish_ms);

  py::class_<Features>(m, "Features",
                       "Top-k activations, their feature indices, and the fraction active.")
      .def_readonly("activations", &Features::activations)
      .def_readonly("indices", &Features::indices)
      .def_readonly("sparsity", &Features::sparsity);

  py::class_<SparseFeatures>(m, "SparseFeatures",
                             "Every active feature, in the compressed sparse row layout.")
      .def(py::init<at::Tensor, at::Tensor, at::Tensor>(), py::arg("row_begin"),
           py::arg("features"), py::arg("activations"))
      .def_readonly("row_begin", &SparseFeatures::row_begin)
      .def_readonly("features", &SparseFeatures::features)
      .def_readonly("activations", &SparseFeatures::activations)
      .def("to_csr", &to_csr, py::arg("features"), "A sparse CSR tensor [N, features].");

  py::class_<SparseRows>(m, "SparseRows", "Consecutive rows of one layer, for a sink.")
      .def_readonly("layer", &SparseRows::layer)
      .def_readonly("first_row", &SparseRows::first_row)
      .def_readonly("features", &SparseRows::features)
      .def_readonly("clamped", &SparseRows::clamped);

  py::class_<Memory>(m, "Memory", "Bytes an engine holds.")
      .def_readonly("weight_bytes", &Memory::weight_bytes)
      .def_readonly("gate_bytes", &Memory::gate_bytes)
      .def_readonly("screening_bytes", &Memory::screening_bytes)
      .def_readonly("workspace_bytes", &Memory::workspace_bytes);

  py::class_<Engine>(m, "Engine", "The C++ engine; see sparse_transcoder.SparseTranscoderEncoder.")
      .def(py::init([](std::map<int64_t, LayerWeights> weights, int64_t top_k,
                       float activation_threshold, int64_t chunk_size, int64_t lanes,
                       Screening screening, bool use_graphs, int64_t device_weight_bytes) {
             return Engine(std::move(weights), {top_k, activation_threshold, chunk_size, lanes,
                                                screening, use_graphs, device_weight_bytes});
           }),
           py::arg("weights"), py::kw_only(), py::arg("top_k"), py::arg("activation_threshold"),
           py::arg("chunk_size"), py::arg("lanes"), py::arg("screening"), py::arg("use_graphs"),
           py::arg("device_weight_bytes"), release_gil())
      .def("encode", py::overload_cast<int64_t, const at::Tensor&>(&Engine::encode, py::const_),
           py::arg("layer"), py::arg("hidden"), release_gil(), "Encodes one layer's hidden states.")
      .def("encode_all",
           py::overload_cast<const std::map<int64_t, at::Tensor>&>(&Engine::encode, py::const_),
           py::arg("hidden_states"), release_gil(),
           "Encodes the hidden states of many layers at once.")
      .def("encode_sparse",
           py::overload_cast<int64_t, const at::Tensor&>(&Engine::encode_sparse, py::const_),
           py::arg("layer"), py::arg("hidden"), release_gil(),
           "Every active feature of one layer's hidden states.")
      .def(
          "encode_into",
          [](const Engine& engine, const std::map<int64_t, at::Tensor>& hidden,
             const std::function<void(const SparseRows&)>& sink, at::ScalarType features,
             at::ScalarType activations, bool only_top_k) {
            const py::gil_scoped_release released;
            engine.encode_sparse(hidden, [&](const SparseRows& rows) { sink(rows); },
                                 {features, activations, only_top_k});
          },
          py::arg("hidden_states"), py::arg("sink"), py::kw_only(), py::arg("features"),
          py::arg("activations"), py::arg("only_top_k"),
          "Encodes the hidden states of many layers at once, chunk by chunk into a sink.")
      .def("encode_sparse_all",
           py::overload_cast<const std::map<int64_t, at::Tensor>&>(&Engine::encode_sparse,
                                                                   py::const_),
           py::arg("hidden_states"), release_gil(), "Every active feature of many layers at once.")
      .def("check_unchanged", &Engine::check_unchanged, py::arg("layer"), release_gil(),
           "Raises ValueError where a layer's weights were changed since the engine was built.")
      .def(
          "decode",
          [](const Engine& engine, int64_t layer, const at::Tensor& activations,
             const at::Tensor& indices, OptionalTensor hidden) {
            return engine.decode(layer, activations, indices, hidden.value_or(at::Tensor()));
          },
          py::arg("layer"), py::arg("activations"), py::arg("indices"), py::arg("hidden"),
          release_gil(), "Reconstruction from top-k features.")
      .def(
          "decode_sparse",
          [](const Engine& engine, int64_t layer, const SparseFeatures& features,
             OptionalTensor hidden) {
            return engine.decode(layer, features, hidden.value_or(at::Tensor()));
          },
          py::arg("layer"), py::arg("features"), py::arg("hidden"), release_gil(),
          "Reconstruction from all active features.")
      .def("explain", &Engine::explain, py::arg("layer"), py::arg("hidden"), release_gil(),
           "Encodes one layer's hidden states on the CPU and tells how.")
      .def_property_readonly("layers", &Engine::layers)
      .def("memory", &Engine::memory, "Bytes held beside the caller's weights.");
}
