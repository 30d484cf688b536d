"""sparsify (EleutherAI): top-k transcoders and SAEs, a folder per hook point."""

from __future__ import annotations

from pathlib import Path

from ..weights import TranscoderWeights
from .files import Config, Loading, read_safetensors


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    config = Config(path.with_name("cfg.json"))
    config.only("activation", config.get("activation", str, "topk"), ("topk",))
    config.only("signed", config.get("signed", bool, False), (False,))
    transcode = config.get("transcode", bool, False)
    tensors = read_safetensors(path)
    W_enc, b_enc = tensors.take("encoder.weight", 2), tensors.take("encoder.bias", 1)
    W_dec, b_dec = tensors.take("W_dec", 2).T, tensors.take("b_dec", 1)
    W_skip = tensors.take_if_there("W_skip", 2)
    if config.get("skip_connection", bool, W_skip is not None) != (W_skip is not None):
        raise ValueError(f"{path}: W_skip must be there exactly when cfg.json says skip_connection")
    tensors.finish()
    hookpoint = path.parent.name
    hook = (
        "mlp.hook_out" if hookpoint.endswith(".mlp") else "hook_resid_post" if hookpoint.startswith("layers.") else ""
    )
    return loading.weights(
        layer,
        path,
        W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        k=config.k(),
        W_skip=W_skip,
        input_bias=None if transcode else b_dec,
        hook_in=hook.replace("hook_out", "hook_in").replace("resid_post", "resid_pre") if transcode else hook,
        hook_out=hook,
    )
