"""What a person wants to see of a feature."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from ..files import Array
from ..read import Corpus
from .merge import Block

TOP, INTERVALS, PER_INTERVAL, BINS = 20, 5, 5, 40


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """A window in which a feature fires."""

    window: int
    peak: int
    """The position that it was chosen for."""
    tokens: Array
    """[ctx] token ids."""
    activations: Array
    """[ctx] float32; 0 where the feature is not kept."""


@dataclasses.dataclass(frozen=True, eq=False)
class Interval:
    """Examples whose activation is in [lower, upper], an equal share of 0 to the maximum."""

    lower: float
    upper: float
    share: float
    """Of the feature's entries."""
    examples: list[Example]


@dataclasses.dataclass(frozen=True, eq=False)
class Feature:
    layer: int
    feature: int
    count: int
    """Positions where it is kept."""
    density: float
    """count over recorded positions."""
    max: float
    mean: float
    quantiles: Array
    """[99] the upper bounds of its activations' percentiles 1 to 99; empty where count is 0."""
    histogram: Array
    """[40] counts from 0 to max; empty where count is 0."""
    tokens: list[tuple[int, float]]
    """The tokens that it fires on: (id, share of the sum of its activations), at most 10."""
    top: list[Example]
    """The windows of its largest activations, at most 20."""
    intervals: list[Interval]
    """From the strongest down, each with at most 5 windows, evenly spread over its entries."""


def features(corpus: Corpus, block: Block) -> Iterator[Feature]:
    tokens = corpus.tokens()
    for feature, positions, activations in block:
        yield _feature(corpus, tokens, block.layer, feature, positions, activations)


def _feature(
    corpus: Corpus, tokens: Array, layer: int, feature: int, positions: Array, activations: Array
) -> Feature:
    none = np.zeros(0, np.float32)
    if len(positions) == 0:
        return Feature(layer, feature, 0, 0.0, 0.0, 0.0, none, none, [], [], [])
    ctx, largest = corpus.ctx, float(activations.max())
    ids, which = np.unique(tokens.reshape(-1)[positions], return_inverse=True)
    sums = np.bincount(which, activations.astype(np.float64))
    strongest = np.argsort(-sums, kind="stable")[:10]

    def examples(entries: Array) -> list[Example]:
        """The windows of entries, each window once."""
        chosen: dict[int, int] = {}
        for position in positions[entries].tolist():
            chosen.setdefault(position // ctx, position % ctx)
            if len(chosen) == TOP:
                break
        return [example(window, peak) for window, peak in chosen.items()]

    def example(window: int, peak: int) -> Example:
        begin, end = np.searchsorted(positions, (window * ctx, (window + 1) * ctx))
        row = np.zeros(ctx, np.float32)
        row[positions[begin:end] % ctx] = activations[begin:end]
        return Example(window, peak, np.asarray(tokens[window]), row)

    order = np.argsort(-activations, kind="stable")
    edges = np.linspace(0, largest, INTERVALS + 1)
    of_interval = np.clip(np.ceil(activations / largest * INTERVALS), 1, INTERVALS) - 1
    intervals = []
    for i in range(INTERVALS - 1, -1, -1):
        inside = order[of_interval[order] == i]
        share = len(inside) / len(positions)
        ranks = np.linspace(0, len(inside) - 1, PER_INTERVAL).astype(np.int64)
        found = examples(inside[np.unique(ranks)]) if len(inside) else []
        intervals.append(Interval(float(edges[i]), float(edges[i + 1]), share, found))
    return Feature(
        layer,
        feature,
        len(positions),
        len(positions) / corpus.recorded,
        largest,
        float(activations.mean(dtype=np.float64)),
        np.quantile(activations, np.arange(1, 100) / 100),
        np.histogram(activations, BINS, (0, largest))[0],
        [(int(ids[i]), float(sums[i] / sums.sum())) for i in strongest],
        examples(order[: 50 * TOP]),
        intervals,
    )
