"""circuit-tracer's transcoder set, the native layout: layer_{i}.safetensors and config.yaml.

The layout is that of https://github.com/safety-research/circuit-tracer. C++ reads it, without
Python too.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import shutil
import struct
import uuid
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from .. import _C
from .. import _arguments as check
from ..encoder import SparseTranscoderEncoder
from ..weights import TranscoderWeights, from_native
from .files import FLOATS, config_text, dtype_name, yaml_values

NAME = "circuit-tracer set"
SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}


def is_set(folder: Path, names: frozenset[str]) -> bool:
    if any(re.fullmatch(r"layer_\d{1,9}\.safetensors", name) for name in names):
        return True
    config = folder / "config.yaml"
    if yaml_values(config).get("model_kind") == "cross_layer_transcoder":
        raise FileNotFoundError(
            f"{folder}: there is no W_enc_{{i}}.safetensors of a cross-layer transcoder"
        )
    return "transcoder" in config_text(config)


def load_set(folder: Path, layers: list[int], device: torch.device) -> dict[int, TranscoderWeights]:
    loaded = _C.load_weights(str(folder), layers, device)
    return {layer: from_native(layer, weights) for layer, weights in loaded.items()}


def save_transcoders(
    transcoders: Mapping[int, TranscoderWeights] | Iterable[tuple[int, TranscoderWeights]],
    dir: str | Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write transcoders as layer_{i}.safetensors and config.yaml, the layout that C++ reads.

    :func:`load_transcoders` gives back every field bit for bit. The folder appears when it is
    whole: it is written under another name and then renamed. A folder that holds anything is
    refused, since the layers of two sets would be read as one set.

    Args:
        transcoders: {layer: weights}, or (layer, weights) pairs, which are read one after the
            other, so that the caller need not hold them all.
        dir: a folder that is empty or not there yet. Missing parents are made.
        dtype: float32, bfloat16 or float16: what W_enc, W_dec and W_skip are stored as. None stores
            them as they are. Biases and thresholds always keep their dtype.

    Raises:
        ValueError: the folder is not empty, a tensor's shape is wrong, a value is not finite in the
            dtype that is stored, or the layout cannot hold a field: an input bias, a LayerNorm, a
            decoder that writes to many layers. ``python -m sparse_transcoder convert`` folds an
            input bias into b_enc.
        TypeError: an argument's or a field's type is wrong.

    Warns:
        UserWarning: the layers have different hooks. config.yaml holds one for all, so that none is
            written.

    Example:
        >>> save_transcoders({12: TranscoderWeights(W_enc, b_enc, W_dec, b_dec)}, "my-transcoders")
    """
    if not isinstance(dir, (str, os.PathLike)):
        raise TypeError(f"dir must be a str or Path, got {type(dir).__name__}")
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    if not isinstance(transcoders, Iterable):
        name = type(transcoders).__name__
        raise TypeError(f"transcoders must map layers to TranscoderWeights, got {name}")
    pairs = transcoders.items() if isinstance(transcoders, Mapping) else transcoders
    target = Path(dir).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: must be an empty folder or not be there yet")
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    part.mkdir(parents=True)
    try:
        hooks = set()
        for layer, weights in pairs:
            layer = check.at_least(0, "layer", layer)
            path = part / f"layer_{layer}.safetensors"
            if path.exists():
                raise ValueError(f"layer {layer}: must be there once, got it twice")
            _write_safetensors(path, _native_tensors(layer, weights, dtype))
            hooks.add((weights.hook_in, weights.hook_out))
        if not hooks:
            raise ValueError("transcoders must hold at least one layer, got none")
        if len(hooks) > 1:
            warnings.warn(
                "the layers have different hooks, none is written to config.yaml", stacklevel=2
            )
            hooks = {("", "")}
        (part / "config.yaml").write_text(_config_text(*hooks.pop()), encoding="utf-8")
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def fold_input_bias(
    weights: TranscoderWeights, dtype: torch.dtype | None = None
) -> tuple[TranscoderWeights, float]:
    """The same encoder without an input bias, and by how much b_enc was rounded at most.

    The shift of b_enc is computed in float64, from W_enc as ``dtype`` stores it.
    """
    if weights.input_bias is None or weights.ln_weight is not None:
        return weights, 0.0
    W_enc = weights.W_enc.to(dtype or weights.W_enc.dtype)
    bias = weights.input_bias.to(torch.float64)
    blocks = torch.split(W_enc, 4096)
    exact = weights.b_enc.to(torch.float64) - torch.cat([rows.double() @ bias for rows in blocks])
    b_enc = exact.to(torch.float32)
    rounding = (b_enc.to(torch.float64) - exact).abs().max().item()
    return dataclasses.replace(weights, W_enc=W_enc, b_enc=b_enc, input_bias=None), rounding


def _native_tensors(
    layer: int, weights: TranscoderWeights, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """What the file of a layer holds, by name."""
    # The engine refuses what could not be loaded, with its own words.
    SparseTranscoderEncoder({layer: weights}, screening="off")
    who = f"layer {layer} ({weights.source})" if weights.source else f"layer {layer}"
    if weights.ln_weight is not None:
        raise ValueError(f"{who}: the native layout cannot hold a LayerNorm")
    if weights.input_bias is not None:
        raise ValueError(
            f"{who}: the native layout cannot hold an input bias; `python -m sparse_transcoder "
            "convert` folds it into b_enc"
        )
    if weights.W_dec is not None and weights.W_dec.shape[0] != weights.W_enc.shape[1]:
        raise ValueError(
            f"{who}: the native layout cannot hold a decoder that writes to many layers"
        )
    matrices = {
        "W_enc": weights.W_enc,
        "W_dec": None if weights.W_dec is None else weights.W_dec.T,
        "W_skip": weights.W_skip,
    }
    vectors = {
        "b_enc": weights.b_enc,
        "b_dec": weights.b_dec,
        "activation_function.threshold": weights.threshold,
        "k": None if weights.k is None else torch.tensor([weights.k]),
    }
    tensors = {name: t.to(dtype or t.dtype) for name, t in matrices.items() if t is not None}
    tensors |= {name: t for name, t in vectors.items() if t is not None}
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
            raise ValueError(f"{who}: {name} is not finite as {dtype_name(tensor)}")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def _write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for rows in torch.split(tensor, 4096):
                block = rows.cpu().contiguous()
                file.write((ctypes.c_char * block.nbytes).from_address(block.data_ptr()))


def _config_text(hook_in: str, hook_out: str) -> str:
    lines = ["model_kind: transcoder_set"]
    for key, hook in (("feature_input_hook", hook_in), ("feature_output_hook", hook_out)):
        if re.search(r'["\\]', hook) or not hook.isprintable():
            raise ValueError(f"{key} must be printable text without quotes, got {hook!r}")
        if hook:
            plain = re.fullmatch(r"[\w.\-/\[\]]+", hook)
            lines.append(f"{key}: {hook}" if plain else f'{key}: "{hook}"')
    return "\n".join(lines) + "\n"
