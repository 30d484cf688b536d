"""The logit lens: which tokens a feature's decoder direction makes likelier, and which less so."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ...encoder import SparseTranscoderEncoder
from ...weights import TranscoderWeights
from ..files import Array

COUNT, ROWS = 10, 4096


@dataclasses.dataclass(frozen=True, eq=False)
class Logits:
    """Of all features of a layer, exactly: rows of ``W_dec.T @ W_U.T``, without a norm between."""

    top: Array
    """[F, 10] token ids, largest first."""
    top_values: Array
    """[F, 10] float32; 0 where fewer are positive."""
    bottom: Array
    """[F, 10] token ids, smallest first."""
    bottom_values: Array
    """[F, 10] float32."""


def unembedding(model: Any) -> SparseTranscoderEncoder:
    """An encoder whose features are the tokens of a model and whose rows are directions."""
    W_U = model.get_output_embeddings().weight.detach()
    weights = TranscoderWeights(W_U, torch.zeros(len(W_U), device=W_U.device))
    return SparseTranscoderEncoder({0: weights}, COUNT, 0.0)


def logits(tokens: SparseTranscoderEncoder, weights: TranscoderWeights) -> Logits | None:
    """None where the decoder writes to several layers or to a place of another width."""
    W_U = tokens._transcoders[0].W_enc
    W_dec = weights.W_dec
    if W_dec is None or W_dec.shape[0] != W_U.shape[1]:
        return None
    found: list[list[torch.Tensor]] = [[], [], [], []]
    for sign, ids, values in ((1, found[0], found[1]), (-1, found[2], found[3])):
        for first in range(0, W_dec.shape[1], ROWS):
            rows = W_dec[:, first : first + ROWS].detach().T.to(W_U.device).float() * sign
            result = tokens.encode_layer(0, rows)
            ids.append(result["indices"].cpu())
            values.append(result["activations"].cpu() * sign)
    return Logits(*(torch.cat(parts).numpy() for parts in found))
