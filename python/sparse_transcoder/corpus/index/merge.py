"""The parts of a corpus merged by feature, in external memory."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..files import Array
from ..read import Corpus

BLOCK = 1 << 22
"""Entries of a block: what is held at a time."""


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Every entry of the features [first, first + len(begin) - 1) of a layer."""

    layer: int
    first: int
    begin: Array
    """[features + 1]: feature first + i has entries begin[i] to begin[i + 1]."""
    positions: Array
    """[M] int64: window * ctx + position, ascending per feature."""
    activations: Array
    """[M] float32."""

    def __iter__(self) -> Iterator[tuple[int, Array, Array]]:
        """(feature, positions, activations)."""
        for i in range(len(self.begin) - 1):
            entries = slice(self.begin[i], self.begin[i + 1])
            yield self.first + i, self.positions[entries], self.activations[entries]


def blocks(corpus: Corpus, layer: int, folder: Path) -> Iterator[Block]:
    """The features of a layer, in ascending order. Each part is sorted by feature and put into
    ``folder``, then all are read side by side. Rows that were not finite are left out."""
    features = corpus.features(layer)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        runs = [
            _sorted_part(corpus, part, layer, Path(scratch) / f"{part}")
            for part in range(corpus.part_count)
        ]
        counts = np.sum([np.diff(begin) for begin, _, _ in runs], axis=0)
        first = 0
        while first < features:
            fits = int(np.searchsorted(counts[first:].cumsum(), BLOCK, "right"))
            last = min(features, first + max(1, fits))
            found = [
                (
                    np.repeat(np.arange(first, last), np.diff(begin[first : last + 1])),
                    np.asarray(positions[begin[first] : begin[last]]),
                    np.asarray(activations[begin[first] : begin[last]]),
                )
                for begin, positions, activations in runs
            ]
            ids, positions, activations = (
                np.concatenate(parts) for parts in zip(*found, strict=True)
            )
            order = np.argsort(ids, kind="stable")
            begin = np.concatenate([[0], counts[first:last].cumsum()])
            yield Block(layer, first, begin, positions[order], activations[order])
            first = last


def _sorted_part(corpus: Corpus, part: int, layer: int, path: Path) -> tuple[Array, Array, Array]:
    """(begin [F + 1], positions, activations) of a part, by feature; the latter two as maps."""
    read = corpus.part(part)
    entries = read.layers[layer]
    finite = ~np.isnan(entries.activations)
    features = np.asarray(entries.features)[finite]
    row_count: Array = np.diff(entries.row_begin.astype(np.int64))
    positions = np.repeat(read.positions + read.first_window * corpus.ctx, row_count)[finite]
    order = np.argsort(features, kind="stable")
    begin = np.zeros(corpus.features(layer) + 1, np.int64)
    np.cumsum(np.bincount(features, minlength=corpus.features(layer)), out=begin[1:])
    maps = []
    for name, values in (
        ("positions", positions[order]),
        ("activations", np.asarray(entries.activations)[finite][order].astype(np.float32)),
    ):
        file = path.with_name(f"{path.name}.{name}")
        values.tofile(file)
        maps.append(np.memmap(file, values.dtype, "r") if len(values) else values)
    return begin, maps[0], maps[1]
