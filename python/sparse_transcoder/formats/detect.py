"""Finds the checkpoint in a folder, by its files and keys.

A layout is never recognised by the name of a folder or by shapes.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from .. import _arguments as check
from ..weights import TranscoderWeights
from . import (
    clt,
    deepseek_r1,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    gemma_scope_2_clt,
    goodfire,
    listed,
    llama_scope,
    llama_scope_r1,
    llamascopium,
    native,
    qwen_scope,
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
    gemma_scope_2_clt.LAYOUT,
    sparsify.LAYOUT,
    llama_scope.LAYOUT,
    llama_scope_r1.LAYOUT,
    llamascopium.LAYOUT,
    sae_lens.LAYOUT,
    dictionary_learning.LAYOUT,
    qwen_scope.LAYOUT,
    goodfire.LAYOUT,
    deepseek_r1.LAYOUT,
)


@dataclasses.dataclass
class Checkpoint:
    """The checkpoint in a folder. Nothing but its configs has been read."""

    folder: Path
    layout: str
    files: dict[int, list[tuple[Layout, Path]]]
    """The weights files of each layer: several where the folder holds alternatives. Empty for a
    native set."""
    only: int | None = None
    """The one layer that the caller asked for by ``layer=``."""
    warning: str = ""
    """What the caller must know of the layers that were loaded, in one line."""

    def load(
        self,
        layers: list[int] | None = None,
        device: str | torch.device | None = None,
        k: int | None = None,
    ) -> Iterator[tuple[int, TranscoderWeights]]:
        """The layers asked for, one after the other, so that a caller need not hold them all."""
        loading = Loading(check.device(device), k)
        if layers is None and self.only is not None:
            layers = [self.only]
        for layer, weights in self._each(layers or [], loading):
            if k is not None and weights.k != k:
                own = "no top-k coder" if weights.k is None else f"a top-k coder of k {weights.k}"
                raise ValueError(f"{weights.source}: k must not be given, it is {own}; got k={k}")
            self.warning = loading.warning(self.folder)
            yield layer, weights

    def _each(self, layers: list[int], loading: Loading) -> Iterator[tuple[int, TranscoderWeights]]:
        if not self.files:
            for layer, weights in native.load_set(self.folder, layers, loading.device).items():
                told = layer_in(Path(weights.source).name)
                if told is not None and told != layer:
                    loading.tell(layer, listed.out_of_place(told))
                yield layer, weights
            return
        chosen = {layer: self._file(layer) for layer in layers or sorted(self.files)}
        for layer, (layout, path) in chosen.items():
            yield layer, layout.load(layer, path, loading)

    def _file(self, layer: int) -> tuple[Layout, Path]:
        files = self.files.get(layer)
        if not files:
            there = ", ".join(map(str, sorted(self.files)[:8]))
            more = " .." if len(self.files) > 8 else ""
            raise FileNotFoundError(
                f"{self.folder}: there is no file for layer {layer}, only for {there}{more}"
            )
        if len(files) > 1:
            raise ValueError(
                f"{self.folder}: layer {layer} is there {len(files)} times, choose one with "
                f"variant=: {_listed(self.folder, [path for _, path in files])}"
            )
        return files[0]


def find(folder: Path, layer: int | None = None, variant: str | None = None) -> Checkpoint:
    """Recognise the checkpoint in a folder.

    Args:
        folder: where it lies.
        layer: the layer of a checkpoint that does not say it itself, or the only one wanted.
        variant: which coders are meant where a layer has several: names of folders or files in the
            path of the wanted ones, with ``*`` for any text.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    names = frozenset(os.listdir(folder))
    if variant is None and (entries := listed.entries_of(folder)):
        return Checkpoint(folder, listed.NAME, listed.files_of(folder, entries, LAYOUTS), layer)
    if variant is None and _recognised(folder, names) is None and native.is_set(folder, names):
        return Checkpoint(folder, native.NAME, {}, layer)

    found = list(_walk(folder))
    if variant is not None:
        kept = [coder for coder in found if _is_variant(folder, coder[1], variant)]
        if found and not kept:
            raise ValueError(
                f"{folder}: no coder's path has variant {variant!r}, "
                f"got {_listed(folder, [path for _, path in found])}"
            )
        found = kept
    sets = [path for layout, path in found if layout is None]
    if sets and len(found) > 1:
        raise ValueError(
            f"{folder}: holds several checkpoints, choose one with variant=: "
            f"{_listed(folder, [path for _, path in found])}"
        )
    if sets:
        return Checkpoint(sets[0], native.NAME, {}, layer)
    files, layouts = _by_layer(folder, found, layer)
    if not files and "config.yaml" in names:
        return Checkpoint(folder, native.NAME, {}, layer)
    if not files:
        raise FileNotFoundError(
            f"{folder}: there is no checkpoint of a known layout in this folder"
        )
    return Checkpoint(folder, " and ".join(layouts), files, layer)


