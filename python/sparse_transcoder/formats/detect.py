"""Finds the checkpoint in a folder, by its files and keys.

A layout is never recognised by the name of a folder or by shapes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import _arguments as check
from ..weights import TranscoderWeights
from . import (
    clt,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    llamascopium,
    native,
    reference,
    sae_lens,
    sparsify,
)
from .files import Loading, layer_in
from .layout import Layout

# The first layout that recognises a folder reads it. The native set is not among them: C++ reads
# it, and its config.yaml may give the order of the layers.
LAYOUTS: tuple[Layout, ...] = (
    reference.LAYOUT,
    clt.LAYOUT,
    gemma_scope.LAYOUT,
    gemma_scope_2.LAYOUT,
    sparsify.LAYOUT,
    llamascopium.LAYOUT,
    sae_lens.LAYOUT,
    dictionary_learning.LAYOUT,
)


@dataclasses.dataclass
class Checkpoint:
    """The checkpoint in a folder. Nothing but its configs has been read."""

    folder: Path
    layout: str
    files: dict[int, list[tuple[Layout, Path]]]
    """The weights files of each layer: several where the folder holds alternatives. Empty for a
    native set."""

    def load(
        self, layers: list[int] | None = None, device: str | torch.device | None = None
    ) -> Iterator[tuple[int, TranscoderWeights]]:
        """The layers asked for, one after the other, so that a caller need not hold them all."""
        loading = Loading(check.device(device))
        if not self.files:
            yield from native.load_set(self.folder, layers or [], loading.device).items()
            return
        chosen = {layer: self._file(layer) for layer in layers or sorted(self.files)}
        for layer, (layout, path) in chosen.items():
            yield layer, layout.load(layer, path, loading)

    def _file(self, layer: int) -> tuple[Layout, Path]:
        files = self.files.get(layer)
        if not files:
            raise FileNotFoundError(f"{self.folder}: there is no file for layer {layer}")
        if len(files) > 1:
            first, second = (path.relative_to(self.folder) for _, path in files[:2])
            raise ValueError(
                f"{self.folder}: layer {layer} is there {len(files)} times, load the folder of one "
                f"file: {first} or {second}"
            )
        return files[0]


def find(folder: Path) -> Checkpoint:
    """Recognise the checkpoint in a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    names = frozenset(os.listdir(folder))
    native_set = Checkpoint(folder, native.NAME, {})
    if _recognised(folder, names) is None and native.is_set(folder, names):
        return native_set

    files: dict[int, list[tuple[Layout, Path]]] = {}
    unnamed: list[tuple[Layout, Path]] = []
    for layout, path in _walk(folder):
        layer = layout.layer_of(path)
        if layer is None:
            layer = _layer_of_folders(folder, path)
        (unnamed if layer is None else files.setdefault(layer, [])).append((layout, path))
    layouts = sorted({layout.name for found in [*files.values(), unnamed] for layout, _ in found})
    if len(unnamed) == 1 and not files:
        files[0] = unnamed
    elif unnamed:
        raise ValueError(
            f"{unnamed[0][1]}: neither its config nor its folder's name tells the layer"
        )
    if not files and "config.yaml" in names:
        return native_set
    if not files:
        raise FileNotFoundError(
            f"{folder}: there is no checkpoint of a known layout in this folder"
        )
    return Checkpoint(folder, " and ".join(layouts), files)


def _recognised(folder: Path, names: frozenset[str]) -> tuple[Layout, list[Path]] | None:
    for layout in LAYOUTS:
        if paths := layout.recognises(folder, names):
            return layout, paths
    return None


def _walk(folder: Path) -> Iterator[tuple[Layout, Path]]:
    """Weights files in and below a folder. Links are followed, and each folder is seen once."""
    seen = set()
    pending = [(folder, 0)]
    while pending:
        here, depth = pending.pop()
        try:
            status = here.stat()
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError:
            continue  # A link leads nowhere or in a circle, or the folder may not be read.
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        if found := _recognised(here, frozenset(entry.name for entry in entries)):
            layout, paths = found
            yield from ((layout, path) for path in paths)
        elif depth < 8:
            for entry in reversed(entries):
                if not entry.name.startswith(".") and _is_folder(entry):
                    pending.append((here / entry.name, depth + 1))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _layer_of_folders(folder: Path, path: Path) -> int | None:
    """The number in the name of the innermost folder that has one."""
    inside = path.parent.relative_to(folder).parts
    around = folder.absolute().parts[-3:]
    for name in (*reversed(inside), *reversed(around)):
        if (layer := layer_in(name)) is not None:
            return layer
    return None
