"""Loads transcoders from the checkpoint layouts of many projects, and saves them in one of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from .. import _arguments as check
from ..weights import TranscoderWeights
from .detect import find
from .hub import local_folder
from .native import save_transcoders

__all__ = ["load_transcoders", "save_transcoders"]


def load_transcoders(
    transcoder_dir: str | Path,
    layers: Iterable[int] | None = None,
    device: str | torch.device | None = None,
    *,
    layer: int | None = None,
    k: int | None = None,
    variant: str | None = None,
) -> dict[int, TranscoderWeights]:
    """Load the transcoders in a folder: {layer: weights}.

    It reads the layouts of circuit-tracer (sets and cross-layer transcoders), Gemma Scope 1 and 2
    (cross-layer transcoders too), sparsify, SAELens, dictionary_learning, Llama Scope in its three
    forms, Qwen-Scope, Goodfire, qresearch and the reference project. The activation, thresholds,
    input bias, LayerNorm, skip connection and hook names are those that the checkpoint declares. A
    variant that cannot be computed exactly is refused by name. circuit-tracer's config.yaml may
    list files of the Hugging Face hub, of any of these layouts.

    Files are memory-mapped, and only those of the layers asked for are opened. Layouts that store
    W_enc as [H, F] have it copied once to [F, H]. No file is unpickled unsafely.

    Args:
        transcoder_dir: the folder of a set, or of one checkpoint; or a name of the Hugging Face
            hub, ``"org/name"`` or ``"hf://org/name[/folder][@revision]"``, whose files are
            downloaded, or taken from its cache without a connection (the extra ``hub``). All
            weights in the folder are fetched: of a large repository name the folder.
        layers: the layers to load. None loads all that are there.
        device: where the tensors go. None is CUDA where there is one, else the CPU.
        layer: which layer a single checkpoint is that does not say it itself. A layer that nobody
            says is an error.
        k: the k of top-k coders, for a checkpoint in which it stands nowhere.
        variant: which coders are meant where a layer has several: names of folders or files in the
            path of the wanted ones, e.g. ``"width_16k/average_l0_71"`` or ``"layers.*.mlp"``.

    Raises:
        FileNotFoundError: the folder, or the file of a layer asked for, is not there; or the hub
            has no such repository, or cannot be reached.
        ImportError: a hub name is given and huggingface_hub is not installed.
        ValueError: a file is malformed or of a variant that is not supported, and the message names
            it and the reason; the layer or k is not known, or ``k`` is not that of the checkpoint;
            a layer has several coders; or the device is not there.
        TypeError: an argument has a wrong type.

    Warns:
        UserWarning: a config has keys that are not known, lists a layer's file in the place of
            another, or asks for what only the caller can do, such as a model whose weights are
            changed when it is loaded. One warning names all.

    Example:
        >>> transcoders = load_transcoders("gemma-scope-2b-pt-transcoders", layers=[12, 13])
    """
    if layers is not None and (isinstance(layers, str) or not isinstance(layers, Iterable)):
        raise TypeError(f"layers must be integers, or None for all, got {type(layers).__name__}")
    wanted = None if layers is None else sorted({check.integer("layer", i) for i in layers})
    if wanted is not None and not wanted:
        return {}
    if not isinstance(transcoder_dir, (str, os.PathLike)):
        name = type(transcoder_dir).__name__
        raise TypeError(f"transcoder_dir must be a str or Path, got {name}")
    if variant is not None and not isinstance(variant, str):
        raise TypeError(f"variant must be a str, got {type(variant).__name__}")
    if k is not None:
        k = check.positive("k", k)
    if layer is not None:
        layer = check.at_least(0, "layer", layer)
    checkpoint = find(local_folder(os.fspath(transcoder_dir)), layer, variant)
    loaded = dict(checkpoint.load(wanted, device, k))
    if checkpoint.warning:
        warnings.warn(checkpoint.warning, stacklevel=2)
    return loaded
