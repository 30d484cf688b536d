"""circuit-tracer's config.yaml that lists files of the Hugging Face hub: one for each layer.

The layout is that of https://github.com/safety-research/circuit-tracer. An entry is ``hf://org/name/
file[?revision=..]`` or a file in the folder; its place in the list is its layer.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..weights import TranscoderWeights
from .files import Loading, config_text, layer_in, read_safetensors, yaml_scalar, yaml_values
from .hub import local_file
from .layout import Layout, not_declared

NAME = "circuit-tracer list"


def entries_of(folder: Path) -> list[str]:
    """What config.yaml lists under transcoders, where a file of the hub is among it; else none."""
    entries: list[str] = []
    listing = False
    for line in config_text(folder / "config.yaml").splitlines():
        item = re.match(r"\s*- (.*)", line)
        if item and listing:
            entries.append(yaml_scalar(item[1]))
        elif line.strip() and not line.strip().startswith("#"):
            listing = re.match(r"transcoders *:", line) is not None
    return entries if any(entry.startswith("hf://") for entry in entries) else []


def files_of(
    folder: Path, entries: Sequence[str], layouts: Sequence[Layout]
) -> dict[int, list[tuple[Layout, Path]]]:
    """The coder of each layer. Its file is fetched when it is loaded."""
    config = folder / "config.yaml"
    return {
        layer: [
            (
                Layout(NAME, lambda *_: [], not_declared, functools.partial(_load, entry, layouts)),
                config,
            )
        ]
        for layer, entry in enumerate(entries)
    }


def out_of_place(layer: int) -> str:
    """What the caller must know where a file's name tells another layer than the list."""
    return f"config.yaml lists a file of layer {layer} in another layer's place"


def _load(
    entry: str, layouts: Sequence[Layout], layer: int, config: Path, loading: Loading
) -> TranscoderWeights:
    inside = PurePosixPath(entry)
    if entry.startswith("hf://"):
        file = local_file(entry)
    elif "://" in entry or inside.is_absolute() or ".." in inside.parts or not entry:
        raise ValueError(
            f"{config}: transcoders must be hf:// or inside this folder, got {entry!r}"
        )
    else:
        file = config.parent / inside
        if not file.is_file():
            raise FileNotFoundError(f"{file}: there is no such file, which {config} lists")
    values = yaml_values(config)
    names = frozenset(os.listdir(file.parent))
    layout = next((one for one in layouts if file in one.recognises(file.parent, names)), None)
    told = None if layout is None else layout.layer_of(file)
    told = layer_in(f"{file.parent.name}/{file.name}") if told is None else told
    if told is not None and told != layer:
        loading.tell(layer, out_of_place(told))
    weights = (
        _native(layer, file, values, loading)
        if layout is None
        else layout.load(layer, file, loading)
    )
    return dataclasses.replace(
        weights,
        hook_in=values.get("feature_input_hook") or weights.hook_in,
        hook_out=values.get("feature_output_hook") or weights.hook_out,
    )


def _native(layer: int, file: Path, values: dict[str, str], loading: Loading) -> TranscoderWeights:
    """A layer of circuit-tracer's own set, as C++ reads it from a folder."""
    activation = values.get("activation", "")
    if activation not in ("", "relu", "jumprelu", "topk"):
        raise ValueError(f"{file}: activation must be relu, jumprelu or topk, got {activation!r}")
    tensors = read_safetensors(file)
    W_enc, W_dec = tensors.take("W_enc", 2), tensors.take_if_there("W_dec", 2)
    b_enc, b_dec = tensors.take("b_enc", 1), tensors.take_if_there("b_dec", 1)
    threshold = tensors.take_if_there("activation_function.threshold", 1)
    W_skip = tensors.take_if_there("W_skip", 2)
    k = tensors.take_integer("k") if "k" in tensors else None
    tensors.finish()
    if activation == "topk" and k is None:
        if not values.get("k", "").isdecimal():
            raise ValueError(f"{file}: activation topk needs an integer k in config.yaml")
        k = int(values["k"])
    if activation == "jumprelu" and threshold is None:
        raise ValueError(
            f"{file}: activation jumprelu needs activation_function.threshold, got none"
        )
    return loading.weights(
        layer,
        file,
        W_enc,
        b_enc=b_enc,
        W_dec=None if W_dec is None else W_dec.T,
        b_dec=b_dec,
        threshold=threshold,
        W_skip=W_skip,
        k=k,
    )