def _by_layer(
    folder: Path, found: list[tuple[Layout | None, Path]], only: int | None
) -> tuple[dict[int, list[tuple[Layout, Path]]], list[str]]:
    """The coders of each layer, and the names of their layouts."""
    files: dict[int, list[tuple[Layout, Path]]] = {}
    unnamed: list[tuple[Layout, Path]] = []
    layouts = set()
    for layout, path in found:
        if layout is None:
            continue
        layouts.add(layout.name)
        layer = layout.layer_of(path)
        if layer is None:
            layer = _layer_of_folders(path.parent.relative_to(folder).parts)
        if layer is None and only is None:
            layer = _layer_of_folders(folder.absolute().parts[-3:])
        (unnamed if layer is None else files.setdefault(layer, [])).append((layout, path))
    if only is not None and len(unnamed) == 1:
        files.setdefault(only, []).extend(unnamed)
    elif len(unnamed) > 1 and only is not None:
        raise ValueError(
            f"{folder}: layer= names one checkpoint, but {len(unnamed)} do not say their layer, "
            f"choose one with variant=: {_listed(folder, [path for _, path in unnamed])}"
        )
    elif unnamed:
        raise ValueError(
            f"{unnamed[0][1]}: neither its config nor its folder's name tells the layer: "
            "give layer="
        )
    return files, sorted(layouts)


def _is_variant(folder: Path, path: Path, variant: str) -> bool:
    inside = f"/{path.relative_to(folder).as_posix()}/"
    return fnmatch.fnmatchcase(inside, f"*/{variant.strip('/')}/*")


def _listed(folder: Path, paths: list[Path]) -> str:
    """Coders by their paths below a folder."""
    shown = [str(path.relative_to(folder)) for path in sorted(paths)[:6]]
    return ", ".join(shown) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")


def _recognised(folder: Path, names: frozenset[str]) -> tuple[Layout, list[Path]] | None:
    for layout in LAYOUTS:
        if paths := layout.recognises(folder, names):
            return layout, paths
    return None


def _walk(folder: Path) -> Iterator[tuple[Layout | None, Path]]:
    """Weights files in and below a folder, and folders of native sets, which have no Layout.

    Links are followed, and each folder is seen once.
    """
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
        names = frozenset(entry.name for entry in entries)
        if found := _recognised(here, names):
            layout, paths = found
            yield from ((layout, path) for path in paths)
        elif native.has_layers(here, names):
            yield None, here
        elif depth < 8:
            for entry in reversed(entries):
                if not entry.name.startswith(".") and _is_folder(entry):
                    pending.append((here / entry.name, depth + 1))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _layer_of_folders(names: tuple[str, ...]) -> int | None:
    """The number in the name of the innermost folder that has one."""
    for name in reversed(names):
        if (layer := layer_in(name)) is not None:
            return layer
    return None
