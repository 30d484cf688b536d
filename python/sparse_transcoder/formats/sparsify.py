"""sparsify: top-k transcoders and SAEs, one folder per hook point.

The layout is that of https://github.com/EleutherAI/sparsify.
"""

from __future__ import annotations

from pathlib import Path

from ..weights import TranscoderWeights
from .files import Config, Loading, read_safetensors
from .layout import Layout, not_declared, one_file


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    config = Config(path.with_name("cfg.json"))
    config.only("activation", config.get("activation", str, "topk"), ("topk",))
    config.must_be_off("signed")
    transcode = config.get("transcode", bool, False)
    tensors = read_safetensors(path)
    W_enc, b_enc = tensors.take("encoder.weight", 2), tensors.take("encoder.bias", 1)
    W_dec, b_dec = tensors.take("W_dec", 2).T, tensors.take("b_dec", 1)
    W_skip = tensors.take_if_there("W_skip", 2)
    if config.get("skip_connection", bool, W_skip is not None) != (W_skip is not None):
        raise ValueError(f"{path}: W_skip must be there exactly when cfg.json says skip_connection")
    tensors.finish()
    hook_in, hook_out = _hooks(path.parent.name, transcode)
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
        hook_in=hook_in,
        hook_out=hook_out,
    )


def _hooks(hookpoint: str, transcode: bool) -> tuple[str, str]:
    """Where a coder reads and writes. An SAE reads what it reconstructs."""
    if hookpoint.endswith(".mlp"):
        return "mlp.hook_in" if transcode else "mlp.hook_out", "mlp.hook_out"
    if hookpoint.startswith("layers."):
        return "hook_resid_pre" if transcode else "hook_resid_post", "hook_resid_post"
    return "", ""


LAYOUT = Layout("sparsify", one_file("sae.safetensors", "cfg.json"), not_declared, load)
