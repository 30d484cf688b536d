"""circuit-tracer's cross-layer transcoders: W_enc_{i}.safetensors beside W_dec_{i}.safetensors.

The layout is that of https://github.com/safety-research/circuit-tracer.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..weights import TranscoderWeights
from .files import Loading, read_safetensors, yaml_values
from .layout import Layout, number_in, numbered_files

FILE = re.compile(r"W_enc_(\d{1,9})\.safetensors")


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    """W_dec is a view [n * H, F] of the file: what each feature writes to n layers from this on."""
    config = yaml_values(path.with_name("config.yaml"))
    encoder = read_safetensors(path)
    decoder_path = path.with_name(f"W_dec_{layer}.safetensors")
    decoder = read_safetensors(decoder_path)
    W_enc = encoder.take(f"W_enc_{layer}", 2)
    b_enc, b_dec = encoder.take(f"b_enc_{layer}", 1), encoder.take(f"b_dec_{layer}", 1)
    threshold = encoder.take_if_there(f"threshold_{layer}", 1)
    written = decoder.take(f"W_dec_{layer}", 3)  # [F, n, H]
    encoder.finish()
    decoder.finish()
    features, hidden = W_enc.shape
    if written.shape[0] != features or written.shape[2] != hidden or not written.shape[1]:
        raise ValueError(
            f"{decoder_path}: W_dec_{layer} must be [{features}, n, {hidden}] like W_enc, "
            f"got {list(written.shape)}"
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


LAYOUT = Layout("circuit-tracer CLT", numbered_files(FILE), number_in(FILE), load)
