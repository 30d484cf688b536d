"""
C++ engine of sparse_transcoder.
"""
from __future__ import annotations
import collections.abc
import torch
import typing
__all__: list[str] = ['Engine', 'Explanation', 'Features', 'LayerWeights', 'Memory', 'Screening', 'SparseFeatures', 'SparseRows', 'cpu_instruction_set', 'cuda_kernels', 'load_weights', 'read_safetensors']
class LayerWeights:
    """
    One layer's declared weights; see sparse_transcoder.TranscoderWeights.
    """
    def __init__(self, *, W_enc: torch.Tensor, b_enc: torch.Tensor, W_dec: torch.Tensor | None, b_dec: torch.Tensor | None, write_layers: typing.SupportsInt | typing.SupportsIndex, threshold: torch.Tensor | None, k: typing.SupportsInt | typing.SupportsIndex | None, W_skip: torch.Tensor | None, input_bias: torch.Tensor | None, ln_weight: torch.Tensor | None, ln_bias: torch.Tensor | None, hook_in: str, hook_out: str, source: str) -> None:
        ...
    @property
    def W_dec(self) -> torch.Tensor:
        ...
    @property
    def W_enc(self) -> torch.Tensor:
        ...
    @property
    def W_skip(self) -> torch.Tensor:
        ...
    @property
    def b_dec(self) -> torch.Tensor:
        ...
    @property
    def b_enc(self) -> torch.Tensor:
        ...
    @property
    def hook_in(self) -> str:
        ...
    @property
    def hook_out(self) -> str:
        ...
    @property
    def input_bias(self) -> torch.Tensor:
        ...
    @property
    def k(self) -> int | None:
        ...
    @property
    def ln_bias(self) -> torch.Tensor:
        ...
    @property
    def ln_weight(self) -> torch.Tensor:
        ...
    @property
    def source(self) -> str:
        ...
    @property
    def threshold(self) -> torch.Tensor:
        ...
    @property
    def write_layers(self) -> int:
        ...
