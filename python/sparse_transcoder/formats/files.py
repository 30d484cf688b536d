"""Reads checkpoint files that may lie: every error is one line with the file and the reason, and nothing in a file is run."""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import _C
from ..weights import TranscoderWeights

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class Tensors:
    """The tensors of one file, taken by name; what nobody takes is refused, as it may change what is computed."""

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        self.path = path
        self.left = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str, ndim: int) -> torch.Tensor:
        """A float tensor that must be there."""
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise ValueError(
                f"{self.path}: tensor {name} is missing, got {_short(', '.join(sorted(self.left)) or 'none')}"
            )
        if tensor.ndim != ndim or tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(
                f"{self.path}: {name} must be a {ndim}-dimensional float32, bfloat16 or float16 tensor, "
                f"got {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            )
        return tensor.detach()

    def take_if_there(self, name: str, ndim: int) -> torch.Tensor | None:
        return self.take(name, ndim) if name in self else None

    def take_integer(self, name: str) -> int:
        tensor = self.left.pop(name, None)
        if tensor is None:
            raise ValueError(
                f"{self.path}: tensor {name} is missing, got {_short(', '.join(sorted(self.left)) or 'none')}"
            )
        if tensor.numel() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"{self.path}: {name} must be one integer, got {tensor.dtype} {list(tensor.shape)}")
        return int(tensor)

    def drop(self, pattern: str) -> None:
        """Leave out tensors that do not change the encoding."""
        self.left = {name: tensor for name, tensor in self.left.items() if not re.fullmatch(pattern, name)}

    def finish(self) -> None:
        for name in sorted(self.left):
            raise ValueError(f'{self.path}: tensor "{_short(name)}" is not part of this layout')


class Config:
    """A JSON file that must be an object; values are taken by name with their type."""

    def __init__(self, path: Path, values: dict[str, Any] | None = None) -> None:
        self.path = path
        self.values = _read_json(path) if values is None else values

    def refuse(self, reason: str) -> ValueError:
        return ValueError(f"{self.path}: {reason}")

    def get(self, name: str, kind: type, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.refuse(f"{name} must be of type {kind.__name__}, got {_short(value)}")
        return value

    def need(self, name: str, kind: type) -> Any:
        value = self.get(name, kind, None)
        if value is None:
            raise self.refuse(f"{name} is missing, got {_short(', '.join(map(str, self.values)) or 'nothing')}")
        return value

    def k(self, name: str = "k", default: int | None = None) -> int:
        """The k of a top-k coder."""
        value = self.need(name, int) if default is None else self.get(name, int, default)
        if not 1 <= value < 2**63:
            raise self.refuse(f"{name} must be at least 1 and fit 64 bits, got {_short(value)}")
        return value

    def within(self, name: str) -> Config:
        """A nested object, empty where it is not there."""
        return Config(self.path, self.get(name, dict, {}))

    def only(self, name: str, value: Any, supported: tuple[Any, ...]) -> Any:
        """Refuse a variant that we do not support, by its name."""
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in supported):
            raise self.refuse(f"{name} {_short(value)} is not supported, only {', '.join(map(_short, supported))}")
        return value


