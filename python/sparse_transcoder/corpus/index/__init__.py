"""Indexes of a corpus by feature: delphi, Parquet, circuit-tracer, Neuronpedia, and a page."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ...weights import TranscoderWeights
from ..files import Array
from ..read import Corpus
from . import delphi, lens
from .circuit_tracer import CircuitTracerWriter
from .features import features
from .html import HtmlWriter
from .merge import blocks
from .neuronpedia import NeuronpediaWriter
from .parquet import ParquetWriter

FORMATS = ("delphi", "parquet", "circuit-tracer", "neuronpedia", "html")

__all__ = ["FORMATS", "index"]


def index(
    corpus: Corpus,
    formats: Iterable[str] = ("html",),
    *,
    model: Any = None,
    transcoders: Mapping[int, TranscoderWeights] | None = None,
    labels: Mapping[int, Mapping[int, str]] | None = None,
    scale: bool = False,
    progress: bool = True,
) -> Path:
    """Writes what others read, by feature, into ``OUT/index/<format>``, in one pass over the parts
    and in memory that does not grow with the corpus. A format that is there is replaced when the
    new one is whole.

    Args:
        corpus: a complete one.
        formats: of delphi, parquet, circuit-tracer, neuronpedia, html.
        model, transcoders: what was encoded with; with both, features have the tokens that their
            decoder directions make likelier and less likely (the logit lens).
        labels: {layer: {feature: text}}, for the page; without one a feature is called by the
            tokens that it fires on.
        scale: multiply Neuronpedia's values by the norms of the decoder directions.
        progress: tell on stderr how far it is.

    Returns:
        The folder ``OUT/index``.

    Raises:
        ValueError: an unknown format, or parts are missing. ImportError: Parquet without pyarrow.
    """
    wanted = list(dict.fromkeys(formats))
    unknown = [name for name in wanted if name not in FORMATS]
    if unknown or not wanted:
        raise ValueError(f"formats must be of {', '.join(FORMATS)}, got {', '.join(unknown)}")
    corpus.check_complete()
    target = corpus.folder / "index"
    target.mkdir(exist_ok=True)
    folders = {name: target / f".{name}.tmp" for name in wanted}
    for folder in folders.values():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    try:
        _write(corpus, folders, model, transcoders, labels, scale, progress)
        for name, folder in folders.items():
            shutil.rmtree(target / name, ignore_errors=True)
            folder.rename(target / name)
    finally:
        for folder in folders.values():
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _write(
    corpus: Corpus,
    folders: dict[str, Path],
    model: Any,
    transcoders: Mapping[int, TranscoderWeights] | None,
    labels: Mapping[int, Mapping[int, str]] | None,
    scale: bool,
    progress: bool,
) -> None:
    logits: dict[int, lens.Logits | None] = {}
    tokens = None
    norms: dict[int, Array] = {}
    if model is not None and transcoders is not None:
        if any(name in folders for name in ("circuit-tracer", "neuronpedia", "html")):
            tokens = lens.unembedding(model)
            for layer in corpus.layers:
                logits[layer] = lens.logits(tokens, transcoders[layer])
        for layer in corpus.layers:
            W_dec = transcoders[layer].W_dec
            if scale and W_dec is not None:
                norms[layer] = W_dec.detach().float().norm(dim=0).cpu().numpy()
    if scale and not norms:
        raise ValueError("scale needs the model and the transcoders' W_dec, got none")

    def directions(layer: int) -> lens.Directions:
        W_dec = transcoders[layer].W_dec if transcoders is not None else None
        assert tokens is not None and W_dec is not None  # the layer has logits
        return lens.Directions(tokens, W_dec)

    make: dict[str, Callable[[Path], Any]] = {
        "parquet": lambda folder: ParquetWriter(corpus, folder),
        "circuit-tracer": lambda folder: CircuitTracerWriter(corpus, folder, logits),
        "neuronpedia": lambda folder: NeuronpediaWriter(corpus, folder, logits, directions, norms),
        "html": lambda folder: HtmlWriter(corpus, folder, logits, labels or {}),
    }
    writers = {name: make[name](folder) for name, folder in folders.items() if name in make}
    if "delphi" in folders:
        delphi.write(corpus, folders["delphi"])
    start, total, done = time.monotonic(), sum(map(corpus.features, corpus.layers)), 0
    if writers:
        for layer in corpus.layers:
            for block in blocks(corpus, layer, next(iter(folders.values())).parent):
                if "parquet" in writers:
                    writers["parquet"].add_block(block)
                for feature in features(corpus, block):
                    for writer in writers.values():
                        writer.add(feature)
                done += len(block.begin) - 1
                if progress:
                    seconds = time.monotonic() - start
                    text = f"layer {layer}: {done:,} of {total:,} features  {seconds:.0f} s"
                    print(text, file=sys.stderr, flush=True)
    for writer in writers.values():
        writer.close()
