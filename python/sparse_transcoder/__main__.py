"""Looks at checkpoints and converts them: python -m sparse_transcoder --help."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from .formats import Checkpoint, find
from .weights import TranscoderWeights

EXAMPLES = """examples:
  python -m sparse_transcoder info gemma-scope-2b-pt-transcoders
  python -m sparse_transcoder convert sae-lens-folder native-folder
  python -m sparse_transcoder convert clts/layer_3 native-folder --dtype bfloat16

exit codes: 0 done, 1 the checkpoint or a folder is wrong, 2 the command line is wrong
"""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAFETENSORS_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def main(arguments: list[str] | None = None) -> int:
    form = {"epilog": EXAMPLES, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(
        prog="python -m sparse_transcoder",
        description="Look at transcoder checkpoints, and convert them to the layout that the C++ library reads.",
        **form,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    info = commands.add_parser("info", help="a table of the layers in a folder", **form)
    info.add_argument("folder", type=Path, metavar="DIR")
    convert = commands.add_parser(
        "convert",
        help="write layer_{i}.safetensors and config.yaml",
        description="Write a checkpoint as layer_{i}.safetensors and config.yaml. An input bias is folded into b_enc,\n"
        "in float64; what the layout cannot express (LayerNorm, a decoder that writes to many layers) is refused.",
        **form,
    )
    convert.add_argument("source", type=Path, metavar="SRC")
    convert.add_argument("target", type=Path, metavar="DST", help="a folder that is empty or not there yet")
    convert.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the matrices; biases and thresholds are kept as they are (default: as stored)",
    )
    options = parser.parse_args(arguments)
    try:
        if options.command == "info":
            _info(options.folder)
        else:
            _convert(options.source, options.target, DTYPES.get(options.dtype))
    except BrokenPipeError:  # the reader of a pipe has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        print("error:", " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 1
    return 0


def _info(folder: Path) -> None:
    checkpoint = find(folder)
    rows = [("layer", "H", "F", "dtype", "activation", "hooks", "bytes")]
    total = 0
    for layer, weights in _with_progress(checkpoint, "read"):
        features, hidden = weights.W_enc.shape
        size = sum(tensor.nbytes for tensor in vars(weights).values() if isinstance(tensor, torch.Tensor))
        total += size
        hooks = " -> ".join(name for name in (weights.hook_in, weights.hook_out) if name) or "-"
        dtype = str(weights.W_enc.dtype).removeprefix("torch.")
        rows.append((str(layer), str(hidden), str(features), dtype, _activation(weights), hooks, f"{size:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = (
            cell.ljust(width) if column in (3, 4, 5) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells).rstrip())
    print(f"{checkpoint.layout}: {len(rows) - 1} layers, {total:,} bytes")


def _activation(weights: TranscoderWeights) -> str:
    kind = f"topk k={weights.k}" if weights.k else "relu" if weights.threshold is None else "jumprelu"
    targets = 1 if weights.W_dec is None else weights.W_dec.shape[0] // weights.W_enc.shape[1]
    more = (
        ("input bias", weights.input_bias is not None),
        ("LayerNorm", weights.ln_weight is not None),
        ("skip", weights.W_skip is not None),
        (f"writes {targets} layers", targets > 1),
    )
    return ", ".join([kind, *(name for name, there in more if there)])


def _convert(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    checkpoint = find(source)
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target}: must be an empty folder or not be there yet")
    part = target.with_name(target.name + ".part")  # renamed when it is whole
    part.mkdir(parents=True)
    try:
        hooks = set()
        for layer, weights in _with_progress(checkpoint, "convert"):
            tensors, rounding = _native_tensors(weights, dtype)
            _write_safetensors(part / f"layer_{layer}.safetensors", tensors)
            hooks.add((weights.hook_in, weights.hook_out))
            if rounding is not None:
                print(f"layer {layer}: input bias folded into b_enc, rounded by at most {rounding:.1e}")
        (part / "config.yaml").write_text("\n".join(_config_lines(hooks)) + "\n")
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _config_lines(hooks: set[tuple[str, str]]) -> list[str]:
    lines = ["model_kind: transcoder_set"]
    if len(hooks) > 1:
        print("the layers have different hooks: none is written to config.yaml", file=sys.stderr)
        return lines
    for key, hook in zip(("feature_input_hook", "feature_output_hook"), next(iter(hooks)), strict=True):
        if re.fullmatch(r"[\w.\-/\[\]]+", hook):
            lines.append(f"{key}: {hook}")
    return lines


def _native_tensors(
    weights: TranscoderWeights, dtype: torch.dtype | None
) -> tuple[dict[str, torch.Tensor], float | None]:
    """What a native file holds, and by how much folding the input bias rounded b_enc."""
    if weights.ln_weight is not None:
        raise ValueError(f"{weights.source}: LayerNorm cannot be expressed in the native layout")
    if weights.W_dec is not None and weights.W_dec.shape[0] != weights.W_enc.shape[1]:
        raise ValueError(
            f"{weights.source}: a decoder that writes to many layers cannot be expressed in the native layout"
        )
    W_enc = weights.W_enc.to(dtype or weights.W_enc.dtype)
    tensors = {"W_enc": W_enc, "b_enc": weights.b_enc}
    rounding = None
    if weights.input_bias is not None:
        bias = weights.input_bias.to(torch.float64)
        shift = torch.cat([rows.to(torch.float64) @ bias for rows in W_enc.split(4096)])
        exact = weights.b_enc.to(torch.float64) - shift
        tensors["b_enc"] = exact.to(torch.float32)
        rounding = (tensors["b_enc"].to(torch.float64) - exact).abs().max().item()
    if weights.W_dec is not None:
        tensors["W_dec"] = weights.W_dec.T.to(dtype or weights.W_dec.dtype)
    if weights.b_dec is not None:
        tensors["b_dec"] = weights.b_dec
    if weights.threshold is not None:
        tensors["activation_function.threshold"] = weights.threshold
    if weights.W_skip is not None:
        tensors["W_skip"] = weights.W_skip.to(dtype or weights.W_skip.dtype)
    if weights.k is not None:
        tensors["k"] = torch.tensor([weights.k])
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.sum(dtype=torch.float64)):
            raise ValueError(f"{weights.source}: {name} is not finite as {str(tensor.dtype).removeprefix('torch.')}")
    return tensors, rounding


def _write_safetensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            for rows in tensor.split(4096):
                block = rows.contiguous()
                file.write((ctypes.c_char * block.nbytes).from_address(block.data_ptr()))


def _with_progress(checkpoint: Checkpoint, verb: str) -> Iterator[tuple[int, TranscoderWeights]]:
    """The layers one after the other, with a bar on stderr where that is a terminal."""
    loaded: Iterable[tuple[int, TranscoderWeights]] = checkpoint.load(device="cpu")
    if not checkpoint.files:
        loaded = list(loaded)  # a native set, which is mapped whole: nothing is read yet
    total = len(checkpoint.files or loaded)
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
