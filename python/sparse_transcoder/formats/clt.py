"""circuit-tracer: sets of per-layer transcoders, which C++ reads, and cross-layer transcoders."""

from __future__ import annotations

import re
from pathlib import Path

from .. import _C
from ..weights import TranscoderWeights, _from_native
from .files import Loading, is_there, read_safetensors


def load_set(folder: Path, layers: list[int], loading: Loading) -> dict[int, TranscoderWeights]:
    loaded = _C.load_weights(str(folder), layers, loading.device)
    return {layer: _from_native(layer, weights) for layer, weights in loaded.items()}


def config_text(path: Path) -> str:
    return path.read_bytes()[:1_000_000].decode(errors="replace") if is_there(path) else ""


def top_level(path: Path) -> dict[str, str]:
    """The plain ``key: value`` lines of a config.yaml."""
    values = {}
    for line in config_text(path).splitlines():
        key, _, value = line.partition(":")
        if re.fullmatch(r"\w+", key) and value[:1].isspace():
            value = value.strip()
            quoted = re.match(r"\"([^\"]*)\"|'([^']*)'", value)
            values[key] = quoted[1] or quoted[2] or "" if quoted else re.split(r"(?:^|\s)#", value)[0].strip()
    return values


def load_clt_layer(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    """Layer i of a cross-layer transcoder; W_dec is a view [n * H, F]: what each feature writes to layers i .. i + n - 1."""
    config = top_level(path.with_name("config.yaml"))
    encoder = read_safetensors(path)
    decoder_path = path.with_name(f"W_dec_{layer}.safetensors")
    decoder = read_safetensors(decoder_path)
    W_enc, b_enc, b_dec = (
        encoder.take(f"{name}_{layer}", ndim) for name, ndim in (("W_enc", 2), ("b_enc", 1), ("b_dec", 1))
    )
    threshold = encoder.take_if_there(f"threshold_{layer}", 1)
    written = decoder.take(f"W_dec_{layer}", 3)  # [F, n, H]
    encoder.finish()
    decoder.finish()
    features, hidden = W_enc.shape
    if written.shape[0] != features or written.shape[2] != hidden or not written.shape[1]:
        raise ValueError(
            f"{decoder_path}: W_dec_{layer} must be [{features}, n, {hidden}] like W_enc, got {list(written.shape)}"
        )
    return loading.weights(
        layer,
        path,
        W_enc,
        b_enc=b_enc,
        W_dec=written.reshape(features, -1).T,
        b_dec=b_dec,
        threshold=threshold,
        hook_in=config.get("feature_input_hook", ""),
        hook_out=config.get("feature_output_hook", ""),
    )
