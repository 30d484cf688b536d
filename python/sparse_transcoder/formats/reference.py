"""The reference project's transcoder_L{n}.pt: a decoder, and an encoder with LayerNorm.

The encoder may be tied to the decoder. Then it has no LayerNorm of its own.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ..weights import TranscoderWeights
from .files import Loading, read_pickled
from .layout import Layout, number_in, numbered_files

FILE = re.compile(r"transcoder_L(\d{1,9})\.pt")


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    tensors = read_pickled(path, "state_dict")
    W_dec = tensors.take("dec.weight", 2)
    b_dec = tensors.take_if_there("dec.bias", 1)
    ln_weight = ln_bias = None
    if "enc.0.weight" in tensors or "enc.0.bias" in tensors:
        ln_weight, ln_bias = tensors.take("enc.0.weight", 1), tensors.take("enc.0.bias", 1)
    if "enc.1.weight" in tensors:
        W_enc, b_enc = tensors.take("enc.1.weight", 2), tensors.take("enc.1.bias", 1)
    else:  # The encoder is tied to the decoder.
        W_enc = W_dec.T
        b_enc = torch.zeros(W_enc.shape[0], dtype=W_enc.dtype)
    tensors.finish()
    return loading.weights(
        layer,
        path,
        W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        ln_weight=ln_weight,
        ln_bias=ln_bias,
    )


LAYOUT = Layout("reference", numbered_files(FILE), number_in(FILE), load)
