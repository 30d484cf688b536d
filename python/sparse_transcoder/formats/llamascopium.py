"""llamascopium (Llama Scope): config.json beside sae_weights.safetensors, W_E stored [H, F].

The layout is that of https://github.com/OpenMOSS/Language-Model-SAEs.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .. import _C
from ..weights import TranscoderWeights
from .files import Config, Loading, layer_in, read_safetensors, short_hook
from .layout import Layout, one_file

LARGEST = torch.finfo(torch.float32).max

has_files = one_file("sae_weights.safetensors", "config.json")


def recognises(folder: Path, names: frozenset[str]) -> list[Path]:
    """SAELens has the same weights file: where both configs are there, the keys decide."""
    found = has_files(folder, names)
    if found and "cfg.json" in names and "W_E" not in _C.read_safetensors(str(found[0])):
        return []
    return found


def layer_of(path: Path) -> int | None:
    return layer_in(Config(path.with_name("config.json")).get("hook_point_in", str, ""))


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    config = Config(path.with_name("config.json"))
    config.only("sae_type", config.get("sae_type", str, "sae"), ("sae",))
    config.must_be_off("use_glu_encoder")
    config.only(
        "norm_activation", config.get("norm_activation", str, "dataset-wise"), ("inference",)
    )
    activation = config.get("act_fn", str, "relu").lower()
    config.only("act_fn", activation, ("relu", "jumprelu", "topk"))
    rescaled = config.get("sparsity_include_decoder_norm", bool, True)
    if activation == "topk" and rescaled:
        raise config.refuse("act_fn topk with sparsity_include_decoder_norm is not supported")

    tensors = read_safetensors(path)
    # The stored norms may hold garbage, and inference does not apply them.
    tensors.drop(r"dataset_average_activation_norm\..*")
    W_enc, b_enc = tensors.take("W_E", 2).T, tensors.take("b_E", 1)
    W_dec = tensors.take("W_D", 2)
    b_dec = tensors.take("b_D", 1) if config.get("use_decoder_bias", bool, True) else None
    threshold, k = None, None
    if activation == "jumprelu":
        logarithm = tensors.take("activation_function.log_jumprelu_threshold", 1)
        threshold = logarithm.to(torch.float64).exp()
        if rescaled and threshold.shape == W_dec.shape[:1]:
            # A feature passes where pre * norm > threshold. Where the norm is 0 nothing passes.
            norm = torch.linalg.vector_norm(W_dec, dim=1, dtype=torch.float32).to(torch.float64)
            threshold = torch.where(norm > 0, threshold / norm, LARGEST)
        threshold = threshold.clamp(max=LARGEST).to(torch.float32)
    if activation == "topk":
        k = config.k("top_k", 50)
    tensors.finish()
    return loading.weights(
        layer,
        path,
        W_enc,
        b_enc=b_enc,
        W_dec=W_dec.T,
        b_dec=b_dec,
        threshold=threshold,
        k=k,
        hook_in=short_hook(config.get("hook_point_in", str, "")),
        hook_out=short_hook(config.get("hook_point_out", str, "")),
    )


LAYOUT = Layout("llamascopium", recognises, layer_of, load)
