"""Reads checkpoint files that may lie.

Every error is one line with the file and the reason. Nothing in a file is ever run.
"""

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
from .archive import check_storages

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Tensors:
    """The tensors of one file, taken by name.

    What nobody takes is refused, since it may change what is computed.
    """

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        self.path = path
        self.left = dict(tensors)

    def __contains__(self, name: str) -> bool:
        return name in self.left

    def take(self, name: str, ndim: int) -> torch.Tensor:
        """A float tensor that must be there."""
        tensor = self._take(name)
        plain = tensor.layout == torch.strided and not tensor.is_meta
        if tensor.ndim != ndim or tensor.dtype not in FLOATS or not plain:
            raise ValueError(
                f"{self.path}: {name} must be a {ndim}-dimensional float32, bfloat16 or float16 "
                f"tensor, got {dtype_name(tensor)} {list(tensor.shape)}"
            )
        return tensor.detach()

    def take_if_there(self, name: str, ndim: int) -> torch.Tensor | None:
        return self.take(name, ndim) if name in self else None

    def take_integer(self, name: str) -> int:
        tensor = self._take(name)
        if tensor.numel() != 1 or tensor.dtype not in INTEGERS:
            raise ValueError(
                f"{self.path}: {name} must be one integer, "
                f"got {dtype_name(tensor)} {list(tensor.shape)}"
            )
        return int(tensor)

    def drop(self, pattern: str) -> None:
        """Leave out tensors that do not change the encoding."""
        self.left = {name: t for name, t in self.left.items() if not re.fullmatch(pattern, name)}

    def finish(self) -> None:
        for name in sorted(self.left):
            raise ValueError(f'{self.path}: tensor "{_short(name)}" is not part of this layout')

    def _take(self, name: str) -> torch.Tensor:
        tensor = self.left.pop(name, None)
        if tensor is None:
            there = _short(", ".join(sorted(self.left)) or "none")
            raise ValueError(f"{self.path}: tensor {name} is missing, got {there}")
        return tensor


