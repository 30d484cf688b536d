"""The logit lens: which tokens a feature's decoder direction makes likelier, and which less so.
Also what directions are alike."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ...encoder import SparseTranscoderEncoder
from ...weights import TranscoderWeights
from ..files import Array

COUNT, ROWS = 10, 4096
BINS, NEAREST = 50, 20
TOGETHER = 64
"""Features whose logits are in memory at once."""


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


class Directions:
    """More of a layer's decoder directions, for some features at a time.

    Args:
        tokens: as :func:`unembedding` makes it.
        W_dec: [H, F].
    """

    def __init__(self, tokens: SparseTranscoderEncoder, W_dec: torch.Tensor) -> None:
        self._W_U = tokens._transcoders[0].W_enc
        self._rows = W_dec.detach().T.to(self._W_U.device).float()
        self._units = torch.nn.functional.normalize(self._rows, dim=1)
        weights = TranscoderWeights(self._units, self._units.new_zeros(len(self._units)))
        count = min(NEAREST + 1, len(self._units))
        self._encoder = SparseTranscoderEncoder({0: weights}, count, 0.0)

    def histograms(self, first: int, last: int) -> list[tuple[list[int], list[float]]]:
        """Of each feature from first to last - 1: how many of its V logits fall into each of 50
        equal intervals between the smallest and the largest, and the intervals' middles."""
        W_U = self._W_U.float()
        found: list[tuple[list[int], list[float]]] = []
        for begin in range(first, last, TOGETHER):
            logits = self._rows[begin : min(begin + TOGETHER, last)] @ W_U.T
            low, high = (bound[:, None] for bound in logits.aminmax(dim=1))
            size = (high - low).clamp(min=torch.finfo(torch.float32).tiny) / BINS
            interval = ((logits - low) / size).long().clamp(max=BINS - 1)
            rows = torch.arange(len(logits), device=logits.device)[:, None]
            counts = torch.bincount((interval + BINS * rows).flatten(), minlength=BINS * len(rows))
            middles = low + size * (torch.arange(BINS, device=logits.device) + 0.5)
            heights = counts.view(-1, BINS)
            found += zip(heights.tolist(), middles.tolist(), strict=True)
        return found

    def nearest(self, first: int, last: int) -> list[tuple[list[int], list[float]]]:
        """Of each feature from first to last - 1: the other features whose directions have the
        largest cosines with its own, at most 20 and all above 0, and these cosines."""
        result = self._encoder.encode_layer(0, self._units[first:last])
        lists = zip(result["indices"].tolist(), result["activations"].tolist(), strict=True)
        found = []
        for feature, (indices, cosines) in enumerate(lists, first):
            pairs = zip(indices, cosines, strict=True)
            others = [(i, cosine) for i, cosine in pairs if i != feature and cosine > 0][:NEAREST]
            found.append(([i for i, _ in others], [cosine for _, cosine in others]))
        return found
