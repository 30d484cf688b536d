"""Llama Scope R1-Distill: config.json beside sae_weights.safetensors with log_jumprelu_threshold.

The layout is that of https://huggingface.co/fnlp/Llama-Scope-R1-Distill, written by lm_saes, the
early form of https://github.com/OpenMOSS/Language-Model-SAEs. A feature computes
pre = w @ (s_in x) + b with s_in = sqrt(H) / average norm of the input. It passes where pre, times
the length of its decoder direction with sparsity_include_decoder_norm, is strictly above exp of its
stored threshold. The value is pre.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..weights import TranscoderWeights
from .files import Config, Loading, layer_in, read_safetensors, safetensors_names
from .layout import Layout, one_file
from .llama_scope import scaled, scales
from .llamascopium import gate

has_files = one_file("sae_weights.safetensors", "config.json")


def recognises(folder: Path, names: frozenset[str]) -> list[Path]:
    found = has_files(folder, names)
    return found if found and "encoder.weight" in safetensors_names(found[0]) else []


def layer_of(path: Path) -> int | None:
    return layer_in(Config(path.with_name("config.json")).get("hook_point_in", str, ""))


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    config = Config(path.with_name("config.json"))
    config.only("sae_type", config.get("sae_type", str, "sae"), ("sae",))
    config.must_be_off("use_glu_encoder", "apply_decoder_bias_to_pre_encoder")
    config.only("act_fn", config.get("act_fn", str, "jumprelu").lower(), ("jumprelu",))
    tensors = read_safetensors(path)
    W_enc = tensors.take("encoder.weight", 2)
    scale = scales(config, tensors, W_enc.shape[1])
    name = "log_jumprelu_threshold"
    name = name if name in tensors else f"activation_function.{name}"
    threshold = tensors.take(name, 1).to(torch.float64).exp()
    W_dec = tensors.left.get("decoder.weight")
    rescaled = config.get("sparsity_include_decoder_norm", bool, True)
    threshold = gate(threshold, W_dec.T if rescaled and W_dec is not None else None)
    return scaled(layer, path, loading, config, tensors, W_enc, scale, threshold)


LAYOUT = Layout("Llama Scope R1-Distill", recognises, layer_of, load)
