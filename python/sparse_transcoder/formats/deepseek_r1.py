"""qresearch's SAEs of DeepSeek-R1's residual stream: one file with l{i} in its name, relu.

The layout is that of https://huggingface.co/qresearch/DeepSeek-R1-Distill-Llama-8B-SAE-l19.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..weights import TranscoderWeights
from .files import Loading, read_pickled
from .layout import Layout, files_with, number_in

FILE = re.compile(r"(?:.*[-_.])?l(\d{1,9})(?:[-_.].*)?\.pth?")


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    tensors = read_pickled(path)
    W_enc, b_enc = tensors.take("encoder.weight", 2), tensors.take("encoder.bias", 1)
    W_dec, b_dec = tensors.take("decoder.weight", 2), tensors.take("decoder.bias", 1)
    tensors.finish()
    return loading.weights(
        layer,
        path,
        W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        hook_in="hook_resid_post",
        hook_out="hook_resid_post",
    )


LAYOUT = Layout(
    "DeepSeek-R1 SAE", files_with(FILE, "encoder.weight", "decoder.weight"), number_in(FILE), load
)
