"""Runs a model over a corpus, part by part, and writes what its features are."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch

from .. import _C
from .. import _arguments as check
from ..capture import capture_places
from ..encoder import SparseTranscoderEncoder
from ..places import decoder
from ..prompts import Prompts, special_ids
from . import manifest as manifests
from .files import Array, read_tensors, remove_forgotten, write_json, write_tensors, written
from .packing import is_packed, pack, packing_of, source_of
from .read import Corpus
from .texts import Texts


def encode_corpus(
    model: torch.nn.Module,
    tokenizer: Any,
    texts: Texts,
    encoder: SparseTranscoderEncoder,
    out: str | os.PathLike[str],
    *,
    ctx: int = 256,
    bos: str = "each",
    batch_size: int = 8,
    exclude: Literal["special"] | Iterable[int] | None = "special",
    keep: str = "top_k",
    part_tokens: int = 2**18,
    worker: tuple[int, int] = (0, 1),
    progress: bool = True,
    layers: Iterable[int] | None = None,
    hook: str | Mapping[int, str] | None = None,
    dtype: torch.dtype = torch.float16,
    text_key: str = "text",
    origin: Mapping[str, str] | None = None,
) -> Corpus:
    """Encode what a model reads in a corpus: one pass over the text, all layers, memory that does
    not grow with the text. Killed at any moment and started again, it goes on after the last part,
    and the folder ends up byte for byte that of an uninterrupted run on the same machine.

    The texts, joined by EOS where the tokenizer has one, become windows of ``ctx`` tokens, each
    beginning with BOS where there is one. The model reads ``batch_size`` windows at a time, without
    padding. The values are those of :meth:`SparseTranscoderEncoder.encode_into` on what it holds.

    Args:
        model, tokenizer: of transformers; see :func:`sparse_transcoder.capture`.
        texts: a str is a text; a Path is a .txt, .md, .rst, .jsonl or .parquet file, or a folder of
            them; an open file is one text.
        encoder: its layers, ``top_k`` and ``activation_threshold`` say what is kept.
        out: a folder; that of another run is refused.
        ctx: tokens of a window.
        bos: "each" window begins with BOS, or "none".
        batch_size: windows that the model reads at once. It may change the last bits of what the
            model holds, so it belongs to the run.
        exclude: what is read and not recorded: "special" (every id that the tokenizer or the
            model's configuration names) or a set of ids, and with either the first position of
            each window; None records everything but padding.
        keep: "top_k" features of each position, or "all" that are kept.
        part_tokens: positions of a part, which is written at once and held in memory until then.
        worker: (i, n): does every n-th part, from part i on. n workers on a shared folder make the
            bytes of one.
        progress: tell on stderr how far it is.
        layers: the layers to encode; None is all that have a transcoder.
        hook: as in :meth:`SparseTranscoderEncoder.encode_model`.
        dtype: float16 or float32, of the activations. float16 never turns a kept feature into 0;
            what it cannot hold becomes 65,504 and is counted in the part's metadata.
        text_key: the key of .jsonl and the column of .parquet.
        origin: names of the model and the transcoders, for what reads the corpus later.

    Returns:
        The corpus; ``missing`` of it names the parts that other workers have not written yet.

    Raises:
        ValueError: a wrong argument, a text that cannot be read, or a folder of another run, with
            the first difference. OSError: a part cannot be written; the others are kept.

    Example:
        >>> corpus = encode_corpus(model, tokenizer, [Path("texts")], encoder, "out")
        >>> corpus[0].layers[12].features
    """
    index, count = worker
    if not 0 <= index < count:
        raise ValueError(f"worker must be (i, n) with 0 <= i < n, got {worker}")
    run = Run(
        model,
        tokenizer,
        texts,
        encoder,
        out,
        ctx=ctx,
        bos=bos,
        batch_size=batch_size,
        exclude=exclude,
        keep=keep,
        part_tokens=part_tokens,
        layers=layers,
        hook=hook,
        dtype=dtype,
        text_key=text_key,
        origin=origin,
    )
    run.write_parts(range(index, run.corpus.part_count, count), progress)
    return run.corpus


class Run:
    """A model, an encoder and a folder that belong together. Arguments are those of
    :func:`encode_corpus`. Building one packs the text and writes the manifest, or checks that both
    are what the folder holds; then the text is read and not tokenised again.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        texts: Texts | None,
        encoder: SparseTranscoderEncoder,
        out: str | os.PathLike[str],
        *,
        ctx: int = 256,
        bos: str = "each",
        batch_size: int = 8,
        exclude: Literal["special"] | Iterable[int] | None = "special",
        keep: str = "top_k",
        part_tokens: int = 2**18,
        layers: Iterable[int] | None = None,
        hook: str | Mapping[int, str] | None = None,
        dtype: torch.dtype = torch.float16,
        text_key: str = "text",
        origin: Mapping[str, str] | None = None,
    ) -> None:
        if dtype not in (torch.float16, torch.float32):
            raise TypeError(f"dtype must be float16 or float32, got {dtype}")
        if keep not in ("all", "top_k"):
            raise ValueError(f"keep must be all or top_k, got {keep!r}")
        self.model, self.encoder, self.dtype = model, encoder, dtype
        self.keep, self.batch_size = keep, check.positive("batch_size", batch_size)
        self.model_seconds = self.encode_seconds = 0.0
        self._places = encoder._places(decoder(model), layers, hook)
        skipped = None
        if exclude == "special":
            skipped = tuple(sorted(special_ids(model) | set(tokenizer.all_special_ids)))
        elif exclude is not None:
            skipped = tuple(sorted({check.integer("exclude", token) for token in exclude}))
        self.packing = packing_of(tokenizer, check.positive("ctx", ctx), bos, skipped)
        manifest: dict[str, Any] = {
            "schema": manifests.SCHEMA,
            "versions": manifests.versions(),
            "model": manifests.of_model(model),
            "tokenizer": manifests.of_tokenizer(tokenizer),
            "packing": {
                **dataclasses.asdict(self.packing),
                "skipped": None if skipped is None else list(skipped),
            },
            "layers": {
                str(layer): manifests.of_layer(encoder._transcoders[layer], place)
                for layer, place in sorted(self._places.items())
            },
            "options": {
                "keep": keep,
                "top_k": encoder.top_k if keep == "top_k" else None,
                "activation_threshold": encoder.activation_threshold,
                "dtype": str(dtype).removeprefix("torch."),
                "batch_size": self.batch_size,
                "part_tokens": check.positive("part_tokens", part_tokens),
            },
        }
        folder = Path(out)
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        path = folder / "manifest.json"
        for place in (folder, folder / "parts"):
            remove_forgotten(place)

        def same(packed: dict[str, Any] | None = None) -> None:
            if path.exists():
                manifests.check_same(path, manifest | ({"text": packed} if packed else {}))

        same()
        there = manifests.read(path)["text"] if path.exists() else None
        if texts is not None and there and is_packed(folder / "tokens.bin", there):
            same(there | {"source": source_of(texts, text_key)})
        elif texts is not None:
            packed = pack(tokenizer, texts, self.packing, folder / "tokens.bin", same, text_key)
            if not path.exists():
                vocabulary = vocabulary_of(tokenizer)
                write_json(folder / "vocabulary.json", vocabulary)
                write_json(path, manifest | {"text": packed, "origin": dict(origin or {})})
        self.corpus = Corpus(folder)
        self._real = int(self.corpus.manifest["text"]["last_window"])
        # Without origin: workers may know the model by other names.
        self._hash = manifests.text_digest(manifest | {"text": self.corpus.manifest["text"]})

    def write_parts(self, parts: Iterable[int], progress: bool = True) -> None:
        """Writes those of the parts that are missing. Ctrl-C ends it after the part at hand, a
        second one at once."""
        parts = list(parts)
        missing = [part for part in parts if not self.corpus.path(part).exists()]
        shown = _Progress(self.corpus, parts, missing) if progress else None
        with _interruptible() as stopped:
            for done, part in enumerate(missing):
                if stopped.is_set():
                    print(
                        f"stopped after part {missing[done - 1]}, {len(missing) - done} are left: "
                        "the same command goes on from there",
                        file=sys.stderr,
                    )
                    return
                self.write_part(part, shown)
        if shown:
            shown.end()

    def write_part(self, part: int, shown: _Progress | None = None) -> None:
        """Encodes one part and writes it."""
        corpus, path = self.corpus, self.corpus.path(part)
        first = part * corpus.part_windows
        tokens = np.ascontiguousarray(corpus.tokens()[first : first + corpus.part_windows])
        is_last = first + len(tokens) == corpus.windows
        real = self._real if is_last else corpus.ctx
        mask = self.packing.mask(tokens, real)
        found = {layer: _Found() for layer in self._places}
        for begin, end in _batches(len(tokens), self.batch_size, real < corpus.ctx):
            width = real if end == len(tokens) else corpus.ctx
            ids = torch.from_numpy(tokens[begin:end, :width].astype(np.int64))
            recorded = torch.from_numpy(mask[begin:end, :width].reshape(-1).astype(bool))
            self._encode(ids, recorded, found)
            if shown:
                shown.add(ids.numel())
        tensors: dict[str, tuple[np.dtype[Any], list[int], list[Array]]] = {
            "tokens": (tokens.dtype, list(tokens.shape), [tokens]),
            "mask": (mask.dtype, list(mask.shape), [mask]),
        }
        for layer, rows in found.items():
            features = np.dtype("<u2" if corpus.features(layer) <= 1 << 16 else "<u4")
            begins = np.concatenate([np.zeros(1, np.int64), *rows.counts]).cumsum()
            if begins[-1] >= 1 << 32:
                raise ValueError(
                    f"part {part} has {begins[-1]} entries: part_tokens must be smaller"
                )
            tensors[f"{layer}.row_begin"] = (
                np.dtype("<u4"),
                [len(begins)],
                [begins.astype("<u4")],
            )
            tensors[f"{layer}.features"] = (features, [begins[-1]], rows.features)
            activations = np.dtype(self.corpus.manifest["options"]["dtype"])
            tensors[f"{layer}.activations"] = (activations, [begins[-1]], rows.activations)
        metadata = {
            "part": str(part),
            "first_window": str(first),
            "manifest": self._hash,
            "clamped": str(sum(rows.clamped for rows in found.values())),
        }
        with written(path) as file:
            write_tensors(file, tensors, metadata)
            file.flush()
            if path.exists():  # since another process took the same part
                _check_same(path, Path(file.name))

    @torch.inference_mode()
    def _encode(self, ids: torch.Tensor, recorded: torch.Tensor, found: dict[int, _Found]) -> None:
        start = time.perf_counter()
        prompts = Prompts(ids, torch.ones_like(ids, dtype=torch.bool), {})
        hidden = capture_places(self.model, prompts, self._places, exact=False).hidden
        for rows in hidden.values():
            if rows.is_cuda:
                torch.cuda.synchronize(rows.device)
        middle = time.perf_counter()
        if not bool(recorded.all()):
            hidden = {layer: rows[recorded.to(rows.device)] for layer, rows in hidden.items()}
        if bool(recorded.any()):
            small = [layer for layer in hidden if self.corpus.features(layer) <= 1 << 16]
            for layers, dtype in (
                (small, torch.uint16),
                ([layer for layer in hidden if layer not in small], torch.uint32),
            ):
                if layers:
                    self.encoder.encode_into(
                        {layer: hidden[layer] for layer in layers},
                        lambda rows: found[rows.layer].add(rows),
                        keep=self.keep,
                        features=dtype,
                        activations=self.dtype,
                    )
        self.model_seconds += middle - start
        self.encode_seconds += time.perf_counter() - middle


