"""Qwen-Scope: layer{i}.sae.pt without a config, top-k coders of the residual stream.

The layout is that of https://huggingface.co/collections/Qwen/qwen-scope. Their k stands in the name
of the repository alone, e.g. SAE-Res-Qwen3-8B-Base-W64K-L0_50.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..weights import TranscoderWeights
from .files import Loading, read_pickled
from .layout import Layout, number_in, numbered_files

FILE = re.compile(r"layer(\d{1,9})\.sae\.pt")


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    """W_enc is stored [F, H] and W_dec [H, F], as they are used."""
    tensors = read_pickled(path)
    W_enc, W_dec = tensors.take("W_enc", 2), tensors.take("W_dec", 2)
    b_enc, b_dec = tensors.take("b_enc", 1), tensors.take("b_dec", 1)
    tensors.finish()
    return loading.weights(
        layer,
        path,
        W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        k=loading.k_of(path, _k_of_folders(path)),
        hook_in="hook_resid_post",
        hook_out="hook_resid_post",
    )


def _k_of_folders(path: Path) -> int | None:
    """The k in the name of a folder like ..-W64K-L0_50, which a download cache keeps."""
    for name in reversed(path.absolute().parts[:-1]):
        if found := re.search(r"-W\d+K-L0_([1-9]\d{0,8})(?!\d)", name):
            return int(found[1])
    return None


LAYOUT = Layout("Qwen-Scope", numbered_files(FILE), number_in(FILE), load)
