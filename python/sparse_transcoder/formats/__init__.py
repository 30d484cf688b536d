"""Loads transcoders from the checkpoint layouts of many projects, and saves them in one of them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch

from .. import _arguments as check
from ..weights import TranscoderWeights
from .detect import find
from .native import save_transcoders

__all__ = ["load_transcoders", "save_transcoders"]


def load_transcoders(
    transcoder_dir: str | Path,
    layers: Iterable[int] | None = None,
    device: str | torch.device | None = None,
) -> dict[int, TranscoderWeights]:
    """Load the transcoders in a folder: {layer: weights}.

    It reads the layouts of circuit-tracer (sets and cross-layer transcoders), Gemma Scope 1 and 2,
    sparsify, SAELens, dictionary_learning, llamascopium and the reference project. The activation,
    thresholds, input bias, LayerNorm, skip connection and hook names are those that the checkpoint
    declares. A variant that cannot be computed exactly is refused by name.

    Files are memory-mapped, and only those of the layers asked for are opened. Layouts that store
    W_enc as [H, F] have it copied once to [F, H]. No file is unpickled unsafely.

    Args:
        transcoder_dir: the folder of a set, or of one checkpoint.
        layers: the layers to load. None loads all that are there.
        device: where the tensors go. None is CUDA where there is one, else the CPU.

    Raises:
        FileNotFoundError: the folder, or the file of a layer asked for, is not there.
        ValueError: a file is malformed or of a variant that is not supported, and the message names
            it and the reason; or the device is not there.
        TypeError: an argument has a wrong type.

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
    return dict(find(Path(transcoder_dir)).load(wanted, device))
