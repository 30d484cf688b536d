"""Gemma Scope 2's cross-layer transcoders: clt/{name}/params_layer_{i}.safetensors, JumpReLU.

The layout is that of https://huggingface.co/google/gemma-scope-2. w_enc is stored [H, F], w_dec
[F, L, H] for all L layers of the model, with zeros for the layers before this one.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..weights import TranscoderWeights
from .files import Loading, read_safetensors
from .gemma_scope_2 import KNOWN, config_of
from .layout import Layout, number_in, numbered_files

FILE = re.compile(r"params_layer_(\d{1,9})\.safetensors")


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    """W_dec is a view [n * H, F] of the file, for this layer and the n - 1 after it."""
    config = config_of(path)
    config.only("architecture", config.get("architecture", str, "jump_relu"), ("jump_relu",))
    tensors = read_safetensors(path)
    W_enc, w_dec = tensors.take("w_enc", 2).T, tensors.take("w_dec", 3)
    b_enc, b_dec, threshold = (tensors.take(name, 1) for name in ("b_enc", "b_dec", "threshold"))
    skip = tensors.take_if_there("affine_skip_connection", 2)  # [in, out]
    tensors.finish()
    features, hidden = W_enc.shape
    if w_dec.shape[0] != features or w_dec.shape[2] != hidden or w_dec.shape[1] <= layer:
        raise ValueError(
            f"{path}: w_dec must be [{features}, L, {hidden}] with L above layer {layer}, "
            f"got {list(w_dec.shape)}"
        )
    before, after = w_dec[:, :layer], w_dec[:, layer:]
    loading.left_to_scan -= before.nbytes
    if loading.left_to_scan >= 0 and bool(before.any()):
        raise ValueError(f"{path}: w_dec must be 0 for the layers before {layer}, got other values")
    loading.tell_unknown(layer, config, KNOWN)
    return loading.weights(
        layer,
        path,
        W_enc,
        b_enc=b_enc,
        W_dec=after.reshape(features, -1).T,
        b_dec=b_dec,
        write_layers=after.shape[1],
        threshold=threshold,
        W_skip=None if skip is None else skip.T,
        hook_in=config.get("hf_hook_point_in", str, "") or "mlp.hook_in",
        hook_out=config.get("hf_hook_point_out", str, ""),
    )


LAYOUT = Layout("Gemma Scope 2 CLT", numbered_files(FILE), number_in(FILE), load)