class Screening:
    """
    Which approximate arithmetic finds the candidates.

    Members:

      auto

      off

      int16

      int8
    """
    __members__: typing.ClassVar[dict[str, Screening]]
    auto: typing.ClassVar[Screening]
    int16: typing.ClassVar[Screening]
    int8: typing.ClassVar[Screening]
    off: typing.ClassVar[Screening]
    @typing.overload
    def __eq__(self, other: Screening) -> bool:
        ...
    @typing.overload
    def __eq__(self, other: typing.Any) -> bool:
        ...
    def __getstate__(self) -> int:
        ...
    def __hash__(self) -> int:
        ...
    def __index__(self) -> int:
        ...
    def __init__(self, value: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def __int__(self) -> int:
        ...
    @typing.overload
    def __ne__(self, other: Screening) -> bool:
        ...
    @typing.overload
    def __ne__(self, other: typing.Any) -> bool:
        ...
    def __repr__(self) -> str:
        ...
    def __setstate__(self, state: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def __str__(self) -> str:
        ...
    @property
    def name(self) -> str:
        ...
    @property
    def value(self) -> int:
        ...
class Explanation:
    """
    What a call did; see sparse_transcoder.SparseTranscoderEncoder.explain.
    """
    @property
    def ambiguous(self) -> int:
        ...
    @property
    def compute_ms(self) -> float:
        ...
    @property
    def computed(self) -> int:
        ...
    @property
    def fallback_rows(self) -> int:
        ...
    @property
    def features(self) -> int:
        ...
    @property
    def finish_ms(self) -> float:
        ...
    @property
    def instruction_set(self) -> str:
        ...
    @property
    def pairs_float32(self) -> int:
        ...
    @property
    def pairs_int16(self) -> int:
        ...
    @property
    def pairs_int8(self) -> int:
        ...
    @property
    def prepare_ms(self) -> float:
        ...
    @property
    def rescreen_ms(self) -> float:
        ...
    @property
    def rows(self) -> int:
        ...
    @property
    def screen_ms(self) -> float:
        ...
    @property
    def survivors(self) -> int:
        ...
class Features:
    """
    Top-k activations, their feature indices, and the fraction active.
    """
    @property
    def activations(self) -> torch.Tensor:
        ...
    @property
    def indices(self) -> torch.Tensor:
        ...
    @property
    def sparsity(self) -> torch.Tensor:
        ...
class SparseFeatures:
    """
    Every active feature, in the compressed sparse row layout.
    """
    def __init__(self, row_begin: torch.Tensor, features: torch.Tensor, activations: torch.Tensor) -> None:
        ...
    def to_csr(self, features: typing.SupportsInt | typing.SupportsIndex) -> torch.Tensor:
        """
        A sparse CSR tensor [N, features].
        """
    @property
    def activations(self) -> torch.Tensor:
        ...
    @property
    def features(self) -> torch.Tensor:
        ...
    @property
    def row_begin(self) -> torch.Tensor:
        ...
class SparseRows:
    """
    Consecutive rows of one layer, for a sink.
    """
    @property
    def clamped(self) -> int:
        ...
    @property
    def features(self) -> SparseFeatures:
        ...
    @property
    def first_row(self) -> int:
        ...
    @property
    def layer(self) -> int:
        ...
class Memory:
    """
    Bytes an engine holds.
    """
    @property
    def gate_bytes(self) -> int:
        ...
    @property
    def screening_bytes(self) -> int:
        ...
    @property
    def weight_bytes(self) -> int:
        ...
    @property
    def workspace_bytes(self) -> int:
        ...
class Engine:
    """
    The C++ engine; see sparse_transcoder.SparseTranscoderEncoder.
    """
    def __init__(self, weights: collections.abc.Mapping[typing.SupportsInt | typing.SupportsIndex, LayerWeights], *, top_k: typing.SupportsInt | typing.SupportsIndex, activation_threshold: typing.SupportsFloat | typing.SupportsIndex, chunk_size: typing.SupportsInt | typing.SupportsIndex, lanes: typing.SupportsInt | typing.SupportsIndex, screening: Screening, use_graphs: bool, device_weight_bytes: typing.SupportsInt | typing.SupportsIndex) -> None:
        ...
    def check_unchanged(self, layer: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Raises ValueError where a layer's weights were changed since the engine was built.
        """
    def decode(self, layer: typing.SupportsInt | typing.SupportsIndex, activations: torch.Tensor, indices: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        """
        Reconstruction from top-k features.
        """
    def decode_sparse(self, layer: typing.SupportsInt | typing.SupportsIndex, features: SparseFeatures, hidden: torch.Tensor | None) -> torch.Tensor:
        """
        Reconstruction from all active features.
        """
    def encode(self, layer: typing.SupportsInt | typing.SupportsIndex, hidden: torch.Tensor) -> Features:
        """
        Encodes one layer's hidden states.
        """
    def encode_all(self, hidden_states: collections.abc.Mapping[typing.SupportsInt | typing.SupportsIndex, torch.Tensor]) -> dict[int, Features]:
        """
        Encodes the hidden states of many layers at once.
        """
    def encode_into(self, hidden_states: collections.abc.Mapping[typing.SupportsInt | typing.SupportsIndex, torch.Tensor], sink: collections.abc.Callable[[SparseRows], None], *, features: torch.dtype, activations: torch.dtype, only_top_k: bool) -> None:
        """
        Encodes the hidden states of many layers at once, chunk by chunk into a sink.
        """
    def encode_sparse(self, layer: typing.SupportsInt | typing.SupportsIndex, hidden: torch.Tensor) -> SparseFeatures:
        """
        Every active feature of one layer's hidden states.
        """
    def encode_sparse_all(self, hidden_states: collections.abc.Mapping[typing.SupportsInt | typing.SupportsIndex, torch.Tensor]) -> dict[int, SparseFeatures]:
        """
        Every active feature of many layers at once.
        """
    def explain(self, layer: typing.SupportsInt | typing.SupportsIndex, hidden: torch.Tensor) -> Explanation:
        """
        Encodes one layer's hidden states on the CPU and tells how.
        """
    def memory(self) -> Memory:
        """
        Bytes held beside the caller's weights.
        """
    @property
    def layers(self) -> list[int]:
        ...
def cpu_instruction_set() -> str:
    """
    The instruction set that encodes on the CPU: the best of this machine, or the one that the environment variable SPARSE_TRANSCODER_CPU names.
    """
def cuda_kernels() -> bool:
    """
    Whether this build has CUDA kernels.
    """
def load_weights(dir: str, layers: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], device: torch.device) -> dict[int, LayerWeights]:
    """
    Reads layer_{i}.safetensors and config.yaml of a transcoder set; every layer when layers is empty.
    """
def read_safetensors(path: str) -> dict[str, torch.Tensor]:
    """
    The tensors of a safetensors file, memory-mapped: nothing but the header is read here.
    """
