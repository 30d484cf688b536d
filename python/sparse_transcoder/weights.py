"""One layer's transcoder weights."""

from __future__ import annotations

import dataclasses

import torch

from . import _C
from .arguments import _positive, _tensor


@dataclasses.dataclass(eq=False)
class TranscoderWeights:
    """One layer's transcoder. Tensors are float32, bfloat16 or float16 and are shared, never copied.

    F features, H hidden size. The kind is relu; jumprelu when ``threshold`` is given; top-k when ``k`` is given.
    """

    W_enc: torch.Tensor
    """Encoder [F, H]."""
    b_enc: torch.Tensor
    """Encoder bias [F]."""
    W_dec: torch.Tensor | None = None
    """Decoder [H, F]; [n * H, F] where a feature writes to n layers, from this one on: their rows one after the other."""
    b_dec: torch.Tensor | None = None
    """Decoder bias [H] of this layer's own output, or [n * H]."""
    layer: int = 0
    """Index of the layer in the model."""
    _: dataclasses.KW_ONLY
    threshold: torch.Tensor | None = None
    """JumpReLU thresholds [F]: a feature is active strictly above its own."""
    k: int | None = None
    """Top-k coder: only the k largest pre-activations of a row are active."""
    W_skip: torch.Tensor | None = None
    """Skip connection [H, H]: y += x @ W_skip.T."""
    input_bias: torch.Tensor | None = None
    """[H], subtracted from the hidden state before encoding."""
    ln_weight: torch.Tensor | None = None
    """LayerNorm of the hidden state, weight [H]: biased variance, eps 1e-5."""
    ln_bias: torch.Tensor | None = None
    """LayerNorm of the hidden state, bias [H]."""
    hook_in: str = ""
    """Where the hidden state must be read, e.g. ``mlp.hook_in``."""
    hook_out: str = ""
    """What the decoder reconstructs, e.g. ``mlp.hook_out``."""
    source: str = ""
    """File the weights came from; named in errors."""

    def __repr__(self) -> str:
        fields = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        shown = (
            f"{name}={list(v.shape)} {str(v.dtype).removeprefix('torch.')}"
            if isinstance(v, torch.Tensor)
            else f"{name}={v!r}"
            for name, v in fields
            if v is not None and v != ""
        )
        return f"TranscoderWeights({', '.join(shown)})"


_NATIVE_FIELDS = [f.name for f in dataclasses.fields(TranscoderWeights) if f.name not in ("layer", "_")]


def _from_native(layer: int, weights: _C.LayerWeights) -> TranscoderWeights:
    return TranscoderWeights(layer=layer, **{name: getattr(weights, name) for name in _NATIVE_FIELDS})


def _to_native(layer: int, weights: TranscoderWeights) -> _C.LayerWeights:
    fields = {name: getattr(weights, name) for name in _NATIVE_FIELDS}
    for name, value in fields.items():
        if value is None and name not in ("W_enc", "b_enc"):
            continue
        if name == "k":
            _positive(f"layer {layer}: k", value)
        elif name not in ("hook_in", "hook_out", "source"):
            _tensor(layer, value, name)
        elif not isinstance(value, str):
            raise TypeError(f"layer {layer}: {name} must be a str, got {type(value).__name__}")
    return _C.LayerWeights(**fields)
