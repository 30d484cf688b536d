"""Transcoder weights and the checkpoints they come from."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import _C


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
    """Decoder [H, F]."""
    b_dec: torch.Tensor | None = None
    """Decoder bias [H]."""
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


def load_transcoders(
    transcoder_dir: str | Path, layers: Iterable[int] | None = None, device: str | torch.device | None = None
) -> dict[int, TranscoderWeights]:
    """Load the transcoders in a folder: {layer: weights}.

    Layouts: a circuit-tracer set (``layer_{i}.safetensors`` with ``config.yaml``), memory-mapped; and the reference project's
    ``transcoder_L{n}.pt``, read without unpickling code.

    Args:
        transcoder_dir: the folder.
        layers: the layers to load; only their files are opened. None loads all that are there.
        device: where the tensors go. None is CUDA where there is one, else the CPU.

    Raises:
        FileNotFoundError: the folder, or the file of a layer asked for, is not there.
        ValueError: a file is malformed; the message names it and the reason.
    """
    folder = Path(transcoder_dir)
    target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    wanted = None if layers is None else [int(layer) for layer in layers]
    if wanted is not None and not wanted:
        return {}
    pickled = {
        int(m[1]): p for p in folder.glob("transcoder_L*.pt") if (m := re.fullmatch(r"transcoder_L(\d+)\.pt", p.name))
    }
    if pickled:
        missing = [layer for layer in wanted or () if layer not in pickled]
        if missing:
            raise FileNotFoundError(f"{folder}: there is no file for layer {missing[0]}")
        return {layer: _read_reference(layer, pickled[layer], target) for layer in sorted(set(wanted or pickled))}
    return {layer: _from_native(layer, w) for layer, w in _C.load_weights(str(folder), wanted or [], target).items()}


_NATIVE_FIELDS = [f.name for f in dataclasses.fields(TranscoderWeights) if f.name not in ("layer", "_")]


def _from_native(layer: int, weights: _C.LayerWeights) -> TranscoderWeights:
    return TranscoderWeights(layer=layer, **{name: getattr(weights, name) for name in _NATIVE_FIELDS})


def _to_native(layer: int, weights: TranscoderWeights) -> _C.LayerWeights:
    fields = {name: getattr(weights, name) for name in _NATIVE_FIELDS}
    for name, value in fields.items():
        needed = int if name == "k" else str if name in ("hook_in", "hook_out", "source") else torch.Tensor
        optional = value is None and name not in ("W_enc", "b_enc")
        if not optional and (not isinstance(value, needed) or isinstance(value, bool)):
            raise TypeError(f"layer {layer}: {name} must be a {needed.__name__}, got {type(value).__name__}")
    return _C.LayerWeights(**fields)


def _read_reference(layer: int, path: Path, device: torch.device) -> TranscoderWeights:
    """The reference project's checkpoint: a decoder, and an encoder with LayerNorm unless it is tied to the decoder."""
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).split("\n")[0][:200]
        raise ValueError(f"{path}: not a checkpoint that can be read without running its code: {reason}") from None
    state = loaded.get("state_dict") if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: must hold a state_dict of tensors")
    state = {str(key).removeprefix("_orig_mod."): value for key, value in state.items()}

    def matrix(key: str, ndim: int) -> torch.Tensor:
        tensor = state.get(key)
        if tensor is None:
            raise ValueError(f"{path}: tensor {key} is missing, got {', '.join(sorted(state)) or 'none'}")
        if tensor.ndim != ndim or not tensor.is_floating_point():
            raise ValueError(
                f"{path}: {key} must be a {ndim}-dimensional float tensor, got {tensor.dtype} {list(tensor.shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{path}: {key} must be finite, got NaN or Inf")
        return tensor.to(device)

    W_dec = matrix("dec.weight", 2)
    b_dec = matrix("dec.bias", 1) if "dec.bias" in state else None
    ln_weight = ln_bias = None
    if "enc.0.weight" in state or "enc.0.bias" in state:
        ln_weight, ln_bias = matrix("enc.0.weight", 1), matrix("enc.0.bias", 1)
    if "enc.1.weight" in state:
        W_enc, b_enc = matrix("enc.1.weight", 2), matrix("enc.1.bias", 1)
    else:  # tied
        W_enc = W_dec.T.contiguous()
        b_enc = torch.zeros(W_enc.shape[0], dtype=W_enc.dtype, device=device)
    features, hidden_size = W_enc.shape
    for name, tensor, shape in (
        ("b_enc", b_enc, (features,)),
        ("enc.0.weight", ln_weight, (hidden_size,)),
        ("enc.0.bias", ln_bias, (hidden_size,)),
        ("dec.bias", b_dec, W_dec.shape[:1]),
        ("dec.weight", W_dec, (W_dec.shape[0], features)),
    ):
        if tensor is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{path}: {name} must be {list(shape)}, got {list(tensor.shape)}")
    return TranscoderWeights(W_enc, b_enc, W_dec, b_dec, layer, ln_weight=ln_weight, ln_bias=ln_bias, source=str(path))
