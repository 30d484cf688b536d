"""Loads transcoders: a layout is recognised by its files and keys, never by names of folders or by shapes."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from .. import _C
from ..arguments import _device, _integer
from ..weights import TranscoderWeights
from . import circuit_tracer, dictionary_learning, gemma_scope, llamascopium, reference, sae_lens, sparsify
from .files import Config, Loading, layer_in

__all__ = ["Checkpoint", "find", "load_transcoders"]

Reader = Callable[[int, Path, Loading], TranscoderWeights]


def load_transcoders(
    transcoder_dir: str | Path, layers: Iterable[int] | None = None, device: str | torch.device | None = None
) -> dict[int, TranscoderWeights]:
    """Load the transcoders in a folder: {layer: weights}.

    Reads the layouts of circuit-tracer (sets and cross-layer transcoders), Gemma Scope 1 and 2, sparsify, SAELens,
    dictionary_learning, llamascopium and the reference project. The activation, thresholds, input bias, LayerNorm, skip
    connection and hook names are those that the checkpoint declares; a variant that cannot be computed exactly is refused
    by name.

    Files are memory-mapped, and only those of the layers asked for are opened; layouts that store W_enc as [H, F] have it copied
    once to [F, H]. No file is unpickled unsafely.

    Args:
        transcoder_dir: the folder of a set, or of one checkpoint.
        layers: the layers to load. None loads all that are there.
        device: where the tensors go. None is CUDA where there is one, else the CPU.

    Raises:
        FileNotFoundError: the folder, or the file of a layer asked for, is not there.
        ValueError: a file is malformed or of a variant that is not supported; the message names it and the reason. Or the
            device is not there.

    Example:
        >>> transcoders = load_transcoders("gemma-scope-2b-pt-transcoders", layers=[12, 13])
    """
    if layers is not None and (isinstance(layers, str) or not isinstance(layers, Iterable)):
        raise TypeError(f"layers must be integers, or None for all, got {type(layers).__name__}")
    wanted = None if layers is None else sorted({_integer("layer", layer) for layer in layers})
    if wanted is not None and not wanted:
        return {}
    if not isinstance(transcoder_dir, (str, os.PathLike)):
        raise TypeError(f"transcoder_dir must be a str or Path, got {type(transcoder_dir).__name__}")
    return dict(find(Path(transcoder_dir)).load(wanted, device))


@dataclasses.dataclass
class Checkpoint:
    """The checkpoint in a folder: nothing but its configs has been read."""

    folder: Path
    layout: str
    files: dict[int, list[Path]]
    """The files of each layer: more than one where the folder holds alternatives. Empty for a native set."""
    reader: Callable[[Path], Reader] | None = None

    def load(
        self, layers: list[int] | None = None, device: str | torch.device | None = None
    ) -> Iterator[tuple[int, TranscoderWeights]]:
        """The layers asked for, one after the other, so that a caller need not hold them all."""
        loading = Loading(_device(device))
        if self.reader is None:
            yield from circuit_tracer.load_set(self.folder, layers or [], loading).items()
            return
        chosen = {layer: self._file(layer) for layer in layers or sorted(self.files)}
        for layer, path in chosen.items():
            yield layer, self.reader(path)(layer, path, loading)

    def _file(self, layer: int) -> Path:
        paths = self.files.get(layer)
        if not paths:
            raise FileNotFoundError(f"{self.folder}: there is no file for layer {layer}")
        if len(paths) > 1:
            raise ValueError(
                f"{self.folder}: layer {layer} is there {len(paths)} times, load one folder: "
                f"{paths[0].parent.relative_to(self.folder)} or {paths[1].parent.relative_to(self.folder)}"
            )
        return paths[0]


def find(folder: Path) -> Checkpoint:
    """Recognise the layout of the checkpoint in a folder."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    names = sorted(os.listdir(folder))
    if files := _numbered(folder, names, r"transcoder_L(\d{1,9})\.pt"):
        return Checkpoint(folder, "reference", files, lambda _: reference.load)
    if files := _numbered(folder, names, r"W_enc_(\d{1,9})\.safetensors"):
        return Checkpoint(folder, "circuit-tracer CLT", files, lambda _: circuit_tracer.load_clt_layer)
    if circuit_tracer.top_level(folder / "config.yaml").get("model_kind") == "cross_layer_transcoder":
        raise FileNotFoundError(f"{folder}: there is no W_enc_{{i}}.safetensors of a cross-layer transcoder")
    native = Checkpoint(folder, "circuit-tracer set", {})
    config = circuit_tracer.config_text(folder / "config.yaml")
    if _numbered(folder, names, r"layer_(\d{1,9})\.safetensors") or "transcoder" in config:
        return native

    found: dict[int, list[Path]] = {}
    unnamed: list[Path] = []
    layouts = set()
    for path, layout in _walk(folder):
        layouts.add(layout)
        layer = _layer_of(folder, path)
        (unnamed if layer is None else found.setdefault(layer, [])).append(path)
    if len(unnamed) == 1 and not found:
        found[0] = unnamed
    elif unnamed:
        raise ValueError(f"{unnamed[0]}: neither its config nor its folder's name tells the layer")
    if not found and "config.yaml" in names:
        return native
    if not found:
        raise FileNotFoundError(f"{folder}: there is no checkpoint of a known layout in this folder")
    return Checkpoint(folder, " and ".join(sorted(layouts)), found, lambda path: _layout(path)[1])


