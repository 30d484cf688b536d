"""What a file of torch.save says of itself, read without running or building anything of it."""

from __future__ import annotations

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

DTYPES = {"untyped": "uint8", "byte": "uint8", "char": "int8", "complexfloat": "cfloat"}


class _Inert:
    """Stands for whatever a pickle names. It does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass


class _Reader(pickle.Unpickler):
    """Collects the storages that a pickle asks for. It imports and calls nothing of the file."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.storages: dict[str, int] = {}
        """Record of the archive -> bytes that the storage on it claims."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        return type(name, (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count = pid
        name = kind.__name__.removesuffix("Storage").lower()
        dtype = getattr(torch, DTYPES.get(name, name))
        claimed = int(count) * dtype.itemsize
        self.storages[str(key)] = max(claimed, self.storages.get(str(key), 0))
        return _Inert()


def check_storages(path: Path) -> list[str]:
    """The names in a state dict, also where it lies under ``state_dict``.

    Raises:
        ValueError: a record is compressed, absent, there twice, or shorter than its storage.
    """
    with zipfile.ZipFile(path) as archive:
        records: dict[str, zipfile.ZipInfo] = {}
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed, which torch.save never does")
            if records.setdefault(member.filename, member) is not member:
                raise ValueError(f"{member.filename} is there twice")
        pickles = [name for name in records if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it must hold one data.pkl, got {len(pickles)}")
        with archive.open(pickles[0]) as file:
            reader = _Reader(file)
            content = reader.load()
    folder = pickles[0].removesuffix("data.pkl")
    for key, claimed in reader.storages.items():
        record = records.get(f"{folder}data/{key}")
        size = None if record is None else record.file_size
        if size is None or size < claimed:
            raise ValueError(
                f"storage data/{key} must have {claimed} bytes for the tensors that stand on it, "
                f"got {'none' if size is None else size}"
            )
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    return [str(name) for name in content] if isinstance(content, dict) else []
