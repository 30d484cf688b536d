"""python -m sparse_transcoder encode | index: their options. What needs numpy is imported when it
runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .encoder import SparseTranscoderEncoder
from .formats import load_transcoders


def add_encode(encode: argparse.ArgumentParser) -> None:
    add = encode.add_argument
    add(
        "texts", nargs="+", metavar="TEXT", help=".txt, .md, .rst, .jsonl, .parquet, a folder, or -"
    )
    add("--model", required=True, metavar="M", help="a folder, a hub name, or a .gguf file")
    add("--transcoders", required=True, metavar="DIR", help="a folder or a hub name")
    add(
        "--out", required=True, type=Path, metavar="OUT", help="the folder to write, or to go on in"
    )
    add("--layers", type=_layers, metavar="..", help="for example 5,10-12 (default: all)")
    add("--hook", help="where to read, if not where the checkpoint says")
    add("--ctx", type=int, default=256, help="tokens of a window (default: %(default)s)")
    add("--bos", choices=("each", "none"), default="each", help="what begins a window")
    add("--keep", choices=("top_k", "all"), default="top_k", help="of each position")
    add("--top-k", type=int, default=32, help="default: %(default)s; 0 is the checkpoint's own k")
    add("--threshold", type=float, default=1.0, help="the least activation (default: %(default)s)")
    add("--dtype", choices=("float16", "float32"), default="float16", help="of the activations")
    add("--batch-size", type=int, default=8, help="windows at once (default: %(default)s)")
    add("--part-tokens", type=int, default=2**18, help="positions of a part (default: %(default)s)")
    add("--text-key", default="text", help="key of .jsonl, column of .parquet")
    add("--device", default="cpu", help="where the model runs (default: %(default)s)")
    add("--worker", type=_worker, default=(0, 1), metavar="i/n", help="every n-th part from part i")
    add("--quiet", action="store_true", help="no progress")


def encode(options: argparse.Namespace) -> None:
    from .corpus.encode import Run
    from .corpus.models import load_model

    transcoders = load_transcoders(options.transcoders, options.layers, device=options.device)
    encoder = SparseTranscoderEncoder(transcoders, options.top_k or None, options.threshold)
    model, tokenizer = load_model(options.model, options.device)
    with _texts(options.texts, options.out) as texts:
        run = Run(
            model,
            tokenizer,
            texts,
            encoder,
            options.out,
            ctx=options.ctx,
            bos=options.bos,
            batch_size=options.batch_size,
            keep=options.keep,
            part_tokens=options.part_tokens,
            hook=options.hook,
            dtype=getattr(torch, options.dtype),
            text_key=options.text_key,
            origin={"model": options.model, "transcoders": options.transcoders},
        )
    index, count = options.worker
    run.write_parts(range(index, run.corpus.part_count, count), not options.quiet)


def add_index(index: argparse.ArgumentParser) -> None:
    add = index.add_argument
    add("out", metavar="OUT", help="a folder that encode has written")
    add("--formats", default="html", help="of delphi,parquet,circuit-tracer,neuronpedia,html")
    add("--model", metavar="M", help="for the tokens of the logit lens (default: the one encoded)")
    add("--transcoders", metavar="DIR", help="likewise")
    add("--labels", type=Path, metavar="JSON", help="{layer: {feature: text}}, for the page")
    add("--scale", action="store_true", help="Neuronpedia's values times the decoder rows' norms")
    add("--quiet", action="store_true", help="no progress")


def index(options: argparse.Namespace) -> None:
    from .corpus.index import index as write
    from .corpus.models import load_model
    from .corpus.read import Corpus

    corpus = Corpus(options.out)
    formats = [name.strip() for name in options.formats.split(",")]
    origin = corpus.manifest["origin"]
    names = {name: getattr(options, name) or origin.get(name) for name in ("model", "transcoders")}
    model = transcoders = None
    if not {"circuit-tracer", "neuronpedia", "html"}.isdisjoint(formats):
        try:
            transcoders = load_transcoders(names["transcoders"] or "", corpus.layers, device="cpu")
            model, _ = load_model(names["model"] or "")
        except (OSError, ValueError, ImportError) as error:
            if options.model or options.transcoders or options.scale:
                raise
            reason = " ".join(str(error).split())
            print(f"without the tokens of the logit lens: {reason}", file=sys.stderr)
    labels = None
    if options.labels:
        given = json.loads(options.labels.read_text(encoding="utf-8"))
        labels = {int(i): {int(f): str(t) for f, t in of.items()} for i, of in given.items()}
    target = write(
        corpus,
        formats,
        model=model,
        transcoders=transcoders if model is not None else None,
        labels=labels,
        scale=options.scale,
        progress=not options.quiet,
    )
    for name in formats:
        print(target / name / ("explorer.html" if name == "html" else ""))


@contextlib.contextmanager
def _texts(names: list[str], out: Path) -> Iterator[Any]:
    """What the names stand for; None where an empty stdin is what a run that is there was given."""
    if names == ["-"]:
        first = sys.stdin.read(1)
        if not first and (out / "manifest.json").exists():
            yield None
            return
        yield [_Read(first)]
        return
    yield [sys.stdin if name == "-" else Path(name) for name in names]


class _Read:
    """stdin, whose first character was read already."""

    name = "stdin"

    def __init__(self, first: str) -> None:
        self._first = first

    def read(self, size: int) -> str:
        first, self._first = self._first, ""
        return first + sys.stdin.read(size - len(first))

    def readline(self, size: int) -> str:
        return sys.stdin.readline(size)


def _layers(text: str) -> list[int]:
    found: list[int] = []
    for part in text.split(","):
        named = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if named is None:
            raise argparse.ArgumentTypeError(f"must be like 5,10-12, got {text!r}")
        found += range(int(named[1]), int(named[2] or named[1]) + 1)
    return found


def _worker(text: str) -> tuple[int, int]:
    named = re.fullmatch(r"(\d+)/(\d+)", text)
    if named is None or int(named[1]) >= int(named[2]):
        raise argparse.ArgumentTypeError(f"must be i/n with 0 <= i < n, got {text!r}")
    return int(named[1]), int(named[2])
