"""The specification in plain torch: what the engine computes, in its simplest form.

It works on dense matrices and holds [rows, features]. It is slow, and made for tests and reading.
"""

from __future__ import annotations

import torch

from .weights import TranscoderWeights


def encode(
    hidden: torch.Tensor,
    weights: TranscoderWeights,
    top_k: int | None = 20,
    activation_threshold: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Top-k features of ``hidden`` [.., H], computed in ``dtype``.

    Returns:
        (activations [.., K], indices [.., K], sparsity [..]), with K = min(top_k, F).
    """
    x = hidden.to(dtype)
    if weights.input_bias is not None:
        x = x - weights.input_bias.to(dtype)
    if weights.ln_weight is not None and weights.ln_bias is not None:
        scale, shift = weights.ln_weight.to(dtype), weights.ln_bias.to(dtype)
        x = torch.nn.functional.layer_norm(x, x.shape[-1:], scale, shift)
    pre = x @ weights.W_enc.to(dtype).T + weights.b_enc.to(dtype)

    active = pre > 0
    if weights.threshold is not None:  # JumpReLU is strict.
        active &= pre > weights.threshold.to(dtype)
    if weights.k is not None and weights.k < pre.shape[-1]:  # Among ties the lower index wins.
        largest = torch.sort(pre, dim=-1, descending=True, stable=True).indices[..., : weights.k]
        active &= torch.zeros_like(active).scatter_(-1, largest, True)
    kept = active & (pre >= activation_threshold)  # inclusive

    masked = torch.where(kept, pre, 0)
    k = weights.k if top_k is None else top_k
    activations, indices = torch.sort(masked, dim=-1, descending=True, stable=True)
    sparsity = kept.to(dtype).mean(dim=-1)
    finite = hidden.isfinite().all(dim=-1)
    activations = torch.where(finite[..., None], activations, torch.nan)
    return activations[..., :k], indices[..., :k], torch.where(finite, sparsity, torch.nan)