def _numbered(folder: Path, names: list[str], pattern: str) -> dict[int, list[Path]]:
    found = ((re.fullmatch(pattern, name), name) for name in names)
    return {int(m[1]): [folder / name] for m, name in found if m}


def _walk(folder: Path) -> Iterator[tuple[Path, str]]:
    """Checkpoint files below a folder, with their layout. Links are followed, each folder is seen once."""
    seen = set()
    pending = [(folder, 0)]
    while pending:
        here, depth = pending.pop()
        try:
            status = here.stat()
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError:
            continue  # a link that leads nowhere or in a circle, or a folder that may not be read
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        names = {entry.name for entry in entries}
        path = _checkpoint_in(here, names)
        if path is not None:
            yield path, _layout(path)[0]
        elif depth < 8:
            for entry in reversed(entries):
                if not entry.name.startswith(".") and _is_folder(entry):
                    pending.append((here / entry.name, depth + 1))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


# (weights, config that must be beside them)
_FILES = (
    ("params.npz", ""),
    ("params.safetensors", ""),
    ("sae.safetensors", "cfg.json"),
    ("sae_weights.safetensors", "cfg.json"),
    ("sae_weights.safetensors", "config.json"),
    ("ae.pt", "config.json"),
)


def _checkpoint_in(folder: Path, names: set[str]) -> Path | None:
    for weights, config in _FILES:
        if weights in names and (not config or config in names):
            return folder / weights
    return None


def _layout(path: Path) -> tuple[str, Reader]:
    """By the file's name; SAELens and llamascopium share one, so there by the keys."""
    match path.name:
        case "params.npz":
            return "Gemma Scope", gemma_scope.load_first
        case "params.safetensors":
            return "Gemma Scope 2", gemma_scope.load_second
        case "sae.safetensors":
            return "sparsify", sparsify.load
        case "ae.pt":
            return "dictionary_learning", dictionary_learning.load
    if path.with_name("config.json").exists() and (
        not path.with_name("cfg.json").exists() or "W_E" in _C.read_safetensors(str(path))
    ):
        return "llamascopium", llamascopium.load
    return "SAELens", sae_lens.load


def _layer_of(folder: Path, path: Path) -> int | None:
    """What the config declares, else what the innermost folder with a layer's number in its name says."""
    declared = _declared_layer(path)
    if declared is not None:
        return declared
    inside = path.parent.relative_to(folder).parts
    around = folder.absolute().parts[-3:]
    for name in (*reversed(inside), *reversed(around)):
        if (layer := layer_in(name)) is not None:
            return layer
    return None


def _declared_layer(path: Path) -> int | None:
    layout = _layout(path)[0]
    if layout == "SAELens":
        return layer_in(sae_lens.hook_name(Config(path.with_name("cfg.json"))))
    if layout == "llamascopium":
        return layer_in(Config(path.with_name("config.json")).get("hook_point_in", str, ""))
    if layout == "dictionary_learning":
        trainer = Config(path.with_name("config.json")).within("trainer")
        layer = trainer.get("layer", int, None)
        if layer is not None and not 0 <= layer < 1_000_000:
            raise trainer.refuse(f"layer must be the index of a layer, got {layer}")
        return layer
    return None
