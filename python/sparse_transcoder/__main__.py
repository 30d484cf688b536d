"""Looks at checkpoints, converts them, and encodes corpora: python -m sparse_transcoder --help."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from . import corpus_command
from .formats.detect import Checkpoint, find
from .formats.files import dtype_name
from .formats.hub import local_folder
from .formats.native import fold_input_bias, save_transcoders
from .weights import TranscoderWeights

EXAMPLES = """examples:
  python -m sparse_transcoder info gemma-scope-2b-pt-transcoders
  python -m sparse_transcoder convert sae-lens-folder native-folder
  python -m sparse_transcoder convert clts/layer_3 native-folder --dtype bfloat16
  python -m sparse_transcoder encode --model M --transcoders DIR --out OUT texts/
  python -m sparse_transcoder index OUT

exit codes: 0 done, 1 the checkpoint or a folder is wrong, 2 the command line is wrong
"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Parser(argparse.ArgumentParser):
    """Every help ends with the examples, as they are written."""

    def __init__(self, **options: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(epilog=EXAMPLES, formatter_class=form, **options)


def main(arguments: list[str] | None = None) -> int:
    parser = _Parser(
        prog="python -m sparse_transcoder",
        description="Look at transcoder checkpoints, convert them to the layout that the C++\n"
        "library reads, and encode corpora (docs/corpus.md).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    info = commands.add_parser("info", help="a table of the layers in a folder")
    info.add_argument("folder", metavar="DIR")
    convert = commands.add_parser(
        "convert",
        help="write layer_{i}.safetensors and config.yaml",
        description="Write a checkpoint as layer_{i}.safetensors and config.yaml. An input bias\n"
        "is folded into b_enc, in float64. What the layout cannot hold (LayerNorm, a decoder\n"
        "that writes to many layers) is refused.",
    )
    convert.add_argument("source", metavar="SRC")
    convert.add_argument(
        "target", type=Path, metavar="DST", help="a folder that is empty or not there yet"
    )
    convert.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the matrices; biases and thresholds are kept as they are (default: as stored)",
    )
    for command in (info, convert):
        command.add_argument(
            "--layer", type=int, help="the layer of a checkpoint that does not say it itself"
        )
        command.add_argument("--k", type=int, help="k of top-k coders, where it stands nowhere")
        command.add_argument(
            "--variant", help="which coders are meant where a layer has several, e.g. average_l0_71"
        )
    encode = commands.add_parser("encode", help="the features of every token of a corpus")
    corpus_command.add_encode(encode)
    index = commands.add_parser("index", help="what features fire on: a page, and other formats")
    corpus_command.add_index(index)
    options = parser.parse_args(arguments)
    try:
        if options.command in ("encode", "index"):
            getattr(corpus_command, options.command)(options)
            return 0
        if options.command == "info":
            checkpoint = find(local_folder(options.folder), options.layer, options.variant)
            _info(checkpoint, options.k)
        else:
            checkpoint = find(local_folder(options.source), options.layer, options.variant)
            _convert(checkpoint, options.target, DTYPES.get(options.dtype), options.k)
        if checkpoint.warning:
            print(checkpoint.warning, file=sys.stderr)
    except BrokenPipeError:  # The reader of a pipe has enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    return 0


def _info(checkpoint: Checkpoint, k: int | None) -> None:
    rows = [("layer", "H", "F", "dtype", "activation", "hooks", "bytes")]
    total = 0
    for layer, weights in _with_progress(checkpoint, "read", k):
        features, hidden = weights.W_enc.shape
        size = sum(t.nbytes for t in vars(weights).values() if isinstance(t, torch.Tensor))
        total += size
        hooks = " -> ".join(name for name in (weights.hook_in, weights.hook_out) if name) or "-"
        shape = (str(hidden), str(features), dtype_name(weights.W_enc))
        rows.append((str(layer), *shape, _activation(weights), hooks, f"{size:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.ljust(width) if column in (3, 4, 5) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
    print(f"{checkpoint.layout}: {len(rows) - 1} layers, {total:,} bytes")


def _activation(weights: TranscoderWeights) -> str:
    kind = "relu" if weights.threshold is None else "jumprelu"
    if weights.k:
        kind = f"topk k={weights.k}"
    written = weights.W_enc.shape[1] if weights.W_dec is None else weights.W_dec.shape[0]
    wide = weights.write_layers == 1 and written != weights.W_enc.shape[1]
    more = (
        ("input bias", weights.input_bias is not None),
        ("LayerNorm", weights.ln_weight is not None),
        ("skip", weights.W_skip is not None),
        (f"writes {weights.write_layers} layers", weights.write_layers > 1),
        (f"writes {written} wide", wide),
    )
    return ", ".join([kind, *(name for name, there in more if there)])


def _convert(
    checkpoint: Checkpoint, target: Path, dtype: torch.dtype | None, k: int | None
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_transcoders(_folded(checkpoint, dtype, k), target, dtype)
    for warning in caught:
        print(warning.message, file=sys.stderr)


def _folded(
    checkpoint: Checkpoint, dtype: torch.dtype | None, k: int | None
) -> Iterator[tuple[int, TranscoderWeights]]:
    for layer, weights in _with_progress(checkpoint, "convert", k):
        folded, rounding = fold_input_bias(weights, dtype)
        yield layer, folded
        if folded is not weights:
            print(f"layer {layer}: input bias folded into b_enc, rounded by at most {rounding:.1e}")


def _with_progress(
    checkpoint: Checkpoint, verb: str, k: int | None
) -> Iterator[tuple[int, TranscoderWeights]]:
    """The layers one after the other, with a bar on stderr where that is a terminal."""
    loaded = checkpoint.load(device="cpu", k=k)
    total = len(checkpoint.files) if checkpoint.only is None else 1
    if not checkpoint.files:  # A native set is mapped whole: nothing is read yet.
        whole = list(loaded)
        loaded, total = iter(whole), len(whole)
    shown = sys.stderr.isatty()
    for done, item in enumerate(loaded):
        if shown:
            bar = f"[{'#' * (30 * done // total):30}] {done}/{total} "
            print(f"\r{verb} {bar}layer {item[0]} \x1b[K", end="", file=sys.stderr, flush=True)
        yield item
    if shown:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
