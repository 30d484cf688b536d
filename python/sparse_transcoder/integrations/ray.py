"""Encode a corpus by Ray Data actors, each with a model and an encoder of its own.

The folder is shared by all of them and by the driver, and ends up byte for byte that of one process
on the same kind of machine. An actor that dies is started again by Ray, and its part with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
import torch

from ..corpus import Corpus, Run
from ..corpus.texts import Texts
from ..encoder import SparseTranscoderEncoder

Load = Callable[[], tuple[torch.nn.Module, Any, SparseTranscoderEncoder]]


def encode_corpus(
    load: Load,
    texts: Texts,
    out: str | os.PathLike[str],
    *,
    actors: int = 2,
    num_cpus: float = 1,
    num_gpus: float = 0,
    **options: Any,
) -> Corpus:
    """:func:`sparse_transcoder.encode_corpus` on a Ray cluster.

    Args:
        load: makes (model, tokenizer, encoder), in the driver and once in each actor. It is
            pickled, so what it needs must be importable there.
        texts: see :func:`sparse_transcoder.encode_corpus`; only the driver reads them.
        out: a folder that every machine sees under this name.
        actors: how many parts are encoded at once.
        num_cpus, num_gpus: of one actor.
        options: of :func:`sparse_transcoder.encode_corpus`; not worker and progress.

    Raises:
        As :func:`sparse_transcoder.encode_corpus`, in the driver, before an actor is started.

    Example:
        >>> corpus = encode_corpus(load, [Path("texts")], "/shared/out", actors=8, num_gpus=1)
    """
    corpus = Run(*_arguments(load, texts, out), **options).corpus
    if corpus.missing:
        parts = ray.data.from_items([{"part": part} for part in corpus.missing])
        done = parts.repartition(len(corpus.missing)).map_batches(
            _Worker,
            fn_constructor_kwargs={"load": load, "out": os.path.abspath(out), "options": options},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=actors, max_tasks_in_flight_per_actor=2
            ),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
        )
        done.materialize()
    corpus.check_complete()
    return corpus


def _arguments(load: Load, texts: Texts | None, out: str | os.PathLike[str]) -> tuple[Any, ...]:
    model, tokenizer, encoder = load()
    return model, tokenizer, texts, encoder, out


class _Worker:
    def __init__(self, load: Load, out: str, options: dict[str, Any]) -> None:
        self._run = Run(*_arguments(load, None, out), **options)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for part in np.asarray(batch["part"]).tolist():
            if not self._run.corpus.path(part).exists():
                self._run.write_part(part)
        return batch