class _Found:
    """What of a part is encoded in one layer."""

    def __init__(self) -> None:
        self.counts: list[Array] = []
        self.features: list[Array] = []
        self.activations: list[Array] = []
        self.clamped = 0

    def add(self, rows: _C.SparseRows) -> None:
        self.counts.append(np.diff(rows.features.row_begin.cpu().numpy()))
        self.features.append(rows.features.features.cpu().numpy())
        self.activations.append(rows.features.activations.cpu().numpy())
        self.clamped += rows.clamped


def _batches(windows: int, batch_size: int, last_alone: bool) -> Iterator[tuple[int, int]]:
    """The windows that the model reads together. They depend on the part alone."""
    whole = windows - last_alone
    for begin in range(0, whole, batch_size):
        yield begin, min(begin + batch_size, whole)
    if last_alone:
        yield whole, windows


def _check_same(there: Path, here: Path) -> None:
    theirs, ours = (read_tensors(path)[1] for path in (there, here))
    if theirs != ours:
        raise ValueError(
            f"{there}: another process has written other bytes for this part: its checksum is "
            f"{theirs.get('checksum')}, here {ours['checksum']}; its file is kept"
        )
    print(f"{there}: another process has written this part, too, the same", file=sys.stderr)


def vocabulary_of(tokenizer: Any) -> list[str]:
    """The text of every token id."""
    texts = []
    for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))):
        if token is None:
            texts.append("")
        elif token.startswith("▁"):  # whose blank a decoder would drop
            texts.append(token.replace("▁", " "))
        else:
            texts.append(tokenizer.convert_tokens_to_string([token]))
    return texts


