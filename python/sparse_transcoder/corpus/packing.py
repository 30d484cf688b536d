"""A corpus as windows of token ids, one file that every worker reads."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .files import Array, written
from .texts import PIECE, Texts, pieces

TOGETHER = 256
"""Pieces that are tokenised in one call."""


@dataclasses.dataclass(frozen=True)
class Packing:
    """How the tokens of a corpus become windows [ctx]."""

    ctx: int
    first: int | None
    """The id that begins every window (BOS), where there is one."""
    join: int | None
    """The id behind every text (EOS), where the tokenizer has one."""
    pad: int
    """What fills the last window."""
    dtype: str
    """uint16 or uint32."""
    skipped: tuple[int, ...] | None
    """Ids that are read and not recorded; neither is the first position of a window then. None:
    everything but padding is recorded."""

    def mask(self, windows: Array, real: int) -> Array:
        """[N, ctx] uint8, 1 where a position is recorded. real: tokens of the last window."""
        mask = np.ones(windows.shape, np.uint8)
        if self.skipped is not None:
            mask[np.isin(windows, np.array(self.skipped, windows.dtype))] = 0
            mask[:, 0] = 0
        mask[-1, real:] = 0
        return mask


def packing_of(tokenizer: Any, ctx: int, bos: str, skipped: tuple[int, ...] | None) -> Packing:
    if bos not in ("each", "none"):
        raise ValueError(f"bos must be each or none, got {bos!r}")
    first = tokenizer.bos_token_id if bos == "each" else None
    join = tokenizer.eos_token_id
    pad = next((i for i in (tokenizer.pad_token_id, join, first) if i is not None), 0)
    if ctx < (1 if first is None else 2):
        raise ValueError(f"ctx must leave room for text, got {ctx}")
    return Packing(
        ctx, first, join, pad, "uint16" if len(tokenizer) <= 1 << 16 else "uint32", skipped
    )


def _ids(
    tokenizer: Any, texts: Iterable[tuple[str, bool]], join: int | None
) -> Iterator[list[int]]:
    """Token ids of piece after piece."""
    waiting: list[tuple[str, bool]] = []
    length, any_text = 0, False

    def tokenised() -> Iterator[list[int]]:
        nonlocal any_text
        found = tokenizer(
            [piece for piece, _ in waiting],
            add_special_tokens=False,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        for ids, (_, begins) in zip(found, waiting, strict=True):
            if begins and any_text and join is not None:
                yield [join]
            any_text = True
            yield ids

    for piece in texts:
        waiting.append(piece)
        length += len(piece[0])
        if len(waiting) == TOGETHER or length >= PIECE:
            yield from tokenised()
            waiting, length = [], 0
    if waiting:
        yield from tokenised()


def _hashed(texts: Texts, text_key: str, source: Any) -> Iterator[tuple[str, bool]]:
    for piece, begins in pieces(texts, text_key):
        data = piece.encode("utf-8", "surrogatepass")
        source.update(b"%d %d;" % (begins, len(data)) + data)
        yield piece, begins


def source_of(texts: Texts, text_key: str) -> str:
    """What tells these texts from others: the sha256 of their pieces."""
    source = hashlib.sha256()
    for _ in _hashed(texts, text_key, source):
        pass
    return source.hexdigest()


def is_packed(path: Path, packed: Mapping[str, Any]) -> bool:
    """Whether a file holds what :func:`pack` said of it."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    found = hashlib.sha256(np.memmap(path, np.uint8, "r").data).hexdigest()
    return bool(found == packed["sha256"])


def pack(
    tokenizer: Any,
    texts: Texts,
    packing: Packing,
    path: Path,
    check: Callable[[dict[str, Any]], None],
    text_key: str = "text",
) -> dict[str, Any]:
    """Writes the windows [N, ctx] to a file, and says what is in it. ``check`` gets that before the
    file gets its name.

    Raises:
        ValueError: there is no token in the texts. OSError: the file cannot be written.
    """
    width = packing.ctx - (packing.first is not None)
    dtype = np.dtype(packing.dtype)
    largest = np.iinfo(dtype).max
    source, checksum = hashlib.sha256(), hashlib.sha256()
    windows, special, last = 0, 0, packing.ctx
    with written(path) as file:

        def write(rows: Array, real: int) -> None:
            nonlocal windows, special, last
            if packing.first is not None:
                first = np.full((len(rows), 1), packing.first, rows.dtype)
                rows = np.concatenate([first, rows], 1)
            if rows.size and int(rows.max()) > largest:
                raise ValueError(f"token ids must be at most {largest}, got {rows.max()}")
            rows = rows.astype(dtype)
            windows, last = windows + len(rows), real + (packing.first is not None)
            mask = packing.mask(rows, last)
            if packing.skipped is not None:
                special += int((mask[:, 1:] == 0).sum()) - (packing.ctx - max(last, 1))
            checksum.update(rows.data)
            file.write(rows.data)

        rest: list[int] = []
        for ids in _ids(tokenizer, _hashed(texts, text_key, source), packing.join):
            rest.extend(ids)
            if len(rest) >= 64 * width:
                whole = len(rest) // width * width
                write(np.array(rest[:whole], np.int64).reshape(-1, width), width)
                rest = rest[whole:]
        if whole := len(rest) // width * width:
            write(np.array(rest[:whole], np.int64).reshape(-1, width), width)
        if rest := rest[whole:]:
            row = np.full((1, width), packing.pad, np.int64)
            row[0, : len(rest)] = rest
            write(row, len(rest))
        if windows == 0:
            raise ValueError("the texts must hold at least one token, got none")
        positions = windows * packing.ctx
        skipped = {"padding": packing.ctx - last}
        if packing.skipped is not None:
            skipped |= {"first position": windows, "special": special}
        packed = {
            "source": source.hexdigest(),
            "windows": windows,
            "last_window": last,
            "sha256": checksum.hexdigest(),
            "positions": positions,
            "recorded": positions - sum(skipped.values()),
            "skipped": skipped,
        }
        check(packed)
    return packed
