"""What a corpus is read from: strings, files and folders, one piece at a time."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeAlias

Texts: TypeAlias = "Iterable[str | Path | TextIO]"
"""A str is a text itself; a Path is a file or a folder of files; an open text file is one text."""

SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".parquet")
PIECE = 1 << 20
"""Characters that are tokenised at once. A longer text is cut behind the end of a line."""


def pieces(texts: Texts, text_key: str = "text") -> Iterator[tuple[str, bool]]:
    """(piece, whether it begins a text), in the order of the texts; files of a folder by name.

    Raises:
        FileNotFoundError, ValueError: a file that is not there, or that is no text, by name.
    """
    if isinstance(texts, (str, Path)):
        raise TypeError(f"texts must be a list of texts or Paths, got {type(texts).__name__}")
    for text in texts:
        if isinstance(text, str):
            yield from _cut(io.StringIO(text))
        elif isinstance(text, Path):
            for file in files_of(text):
                yield from _of_file(file, text_key)
        elif hasattr(text, "readline"):
            yield from _checked(getattr(text, "name", "the text"), _cut(text))
        else:
            raise TypeError(f"texts must hold str, Path or open files, got {type(text).__name__}")


def files_of(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
        if not found:
            raise FileNotFoundError(f"{path}: there is no {', '.join(SUFFIXES)} file in the folder")
        return found
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such text")
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{path}: a text must be one of {', '.join(SUFFIXES)}, or a folder of them, or -"
        )
    return [path]


def _of_file(path: Path, text_key: str) -> Iterator[tuple[str, bool]]:
    if path.suffix == ".parquet":
        yield from _of_parquet(path, text_key)
        return
    with open(path, encoding="utf-8", newline="") as file:
        if path.suffix != ".jsonl":
            yield from _checked(path, _cut(file))
            return
        for number, line in enumerate(_checked(path, file), 1):
            if line.strip():
                yield from _cut(io.StringIO(_of_line(path, number, line, text_key)))


def _of_line(path: Path, number: int, line: str, text_key: str) -> str:
    try:
        value: Any = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number}: must be JSON: {error}") from None
    text = value.get(text_key) if isinstance(value, dict) else value
    if not isinstance(text, str):
        has = f"keys {', '.join(value)}" if isinstance(value, dict) else type(value).__name__
        raise ValueError(f"{path}, line {number}: must hold a string {text_key!r}, got {has}")
    return text


def _of_parquet(path: Path, text_key: str) -> Iterator[tuple[str, bool]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            f"{path}: pyarrow is needed: pip install sparse_transcoder[corpus]"
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise ValueError(f"{path}: must have a column {text_key!r}, got {names}")
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    if text is not None:
                        yield from _cut(io.StringIO(text))
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: must be Parquet: {' '.join(str(error).split())}") from None


def _cut(file: TextIO) -> Iterator[tuple[str, bool]]:
    begins = True
    while piece := file.read(PIECE):
        yield piece + file.readline(PIECE), begins
        begins = False


def _checked(path: Any, parts: Iterable[Any]) -> Iterator[Any]:
    try:
        yield from parts
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: must be UTF-8, got byte {error.object[error.start]:#x}"
        ) from None
