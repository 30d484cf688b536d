"""delphi's cache (https://github.com/EleutherAI/delphi):
latents/<hookpoint>/{start}_{end}.safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..files import NAMES, Array, safetensors_header, write_json, written
from ..read import Corpus

SPLITS = 5
LEAST = 1e-5
"""What delphi keeps is above this."""


def write(corpus: Corpus, folder: Path) -> None:
    names = hookpoints(corpus)
    for layer, name in names.items():
        target = folder / "latents" / name
        target.mkdir(parents=True)
        edges = np.linspace(0, corpus.features(layer), SPLITS + 1).astype(np.int64)
        for start, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            if start < end:
                _write_split(corpus, layer, target / f"{start}_{end - 1}.safetensors", start, end)
        write_json(
            target / "config.json",
            {
                "dataset_repo": str(corpus.folder),
                "dataset_split": "train",
                "dataset_name": "",
                "dataset_column": "text",
                "batch_size": corpus.manifest["options"]["batch_size"],
                "cache_ctx_len": corpus.ctx,
                "ctx_len": corpus.ctx,
                "n_tokens": corpus.windows * corpus.ctx,
                "n_splits": SPLITS,
                "model_name": corpus.manifest["origin"].get("model", ""),
            },
        )


def hookpoints(corpus: Corpus) -> dict[int, str]:
    """The module of each layer, as AutoModel names it."""
    prefix = corpus.manifest["model"]["prefix"] + "."
    return {
        int(layer): declared["hook"].partition(":")[0].removeprefix(prefix)
        for layer, declared in corpus.manifest["layers"].items()
    }


def _entries(corpus: Corpus, layer: int, start: int, end: int) -> Iterator[tuple[Array, Array]]:
    """(locations [M, 3], activations [M]) of each part, of the features [start, end)."""
    for part in corpus:
        entries = part.layers[layer]
        features = np.asarray(entries.features)
        activations = np.asarray(entries.activations)
        inside = (features >= start) & (features < end) & (activations > LEAST)
        row_count: Array = np.diff(entries.row_begin.astype(np.int64))
        positions = np.repeat(part.positions, row_count)[inside]
        windows, places = np.divmod(positions, corpus.ctx)
        chosen = features[inside].astype(np.int64) - start
        yield np.stack([windows + part.first_window, places, chosen], 1), activations[inside]


def _write_split(corpus: Corpus, layer: int, path: Path, start: int, end: int) -> None:
    """In two passes over the parts, so that nothing is held but one part."""
    count = sum(len(activations) for _, activations in _entries(corpus, layer, start, end))
    small = max(corpus.windows, corpus.ctx, end - start) <= 1 << 16
    locations, activations = (
        np.dtype("<u2" if small else "<u4"),
        np.dtype(corpus.manifest["options"]["dtype"]),
    )
    header, at = {}, 0
    for name, dtype, shape in (
        ("locations", locations, [count, 3]),
        ("activations", activations, [count]),
        ("tokens", np.dtype("<i4"), [corpus.windows, corpus.ctx]),
    ):
        size = int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [at, at + size]}
        at += size
    with written(path) as file:
        file.write(safetensors_header(header))
        for found, _ in _entries(corpus, layer, start, end):
            file.write(found.astype(locations).data)
        for _, values in _entries(corpus, layer, start, end):
            file.write(values.data)
        for part in corpus:
            file.write(part.tokens.astype("<i4").data)