@contextlib.contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; the second one raises KeyboardInterrupt."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


class _Progress:
    """How far a worker is, on stderr: one line that is written anew on a terminal, else one line
    every half minute."""

    def __init__(self, corpus: Corpus, parts: list[int], missing: list[int]) -> None:
        def positions(some: list[int]) -> int:
            windows = corpus.part_windows
            whole = sum(min(windows, corpus.windows - p * windows) for p in some)
            last = corpus.part_count - 1 in some
            return corpus.ctx * whole - last * int(corpus.summary()["skipped"]["padding"])

        self._total, left = positions(parts), positions(missing)
        self._before = self._done = self._total - left
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._next = self._start + (0.2 if self._terminal else 30.0)
        text = corpus.summary()
        skipped = ", ".join(f"{count:,} {reason}" for reason, count in text["skipped"].items())
        print(
            f"{corpus.folder}: {text['positions']:,} tokens, {text['recorded']:,} recorded, "
            f"skipped: {skipped}; {len(missing)} of {len(parts)} parts to do",
            file=sys.stderr,
        )

    def add(self, tokens: int) -> None:
        self._done += tokens
        now = time.monotonic()
        if now >= self._next:
            self._next = now + (0.2 if self._terminal else 30.0)
            self._print(now, "\r" if self._terminal else "", "\x1b[K" if self._terminal else "\n")

    def end(self) -> None:
        if self._done > self._before:
            self._print(time.monotonic(), "\r" if self._terminal else "", "\n")

    def _print(self, now: float, before: str, after: str) -> None:
        speed = (self._done - self._before) / max(now - self._start, 1e-9)
        left = (self._total - self._done) / max(speed, 1e-9)
        share = 100 * self._done / max(self._total, 1)
        minutes, seconds = divmod(round(max(left, 0)), 60)
        rest = (
            f"{minutes // 60} h {minutes % 60} min"
            if minutes >= 60
            else f"{minutes} min {seconds} s"
        )
        of = f"{self._done:,} of {self._total:,} tokens"
        text = f"{share:5.1f} %  {of}  {speed:,.0f} tokens/s  {rest} left"
        print(before + text, end=after, file=sys.stderr, flush=True)
