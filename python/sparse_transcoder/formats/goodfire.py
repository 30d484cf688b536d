"""Goodfire's SAEs of the residual stream: one file that ends in -l{i}.pt or -l{i}.pth, relu.

The layout is that of https://huggingface.co/Goodfire/Llama-3.1-8B-Instruct-SAE-l19.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..weights import TranscoderWeights
from .files import Loading, read_pickled
from .layout import Layout, files_with, number_in

FILE = re.compile(r"(?:.*[-_.])?l(\d{1,9})\.pth?")


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    tensors = read_pickled(path)
    W_enc, b_enc = tensors.take("encoder_linear.weight", 2), tensors.take("encoder_linear.bias", 1)
    W_dec, b_dec = tensors.take("decoder_linear.weight", 2), tensors.take("decoder_linear.bias", 1)
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
    "Goodfire",
    files_with(FILE, "encoder_linear.weight", "decoder_linear.weight"),
    number_in(FILE),
    load,
)
