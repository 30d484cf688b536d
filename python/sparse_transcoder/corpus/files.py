"""Files that are there whole or not at all, and safetensors that are read as memory maps."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

Array = np.ndarray[Any, Any]

NAMES = {
    np.dtype(kind): name
    for kind, name in (
        ("u1", "U8"),
        ("<u2", "U16"),
        ("<u4", "U32"),
        ("<i4", "I32"),
        ("<i8", "I64"),
        ("<f2", "F16"),
        ("<f4", "F32"),
    )
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}
FORGOTTEN = 24 * 3600
"""Seconds after which a temporary file of another host is taken for one that nobody writes."""


@contextlib.contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name when it is whole and on the disk.

    Raises:
        OSError: it cannot be written, in one line; then nothing of it is left.
    """
    temporary = path.with_name(f".{path.stem}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        _remove(temporary)
        if error.errno is None or error.filename not in (None, str(temporary), str(path)):
            raise  # of what the caller reads meanwhile
        raise OSError(
            error.errno,
            f"{path}: cannot be written: {error.strerror}; what was written before is kept, and "
            "the same command goes on from there",
        ) from None
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def remove_forgotten(folder: Path) -> None:
    """Removes the temporary files of processes that are gone."""
    for path in folder.glob(".*.tmp"):
        host, _, pid = path.name[:-4].rpartition(".")
        if host.split(".", 2)[-1] == socket.gethostname():
            gone = not pid.isdigit() or not Path(f"/proc/{pid}").exists()
        else:
            try:
                gone = time.time() - path.stat().st_mtime > FORGOTTEN
            except OSError:
                continue
        if gone:
            _remove(path)


def write_json(path: Path, value: Any) -> None:
    with written(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n")


def write_tensors(
    file: BinaryIO,
    tensors: Mapping[str, tuple[np.dtype[Any], Sequence[int], Sequence[Array]]],
    metadata: Mapping[str, str],
) -> None:
    """Writes safetensors: {name: (dtype, shape, the arrays that follow one another)}. The metadata
    gets ``checksum``, the sha256 of all values."""
    checksum = hashlib.sha256()
    for _, _, arrays in tensors.values():
        for array in arrays:
            checksum.update(np.ascontiguousarray(array).view(np.uint8).data)
    header: dict[str, Any] = {"__metadata__": {**metadata, "checksum": checksum.hexdigest()}}
    end = 0
    for name, (dtype, shape, _) in tensors.items():
        begin, end = end, end + int(np.prod(shape)) * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": [int(n) for n in shape],
            "data_offsets": [begin, end],
        }
    file.write(safetensors_header(header))
    for _, _, arrays in tensors.values():
        for array in arrays:
            file.write(np.ascontiguousarray(array).view(np.uint8).data)


def safetensors_header(header: Mapping[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_tensors(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """({name: memory map}, metadata).

    Raises:
        ValueError: the file is not whole.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if length > size - 8:
            raise ValueError(f"{path}: must be safetensors, got {size} bytes that are not")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(f"{path}: must have {8 + length + end} bytes, got {size}")
    found: dict[str, Array] = {}
    for name, entry in header.items():
        shape, dtype = tuple(entry["shape"]), DTYPES[entry["dtype"]]
        offset = 8 + length + entry["data_offsets"][0]
        empty = 0 in shape
        found[name] = (
            np.empty(shape, dtype) if empty else np.memmap(path, dtype, "r", offset, shape)
        )
    return found, metadata