class Config:
    """A JSON file that must be an object. Values are taken by name with their type."""

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
            there = _short(", ".join(map(str, self.values)) or "nothing")
            raise self.refuse(f"{name} is missing, got {there}")
        return value

    def k(self, name: str = "k", default: int | None = None) -> int:
        """The k of a top-k coder."""
        value: int = self.need(name, int) if default is None else self.get(name, int, default)
        if not 1 <= value < 2**63:
            raise self.refuse(f"{name} must be at least 1 and fit 64 bits, got {_short(value)}")
        return value

    def within(self, name: str) -> Config:
        """A nested object, empty where it is not there."""
        return Config(self.path, self.get(name, dict, {}))

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; an integer counts as one."""
        value = self.values.get(name, default)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if math.isfinite(value) and abs(value) <= 1e30:
                return float(value)
        raise self.refuse(f"{name} must be a finite number, got {_short(value)}")

    def sizes(self, **expected: float) -> None:
        """Refuse a size that is declared and is not that of the tensors. 0 declares nothing."""
        for name, size in expected.items():
            declared = self.values.get(name) or size
            if not isinstance(declared, (int, float)) or declared != size:
                raise self.refuse(
                    f"{name} must be {size} like the tensors', got {_short(declared)}"
                )

    def unknown(self, known: frozenset[str]) -> list[str]:
        """Keys that say something and that the layout does not know."""
        return [_short(name) for name, value in self.values.items() if name not in known and value]

    def must_be_off(self, *names: str) -> None:
        """Refuse switches of variants that we do not support."""
        for name in names:
            self.only(name, self.get(name, bool, False), (False,))

    def only(self, name: str, value: Any, supported: tuple[Any, ...]) -> Any:
        """Refuse a variant that we do not support, by its name."""
        if not any(value == one and type(value) is type(one) for one in supported):
            known = ", ".join(map(_short, supported))
            raise self.refuse(f"{name} {_short(value)} is not supported, only {known}")
        return value


class Loading:
    """One call of load_transcoders: where tensors go, and how many bytes are still to be checked.

    The check is for NaN and Inf. Its budget lets a large set open at once: the engine checks every
    encoder that it is given.
    """

    def __init__(self, device: torch.device, k: int | None = None) -> None:
        self.device = device
        self.k = k
        """The caller's k, for a top-k coder whose k stands nowhere."""
        self.left_to_scan = 1 << 28
        self.remarks: dict[str, list[int]] = {}
        """What the caller must know, and of which layers."""

    def tell(self, layer: int, remark: str) -> None:
        """Something that changes what is computed and that only the caller can do."""
        layers = self.remarks.setdefault(remark, [])
        if layer not in layers:
            layers.append(layer)

    def tell_unknown(self, layer: int, config: Config, known: frozenset[str]) -> None:
        """Name the keys of a config that the layout does not know."""
        if names := config.unknown(known):
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            self.tell(layer, f"{config.path.name} has keys that are not known, ignored: {shown}")

    def warning(self, folder: Path) -> str:
        """All remarks in one line, empty where there are none."""
        parts = []
        for remark, layers in self.remarks.items():
            some = ", ".join(map(str, layers[:4])) + (" .." if len(layers) > 4 else "")
            parts.append(f"{remark} (layer{'s' * (len(layers) > 1)} {some})")
        return f"{folder}: {'; '.join(parts)}" if parts else ""

    def k_of(self, path: Path, declared: int | None) -> int:
        """The k of a top-k coder: what the checkpoint declares, else the caller's."""
        k = self.k if declared is None else declared
        if k is None:
            raise ValueError(f"{path}: its k stands nowhere in the checkpoint: give k=")
        return k

    def weights(
        self, layer: int, source: Path, W_enc: torch.Tensor, **fields: Any
    ) -> TranscoderWeights:
        """Checked weights on the device; ``fields`` are those of TranscoderWeights.

        W_enc [F, H] is copied once where its file holds [H, F], else it is a view of the file.
        W_dec is [d_out, F] and b_dec [d_out]; with write_layers n they are [n * H, F] and [H] or
        [n * H], for the layers written to, one after the other.
        """
        _check_shapes(source, W_enc, fields)
        for name in ("hook_in", "hook_out"):
            if not fields.get(name, "").isprintable():
                hook = _short(fields[name])
                raise ValueError(f"{source}: {name} must be printable text, got {hook}")
        tensors = {"W_enc": W_enc, **fields}
        tensors = {name: t for name, t in tensors.items() if isinstance(t, torch.Tensor)}
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
                    f"{source}: out of memory: {name} needs {tensor.nbytes} bytes on "
                    f"{self.device}; load on cpu and encode with device_weight_bytes"
                ) from None
        tensors["W_enc"] = tensors["W_enc"].contiguous()
        return TranscoderWeights(layer=layer, source=str(source), **{**fields, **tensors})


def _check_shapes(source: Path, W_enc: torch.Tensor, fields: Mapping[str, Any]) -> None:
    features, hidden = W_enc.shape
    if not features or not hidden:
        raise ValueError(f"{source}: W_enc must not be empty, got [{features}, {hidden}]")
    W_dec, b_dec = fields.get("W_dec"), fields.get("b_dec")
    layers = fields.get("write_layers", 1)
    width = hidden if W_dec is None or layers > 1 else W_dec.shape[0]
    own = b_dec is not None and tuple(b_dec.shape) == (width,)
    shapes = {
        "b_enc": (features,),
        "W_dec": (layers * width, features),
        "b_dec": (width if own else layers * width,),
        "threshold": (features,),
        "W_skip": (width, hidden),
        "input_bias": (hidden,),
        "ln_weight": (hidden,),
        "ln_bias": (hidden,),
    }
    for name, shape in shapes.items():
        tensor = fields.get(name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{source}: {name} must be {list(shape)} for W_enc [{features}, {hidden}], "
                f"got {list(tensor.shape)}"
            )


def read_safetensors(path: Path) -> Tensors:
    """Memory-mapped: a tensor is read when it is used."""
    return Tensors(path, _C.read_safetensors(str(path)))