class Loading:
    """One call of load_transcoders: where tensors go, and how many bytes are still checked for NaN and Inf.

    The budget lets a large set open at once; the engine checks every encoder it is given.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.left_to_scan = 1 << 28

    def weights(self, layer: int, source: Path, W_enc: torch.Tensor, **fields: Any) -> TranscoderWeights:
        """Checked weights on the device. W_enc [F, H]: copied once where its file holds [H, F], else a view of the file.

        b_dec [H] or [n * H], W_dec [n * H, F]: n layers written to, one after the other.
        """
        features, hidden = W_enc.shape
        if not features or not hidden:
            raise ValueError(f"{source}: W_enc must not be empty, got [{features}, {hidden}]")
        for name in ("hook_in", "hook_out"):
            if not fields.get(name, "").isprintable():
                raise ValueError(f"{source}: {name} must be printable text, got {_short(fields[name])}")
        W_dec = fields.get("W_dec")
        targets = W_dec.shape[0] // hidden if W_dec is not None and W_dec.shape[0] % hidden == 0 else 1
        shapes = {
            "b_enc": (features,),
            "W_dec": (targets * hidden, features),
            "b_dec": (hidden,),
            "threshold": (features,),
            "W_skip": (hidden, hidden),
            "input_bias": (hidden,),
            "ln_weight": (hidden,),
            "ln_bias": (hidden,),
        }
        tensors = {"W_enc": W_enc}
        for name, shape in shapes.items():
            tensor = fields.get(name)
            if tensor is None:
                continue
            wide = name == "b_dec" and tuple(tensor.shape) == (targets * hidden,)
            if tuple(tensor.shape) != shape and not wide:
                wanted, got = list(shape), list(tensor.shape)
                raise ValueError(f"{source}: {name} must be {wanted} for W_enc [{features}, {hidden}], got {got}")
            tensors[name] = tensor
        for name, tensor in tensors.items():
            if tensor.ndim == 2:
                self.left_to_scan -= tensor.nbytes
            if tensor.ndim == 1 or self.left_to_scan >= 0:
                if not _is_finite(tensor):
                    raise ValueError(f"{source}: {name} must be finite, got NaN or Inf")
            try:
                tensors[name] = tensor.to(self.device)
            except torch.OutOfMemoryError:
                raise torch.OutOfMemoryError(
                    f"{source}: out of memory: {name} needs {tensor.nbytes} bytes on {self.device}; load on cpu and encode with "
                    "device_weight_bytes"
                ) from None
        tensors["W_enc"] = tensors["W_enc"].contiguous()
        return TranscoderWeights(layer=layer, source=str(source), **{**fields, **tensors})


def read_safetensors(path: Path) -> Tensors:
    """Memory-mapped: a tensor is read when it is used."""
    return Tensors(path, _C.read_safetensors(str(path)))


def read_npz(path: Path) -> Tensors:
    """Every array of a .npz, which cannot be mapped."""
    try:
        import numpy
    except ImportError:
        raise ImportError(f"{path}: numpy is needed to read .npz files: pip install numpy") from None
    _must_exist(path)

    def read() -> dict[str, torch.Tensor]:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        most = 8 * path.stat().st_size + (64 << 20)  # weights hardly compress
        if unpacked > most:
            raise ValueError(f"it unpacks to {unpacked} bytes, expected at most {most}")
        with numpy.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    return Tensors(path, _guarded(path, "an .npz archive of plain arrays", read))


def read_pickled(path: Path, key: str | None = None) -> Tensors:
    """A state dict saved by torch.save, or the one under a key; memory-mapped and never unpickled unsafely."""
    _must_exist(path)

    def read() -> Any:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{member.filename} is compressed, which torch.save never does")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    loaded = _guarded(path, "a checkpoint that can be read without running its code", read)
    state = loaded.get(key) if key and isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: must hold a {key or 'state dict'} of tensors")
    return Tensors(path, {str(name).removeprefix("_orig_mod."): tensor for name, tensor in state.items()})


def short_hook(name: str) -> str:
    """A hook point without its layer: blocks.3.ln2.hook_normalized -> ln2.hook_normalized."""
    return re.sub(r"^blocks\.\d+\.", "", name)


def layer_in(text: str) -> int | None:
    """The layer that a name like blocks.3.mlp, layers.3, layer_3 or resid_post_layer_3 tells."""
    found = re.search(r"(?:^|[^A-Za-z])(?:layers?|blocks)[._-]?(\d{1,6})(?!\d)", text)
    return int(found[1]) if found else None


def _is_finite(tensor: torch.Tensor) -> bool:
    """One pass over the file; a sum that only overflows is looked at again."""
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def is_there(path: Path) -> bool:
    """Whether there is a file; anything else of this name is refused: a pipe, a link that leads nowhere."""
    if path.is_file():
        return True
    if os.path.lexists(path):
        raise ValueError(f"{path}: must be a regular file")
    return False


def _must_exist(path: Path) -> None:
    if not is_there(path):
        raise FileNotFoundError(f"{path}: cannot be opened: no such file")


def _guarded(path: Path, what: str, read: Callable[[], Any]) -> Any:
    """Other libraries raise almost anything for a malformed file."""
    try:
        return read()
    except Exception as error:
        reason = _short(str(error).strip().split("\n")[0]) or type(error).__name__
        raise ValueError(f"{path}: not {what}: {reason}") from None


def _read_json(path: Path) -> dict[str, Any]:
    most = 10_000_000
    _must_exist(path)
    try:
        with open(path, "rb") as file:
            text = file.read(most + 1)
    except OSError as error:
        raise FileNotFoundError(f"{path}: cannot be opened: {error.strerror}") from None
    if len(text) > most:
        raise ValueError(f"{path}: must have at most {most} bytes")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: must be JSON: {str(error)[:200]}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a JSON object, got {type(values).__name__}")
    return values


def _short(value: Any) -> str:
    """A file's own words, fit for one line of an error."""
    text = str(value)
    shown = "".join(c if c.isprintable() else " " for c in text[:100])
    return shown if len(text) <= 100 else shown + "..."
