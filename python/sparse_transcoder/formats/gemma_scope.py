"""Gemma Scope: params.npz, JumpReLU, W_enc stored [H, F].

The layout is that of https://huggingface.co/google/gemma-scope-2b-pt-transcoders.
"""

from __future__ import annotations

from pathlib import Path

from ..weights import TranscoderWeights
from .files import Loading, read_npz
from .layout import Layout, not_declared, one_file


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    tensors = read_npz(path)
    W_enc, W_dec = tensors.take("W_enc", 2).T, tensors.take("W_dec", 2).T
    b_enc, b_dec, threshold = (tensors.take(name, 1) for name in ("b_enc", "b_dec", "threshold"))
    tensors.finish()
    return loading.weights(
        layer, path, W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, threshold=threshold
    )


LAYOUT = Layout("Gemma Scope", one_file("params.npz"), not_declared, load)
