"""dictionary_learning: ae.pt beside config.json, which names the class of the coder.

The layout is that of https://github.com/saprmarks/dictionary_learning.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..weights import TranscoderWeights
from .files import Config, Loading, read_pickled
from .layout import Layout, one_file

CLASSES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)


def layer_of(path: Path) -> int | None:
    trainer = Config(path.with_name("config.json")).within("trainer")
    layer: int | None = trainer.get("layer", int, None)
    if layer is not None and not 0 <= layer < 1_000_000:
        raise trainer.refuse(f"layer must be the index of a layer, got {layer}")
    return layer


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    config = Config(path.with_name("config.json")).within("trainer")
    kind = config.only("dict_class", config.need("dict_class", str), CLASSES)
    tensors = read_pickled(path)
    threshold, k = None, None
    if kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        W_enc, b_enc = tensors.take("W_enc", 2).T, tensors.take("b_enc", 1)
        W_dec = tensors.take("W_dec", 2).T
    else:
        W_enc, b_enc = tensors.take("encoder.weight", 2), tensors.take("encoder.bias", 1)
        W_dec = tensors.take("decoder.weight", 2)
    b_dec = tensors.take(
        {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec"), 1
    )
    if kind == "AutoEncoder":
        W_enc, b_enc, W_dec = _unit_decoder(path, W_enc, b_enc, W_dec)
    elif kind == "AutoEncoderTopK":
        k = tensors.take_integer("k")
        if k != config.get("k", int, k) or k < 1:
            declared = config.get("k", int, k)
            raise ValueError(
                f"{path}: k must be {declared} as in config.json and at least 1, got {k}"
            )
        tensors.drop("threshold")  # It belongs to training: the encoder does not use it.
    elif kind == "JumpReluAutoEncoder":
        threshold = tensors.take("threshold", 1)
    elif "BatchTopK" in kind:
        # A relu, then one strict threshold for all features. k and the groups belong to training.
        one = tensors.take("threshold", 0).to(torch.float32)
        threshold = one.expand(W_enc.shape[0]).clone()
        tensors.drop("k|group_sizes")
    tensors.finish()
    hook = config.get("submodule_name", str, "")
    return loading.weights(
        layer,
        path,
        W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        threshold=threshold,
        k=k,
        input_bias=None if kind in ("AutoEncoderNew", "JumpReluAutoEncoder") else b_dec,
        hook_in=hook,
        hook_out=hook,
    )


def _unit_decoder(
    path: Path, W_enc: torch.Tensor, b_enc: torch.Tensor, W_dec: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the project's loader does: the lengths of decoder directions go to the activations."""
    if W_dec.shape[1] != W_enc.shape[0] or b_enc.shape != W_enc.shape[:1]:
        return W_enc, b_enc, W_dec  # Its shape is refused later.
    norm = torch.linalg.vector_norm(W_dec, dim=0, dtype=torch.float32)
    if torch.allclose(norm, torch.ones_like(norm)):
        return W_enc, b_enc, W_dec
    if not bool((norm > 0).all()):
        raise ValueError(
            f"{path}: decoder.weight must have no column of zeros, "
            f"got feature {int((norm > 0).int().argmin())}"
        )
    return W_enc * norm[:, None], b_enc * norm, W_dec / norm


LAYOUT = Layout("dictionary_learning", one_file("ae.pt", "config.json"), layer_of, load)