def safetensors_names(path: Path) -> frozenset[str]:
    """The names of the tensors in a file, none where it cannot be read."""
    try:
        return frozenset(_C.read_safetensors(str(path)))
    except (ValueError, TypeError, OSError):  # What is wrong is told where it is loaded.
        return frozenset()


def read_npz(path: Path) -> Tensors:
    """Every array of a .npz, which cannot be mapped."""
    try:
        import numpy
    except ImportError:
        raise ImportError(
            f"{path}: numpy is needed to read .npz files: pip install numpy"
        ) from None
    _must_exist(path)

    def read() -> dict[str, torch.Tensor]:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        maximum = 8 * path.stat().st_size + (64 << 20)  # Weights hardly compress.
        if unpacked > maximum:
            raise ValueError(f"it unpacks to {unpacked} bytes, expected at most {maximum}")
        with numpy.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    return Tensors(path, _guarded(path, "an .npz archive of plain arrays", read))


def read_pickled(path: Path, key: str | None = None) -> Tensors:
    """A state dict saved by torch.save, or the one under a key of what was saved.

    It is memory-mapped and never unpickled unsafely. A record of the archive that is shorter than
    the storage that stands on it is refused: torch would read what follows it.
    """
    _must_exist(path)

    def read() -> Any:
        check_storages(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)

    loaded = _guarded(path, "a checkpoint that can be read without running its code", read)
    state = loaded.get(key) if key and isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: must hold a {key or 'state dict'} of tensors")
    return Tensors(path, {str(name).removeprefix("_orig_mod."): t for name, t in state.items()})


def pickled_names(path: Path) -> frozenset[str]:
    """The names of the tensors in a .pt, none where it cannot be read. No tensor is opened."""
    try:
        return frozenset(check_storages(path))
    except Exception:  # What is wrong with it is told where it is loaded.
        return frozenset()


def short_hook(name: str, layer: int) -> str:
    """A hook point without its layer: blocks.3.ln2.hook_normalized -> ln2.hook_normalized.

    The hook point of another layer is kept whole.
    """
    return name.removeprefix(f"blocks.{layer}.")


def layer_in(text: str) -> int | None:
    """The layer that a name like blocks.3.mlp, layers.3, h.3.mlp, layer_3 or resid_post_layer_3
    tells."""
    found = re.search(
        r"(?:^|[^A-Za-z])(?:(?:layers?|blocks?)[._-]?|h\.)(\d{1,6})(?![\dA-Za-z])", text
    )
    return int(found[1]) if found else None


def dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def config_text(path: Path) -> str:
    """The beginning of a config.yaml, empty where there is none."""
    return path.read_bytes()[:1_000_000].decode(errors="replace") if is_there(path) else ""


def yaml_values(path: Path) -> dict[str, str]:
    """The plain ``key: value`` lines of a config.yaml."""
    values = {}
    for line in config_text(path).splitlines():
        key, _, value = line.partition(":")
        if re.fullmatch(r"\w+", key) and value[:1].isspace():
            values[key] = yaml_scalar(value)
    return values


def yaml_scalar(value: str) -> str:
    """A plain or quoted value, without the comment after it."""
    value = value.strip()
    if quoted := re.match(r"\"([^\"]*)\"|'([^']*)'", value):
        return quoted[1] or quoted[2] or ""
    return re.split(r"(?:^|\s)#", value)[0].strip()


def _is_finite(tensor: torch.Tensor) -> bool:
    """One pass over the file. A sum that only overflows is looked at again."""
    return math.isfinite(tensor.sum().item()) or bool(torch.isfinite(tensor).all())


def is_there(path: Path) -> bool:
    """Whether there is a file. A pipe or a link that leads nowhere is refused."""
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
    maximum = 10_000_000
    _must_exist(path)
    try:
        with open(path, "rb") as file:
            text = file.read(maximum + 1)
    except OSError as error:
        raise FileNotFoundError(f"{path}: cannot be opened: {error.strerror}") from None
    if len(text) > maximum:
        raise ValueError(f"{path}: must have at most {maximum} bytes")
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
