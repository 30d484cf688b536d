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


KNOWN = frozenset(
    "activation_dim auxk_alpha bandwidth dead_feature_threshold decay_start device "
    "dict_class dict_size group_fractions group_sizes group_weights k k_anneal_steps "
    "l1_penalty layer lm_name lr resample_steps resample_threshold seed sparsity_penalty "
    "sparsity_warmup_steps steps submodule_name target_l0 threshold_beta "
    "threshold_start_step top_k_aux trainer_class wandb_name warmup_steps".split()
)


def layer_of(path: Path) -> int | None:
    trainer = Config(path.with_name("config.json")).within("trainer")
    layer: int | None = trainer.get("layer", int, None)
    if layer is not None and not 0 <= layer < 1_000_000:
        raise trainer.refuse(f"layer must be the index of a layer, got {layer}")
    return layer


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    whole = Config(path.with_name("config.json"))
    config, buffer = whole.within("trainer"), whole.within("buffer")
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
        declared = config.get("k", int, None)
        # Files older than the buffer have k in the config alone.
        k = loading.k_of(path, tensors.take_integer("k") if "k" in tensors else declared)
        if k != (k if declared is None else declared) or k < 1:
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
    features, hidden = W_enc.shape
    config.sizes(activation_dim=hidden, dict_size=features)
    loading.tell_unknown(layer, config, KNOWN)
    hook_in = hook_out = config.get("submodule_name", str, "")
    # The activations are the submodule's output, unless the buffer says otherwise.
    if hook_in and (io := buffer.get("io", str, "out")) != "out":
        buffer.only("io", io, ("out", "in", "in_and_out"))
        hook_in, hook_out = f"{hook_in}:input", f"{hook_in}:{'input' if io == 'in' else 'output'}"
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
        hook_in=hook_in,
        hook_out=hook_out,
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
