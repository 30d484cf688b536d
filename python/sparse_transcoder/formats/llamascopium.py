"""llamascopium (Llama Scope): config.json beside sae_weights.safetensors, W_E stored [H, F]."""

from __future__ import annotations

from pathlib import Path

import torch

from ..weights import TranscoderWeights
from .files import Config, Loading, read_safetensors, short_hook

LARGEST = torch.finfo(torch.float32).max


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    config = Config(path.with_name("config.json"))
    config.only("sae_type", config.get("sae_type", str, "sae"), ("sae",))
    config.only("use_glu_encoder", config.get("use_glu_encoder", bool, False), (False,))
    config.only("norm_activation", config.get("norm_activation", str, "dataset-wise"), ("inference",))
    activation = config.get("act_fn", str, "relu").lower()
    config.only("act_fn", activation, ("relu", "jumprelu", "topk"))
    rescaled = config.get("sparsity_include_decoder_norm", bool, True)
    if activation == "topk" and rescaled:
        raise config.refuse("act_fn topk with sparsity_include_decoder_norm is not supported")

    tensors = read_safetensors(path)
    tensors.drop(r"dataset_average_activation_norm\..*")  # may hold garbage, and is not applied at inference
    W_enc, b_enc = tensors.take("W_E", 2).T, tensors.take("b_E", 1)
    W_dec = tensors.take("W_D", 2)
    b_dec = tensors.take("b_D", 1) if config.get("use_decoder_bias", bool, True) else None
    threshold, k = None, None
    if activation == "jumprelu":
        threshold = tensors.take("activation_function.log_jumprelu_threshold", 1).to(torch.float64).exp()
        if rescaled and threshold.shape == W_dec.shape[:1]:
            # pre * norm > threshold; where the norm is 0 nothing passes
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
