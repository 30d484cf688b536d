"""One layer's transcoder weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from . import _C
from . import _arguments as check


@dataclasses.dataclass(eq=False)
class TranscoderWeights:
    """The transcoder of one layer, for F features and hidden states of size H.

    Tensors are float32, bfloat16 or float16. They are shared with the caller and never copied, and
    must not be changed while an encoder holds them. The activation kind is relu; it is jumprelu
    when ``threshold`` is given, and top-k when ``k`` is given. The weights can be pickled and
    deep-copied.
    """

    W_enc: torch.Tensor
    """Encoder [F, H]."""
    b_enc: torch.Tensor
    """Encoder bias [F]."""
    W_dec: torch.Tensor | None = None
    """Decoder [d_out, F], where d_out is the width of the place written to: H where it is one like
    the place read. With ``write_layers`` n it is [n * H, F]: the rows of one layer after the rows
    of the other."""
    b_dec: torch.Tensor | None = None
    """Decoder bias [d_out]. With ``write_layers`` n: [H] of this layer's own output, or [n * H]."""
    layer: int = 0
    """Index of the layer in the model."""
    _: dataclasses.KW_ONLY
    threshold: torch.Tensor | None = None
    """JumpReLU thresholds [F]. A feature is active strictly above its own threshold."""
    k: int | None = None
    """Top-k coder: only the k largest pre-activations of a row are active."""
    W_skip: torch.Tensor | None = None
    """Skip connection [d_out, H]: y += x @ W_skip.T."""
    write_layers: int = 1
    """How many layers a feature writes to, from this layer on. It is never guessed from shapes."""
    input_bias: torch.Tensor | None = None
    """Bias [H] that is subtracted from the hidden state before encoding."""
    ln_weight: torch.Tensor | None = None
    """Weight [H] of a LayerNorm of the hidden state, with biased variance and eps 1e-5."""
    ln_bias: torch.Tensor | None = None
    """Bias [H] of the same LayerNorm."""
    hook_in: str = ""
    """The place where the hidden state must be read, e.g. ``mlp.hook_in``."""
    hook_out: str = ""
    """The place that the decoder reconstructs, e.g. ``mlp.hook_out``."""
    source: str = ""
    """The file that the weights came from. Errors name it."""

    def __repr__(self) -> str:
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        shown = (
            f"{name}={list(v.shape)} {str(v.dtype).removeprefix('torch.')}"
            if isinstance(v, torch.Tensor)
            else f"{name}={v!r}"
            for name, v in fields
            if v is not None and v != "" and (name, v) != ("write_layers", 1)
        )
        return f"TranscoderWeights({', '.join(shown)})"


_NATIVE_FIELDS = [f.name for f in dataclasses.fields(TranscoderWeights) if f.name != "layer"]
_NO_TENSORS = ("k", "write_layers", "hook_in", "hook_out", "source")


def from_native(layer: int, weights: _C.LayerWeights) -> TranscoderWeights:
    fields = {name: getattr(weights, name) for name in _NATIVE_FIELDS}
    return TranscoderWeights(layer=layer, **fields)


def to_native(layer: int, weights: TranscoderWeights) -> _C.LayerWeights:
    return _C.LayerWeights(**checked_fields(layer, weights))


def tensors_of(weights: TranscoderWeights) -> list[tuple[str, torch.Tensor | None]]:
    """The fields that are tensors or may be, by name."""
    return [(name, getattr(weights, name)) for name in _NATIVE_FIELDS if name not in _NO_TENSORS]


def checked_fields(layer: int, weights: TranscoderWeights) -> dict[str, Any]:
    """The fields by name but ``layer``, each of its type."""
    if not isinstance(weights, TranscoderWeights):
        raise TypeError(
            f"layer {layer}: transcoders must hold TranscoderWeights, got {type(weights).__name__}"
        )
    fields = {name: getattr(weights, name) for name in _NATIVE_FIELDS}
    for name, value in fields.items():
        if value is None and name not in ("W_enc", "b_enc"):
            continue
        if name in ("k", "write_layers"):
            check.positive(f"layer {layer}: {name}", value)
        elif name not in ("hook_in", "hook_out", "source"):
            check.tensor(layer, value, name)
        elif not isinstance(value, str):
            raise TypeError(f"layer {layer}: {name} must be a str, got {type(value).__name__}")
    return fields
