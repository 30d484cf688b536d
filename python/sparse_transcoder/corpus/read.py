"""An encoded corpus, read back as memory maps."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from . import manifest as manifests
from .files import Array, read_tensors


@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
    """The kept features of a part's recorded positions in one layer."""

    row_begin: Array
    """[rows + 1] uint32: row r has entries row_begin[r] to row_begin[r + 1]."""
    features: Array
    """[M] uint16 or uint32, ascending in a row."""
    activations: Array
    """[M] float16 or float32. A row that was not finite has one entry, NaN at feature 0."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A range of the corpus: windows [first_window, first_window + N)."""

    first_window: int
    tokens: Array
    """[N, ctx] uint16 or uint32."""
    mask: Array
    """[N, ctx] uint8, 1 where a position is recorded: the rows of every layer, in that order."""
    layers: dict[int, Entries]
    metadata: dict[str, str]

    @functools.cached_property
    def positions(self) -> Array:
        """[rows] int64: window * ctx + position of every row, counted from the part's begin."""
        return np.flatnonzero(self.mask)


class Corpus:
    """What :func:`encode_corpus` wrote to a folder.

    Args:
        out: the folder.

    Raises:
        FileNotFoundError: there is no manifest in the folder. ValueError: it is of another schema.

    Example:
        >>> for part in Corpus("out"):
        ...     part.layers[12].features  # a memory map
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.folder = Path(out)
        self.manifest = manifests.read(self.folder / "manifest.json")

    def __repr__(self) -> str:
        done = self.part_count - len(self.missing)
        layers = ", ".join(map(str, self.layers))
        return f"Corpus({str(self.folder)!r}: {done} of {self.part_count} parts, layers {layers})"

    @property
    def layers(self) -> list[int]:
        return [int(layer) for layer in self.manifest["layers"]]

    @property
    def ctx(self) -> int:
        return int(self.manifest["packing"]["ctx"])

    @property
    def windows(self) -> int:
        return int(self.manifest["text"]["windows"])

    @property
    def recorded(self) -> int:
        """Positions that are recorded."""
        return int(self.manifest["text"]["recorded"])

    @property
    def part_windows(self) -> int:
        return max(1, int(self.manifest["options"]["part_tokens"]) // self.ctx)

    @property
    def part_count(self) -> int:
        return -(-self.windows // self.part_windows)

    def features(self, layer: int) -> int:
        """F of a layer."""
        return int(self.manifest["layers"][str(layer)]["features"])

    def path(self, part: int) -> Path:
        return self.folder / "parts" / f"{part:08}.safetensors"

    @property
    def missing(self) -> list[int]:
        """Parts that are not encoded yet."""
        return [part for part in range(self.part_count) if not self.path(part).exists()]

    def tokens(self) -> Array:
        """[windows, ctx], also of parts that are missing."""
        dtype = np.dtype(self.manifest["packing"]["dtype"])
        return np.memmap(self.folder / "tokens.bin", dtype, "r", 0, (self.windows, self.ctx))

    def part(self, part: int) -> Part:
        """One part.

        Raises:
            FileNotFoundError: it is not encoded yet. ValueError: its file is not whole.
        """
        path = self.path(part)
        if not path.exists():
            raise FileNotFoundError(f"{path}: this part is not encoded yet")
        found, metadata = read_tensors(path)
        layers = {
            layer: Entries(
                *(found[f"{layer}.{n}"] for n in ("row_begin", "features", "activations"))
            )
            for layer in self.layers
        }
        return Part(int(metadata["first_window"]), found["tokens"], found["mask"], layers, metadata)

    def __iter__(self) -> Iterator[Part]:
        return map(self.part, range(self.part_count))

    def __len__(self) -> int:
        return self.part_count

    def __getitem__(self, part: int) -> Part:
        if not 0 <= part < self.part_count:
            raise IndexError(f"part must be 0 to {self.part_count - 1}, got {part}")
        return self.part(part)

    def check_complete(self) -> None:
        """ValueError where parts are missing."""
        missing = self.missing
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} of {self.part_count} parts are not encoded yet, "
                f"first {missing[0]}: start encode again"
            )

    def word(self, token: int) -> str:
        """The text of a token id; models may have ids that their tokenizer does not know."""
        known = self._vocabulary
        return known[token] if token < len(known) else f"<{token}>"

    @functools.cached_property
    def _vocabulary(self) -> list[str]:
        text = (self.folder / "vocabulary.json").read_text(encoding="utf-8")
        vocabulary: list[str] = json.loads(text)
        return vocabulary

    def summary(self) -> dict[str, Any]:
        """Counts of positions: all, recorded, and skipped by reason."""
        text = self.manifest["text"]
        return {name: text[name] for name in ("positions", "recorded", "skipped")}
