"""Llama Scope as first published: hyperparams.json and checkpoints/final.safetensors.

The layout is that of https://huggingface.co/fnlp/Llama-Scope, written by lm_saes, the early form of
https://github.com/OpenMOSS/Language-Model-SAEs.

With s_in = sqrt(H) / average norm of the input, and s_out likewise of the output, a feature
computes pre = w @ (s_in x) + b. When lm_saes loads such a file, it moves both scales into the
parameters, then the length of each decoder direction d into the encoder, and only then compares
with the scalar jump_relu_threshold: the feature passes where pre * |d| / s_out is strictly above
it. SAELens multiplies the threshold by s_in, which is the same where |d| is 1 and the coder writes
to the place that it reads. Here the value stays pre, and the gate is that of lm_saes.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ..weights import TranscoderWeights
from . import llamascopium
from .files import Config, Loading, Tensors, layer_in, read_safetensors, short_hook
from .layout import Layout

KNOWN = llamascopium.KNOWN | frozenset(
    "apply_decoder_bias_to_pre_encoder d_sae dataset_average_activation_norm ddp_size "
    "decoder_exactly_fixed_norm exp_name init_decoder_norm init_encoder_norm "
    "init_encoder_with_decoder_transpose initial_k jump_relu_threshold k_warmup_steps "
    "l1_coefficient l1_coefficient_warmup_steps lp seed tp_size use_batch_norm_mse "
    "use_ghost_grads".split()
)


def recognises(folder: Path, names: frozenset[str]) -> list[Path]:
    path = folder / "checkpoints" / "final.safetensors"
    return [path] if {"hyperparams.json", "checkpoints"} <= names and path.exists() else []


def _config(path: Path) -> Config:
    return Config(path.parent.with_name("hyperparams.json"))


def layer_of(path: Path) -> int | None:
    return layer_in(_config(path).get("hook_point_in", str, ""))


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    config = _config(path)
    config.must_be_off("use_glu_encoder", "apply_decoder_bias_to_pre_encoder")
    activation = config.get("act_fn", str, "relu").lower()
    config.only("act_fn", activation, ("relu", "jumprelu", "topk"))
    level = 0.0 if activation == "relu" else config.number("jump_relu_threshold")
    if activation == "topk" and level <= 0:
        raise config.refuse("act_fn topk without a jump_relu_threshold is not supported")
    tensors = read_safetensors(path)
    W_enc = tensors.take("encoder.weight", 2)
    s_in, s_out = scales(config, tensors, W_enc.shape[1])
    W_dec = tensors.left.get("decoder.weight")
    threshold = None
    if activation != "relu" and W_dec is not None and W_dec.ndim == 2:
        rescaled = config.get("sparsity_include_decoder_norm", bool, True)
        levels = torch.full(W_enc.shape[:1], level * (s_out if rescaled else s_in)).double()
        threshold = llamascopium.gate(levels, W_dec.T if rescaled else None)
    return scaled(layer, path, loading, config, tensors, W_enc, (s_in, s_out), threshold)


def scales(config: Config, tensors: Tensors, hidden: int) -> tuple[float, float]:
    """sqrt(H) / average norm, of the input and of the output. The norms may lie in the file."""
    kind = config.get("norm_activation", str, "dataset-wise")
    config.only("norm_activation", kind, ("dataset-wise", "inference"))
    prefix = "dataset_average_activation_norm"
    if kind == "inference":
        tensors.drop(rf"{prefix}\..*")  # They are not applied, and may hold garbage.
        return 1.0, 1.0
    declared, found = config.within(prefix), []
    for side in ("in", "out"):
        place = config.get(f"hook_point_{side}", str, "")
        names = [name for name in (side, place) if name in declared.values]
        if names:
            found.append(declared.number(names[0]))
        else:
            found.append(_stored_norm(config, tensors, f"{prefix}.{place}"))
    tensors.drop(rf"{prefix}\..*")
    for norm in found:
        if not math.isfinite(norm) or norm <= 0:
            raise config.refuse(f"{prefix} must be above 0, got {norm}")
    return math.sqrt(hidden) / found[0], math.sqrt(hidden) / found[1]


def _stored_norm(config: Config, tensors: Tensors, name: str) -> float:
    """The same hook point may be input and output, and its norm is stored once."""
    tensor = tensors.left.get(name)
    if tensor is None or tensor.numel() != 1:
        raise config.refuse(f"norm_activation dataset-wise needs {name}, got none")
    return float(tensor)


def scaled(
    layer: int,
    path: Path,
    loading: Loading,
    config: Config,
    tensors: Tensors,
    W_enc: torch.Tensor,
    scale: tuple[float, float],
    threshold: torch.Tensor | None,
) -> TranscoderWeights:
    """The coder with the scales of its input and output in W_enc [F, H] and W_dec [d_out, F]."""
    b_enc, W_dec = tensors.take("encoder.bias", 1), tensors.take("decoder.weight", 2)
    b_dec = tensors.take_if_there("decoder.bias", 1)
    tensors.finish()
    s_in, s_out = scale
    features, hidden = W_enc.shape
    config.sizes(d_model=hidden, d_sae=features, expansion_factor=features / max(hidden, 1))
    loading.tell_unknown(layer, config, KNOWN)
    return loading.weights(
        layer,
        path,
        W_enc if s_in == 1 else W_enc.float() * s_in,
        b_enc=b_enc,
        W_dec=W_dec if s_out == 1 else W_dec.float() / s_out,
        b_dec=b_dec if b_dec is None or s_out == 1 else b_dec.float() / s_out,
        threshold=threshold,
        hook_in=short_hook(config.get("hook_point_in", str, ""), layer),
        hook_out=short_hook(config.get("hook_point_out", str, ""), layer),
    )


LAYOUT = Layout("Llama Scope", recognises, layer_of, load)
