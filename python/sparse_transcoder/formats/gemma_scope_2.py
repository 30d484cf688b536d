"""Gemma Scope 2: params.safetensors and perhaps config.json, JumpReLU, w_enc stored [H, F].

The layout is that of https://huggingface.co/google/gemma-scope-2.
"""

from __future__ import annotations

from pathlib import Path

from ..weights import TranscoderWeights
from .files import Config, Loading, is_there, read_safetensors
from .layout import Layout, not_declared, one_file


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    config_path = path.with_name("config.json")
    config = Config(config_path) if is_there(config_path) else Config(config_path, {})
    config.only("architecture", config.get("architecture", str, "jump_relu"), ("jump_relu",))
    tensors = read_safetensors(path)
    decoder = tensors.left.get("w_dec")
    if decoder is not None and decoder.ndim == 3:
        raise ValueError(
            f"{path}: a crosscoder or cross-layer transcoder (w_dec {list(decoder.shape)}) is not "
            "supported"
        )
    W_enc, W_dec = tensors.take("w_enc", 2).T, tensors.take("w_dec", 2).T
    b_enc, b_dec, threshold = (tensors.take(name, 1) for name in ("b_enc", "b_dec", "threshold"))
    skip = tensors.take_if_there("affine_skip_connection", 2)  # [in, out]
    if config.get("affine_connection", bool, skip is not None) != (skip is not None):
        raise ValueError(
            f"{path}: affine_skip_connection must be there exactly when config.json says "
            "affine_connection"
        )
    tensors.finish()
    return loading.weights(
        layer,
        path,
        W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        threshold=threshold,
        W_skip=None if skip is None else skip.T,
        hook_in=config.get("hf_hook_point_in", str, ""),
        hook_out=config.get("hf_hook_point_out", str, ""),
    )


LAYOUT = Layout("Gemma Scope 2", one_file("params.safetensors"), not_declared, load)
