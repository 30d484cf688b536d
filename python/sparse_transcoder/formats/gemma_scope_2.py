"""Gemma Scope 2: params.safetensors and perhaps config.json, JumpReLU, w_enc stored [H, F].

The layout is that of https://huggingface.co/google/gemma-scope-2.
"""

from __future__ import annotations

from pathlib import Path

from ..weights import TranscoderWeights
from .files import Config, Loading, is_there, layer_in, read_safetensors
from .layout import Layout, one_file

KNOWN = frozenset(
    "affine_connection architecture dtype hf_hook_point_in hf_hook_point_out l0 model_name type "
    "width".split()
)


def config_of(path: Path) -> Config:
    """The config.json beside a weights file, which may be absent."""
    config_path = path.with_name("config.json")
    return Config(config_path) if is_there(config_path) else Config(config_path, {})


def layer_of(path: Path) -> int | None:
    """The folder of a checkpoint carries its layer; a hook that is recorded tells it too."""
    if layer_in(path.parent.name) is not None:
        return None
    return layer_in(config_of(path).get("hf_hook_point_in", str, ""))


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    config = config_of(path)
    config.only("architecture", config.get("architecture", str, "jump_relu"), ("jump_relu",))
    tensors = read_safetensors(path)
    decoder = tensors.left.get("w_dec")
    if decoder is not None and decoder.ndim == 3:
        raise ValueError(
            f"{path}: a crosscoder (w_dec {list(decoder.shape)}) is not supported; a cross-layer "
            "transcoder lies in files params_layer_{i}.safetensors"
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
    if isinstance(config.values.get("width"), int):  # Some have a word like 16k.
        config.sizes(width=W_enc.shape[0])
    loading.tell_unknown(layer, config, KNOWN)
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


LAYOUT = Layout("Gemma Scope 2", one_file("params.safetensors"), layer_of, load)
