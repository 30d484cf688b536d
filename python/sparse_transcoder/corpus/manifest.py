"""What a run is made of. A run that differs is another run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..probe import unwrapped
from ..weights import TranscoderWeights

SCHEMA = 1


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of names, dtypes, shapes and values; of tensors on meta without the values."""
    found = hashlib.sha256()
    for name, tensor in tensors.items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        if not tensor.is_meta and tensor.numel() > 0:
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found.update(values.numpy().data)
    return found.hexdigest()


def text_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def of_model(model: torch.nn.Module) -> dict[str, Any]:
    inner = unwrapped(model)
    config: Any = getattr(inner, "config", None)
    settings = config.to_dict() if config is not None else {}
    settings.pop("_name_or_path", None)  # where it lies
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    parameter = next(iter(tensors.values()))
    return {
        "class": type(inner).__name__,
        "prefix": getattr(inner, "base_model_prefix", ""),
        "config": text_digest(settings),
        "weights": digest(tensors),
        "dtype": str(parameter.dtype),
        "device": parameter.device.type,
    }


def of_tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return text_digest(backend.to_str() if backend is not None else tokenizer.get_vocab())


def of_layer(weights: TranscoderWeights, place: Any) -> dict[str, Any]:
    features, hidden = weights.W_enc.shape
    tensors = {n: t for n, t in vars(weights).items() if isinstance(t, torch.Tensor)}
    encoder = ("W_enc", "b_enc", "threshold", "input_bias", "ln_weight", "ln_bias")
    return {
        "hook": f"{place.path}:{place.side}" + (" before its weight" if place.norm else ""),
        "features": features,
        "hidden": hidden,
        "k": weights.k,
        "jumprelu": weights.threshold is not None,
        "sha256": digest({n: t for n, t in tensors.items() if n in encoder}),
    }


def versions() -> dict[str, str]:
    names = ("sparse_transcoder", "torch", "transformers")
    return {name: importlib.metadata.version(name) for name in names}


def first_difference(there: Any, here: Any, name: str = "") -> str | None:
    """The first place where two manifests differ, and both values."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in [*there, *(k for k in here if k not in there)]:
            found = first_difference(
                there.get(key), here.get(key), f"{name}.{key}" if name else key
            )
            if found:
                return found
        return None
    return None if there == here else f"{name} was {json.dumps(there)}, now {json.dumps(here)}"


def check_same(path: Path, run: Mapping[str, Any]) -> None:
    """ValueError where the manifest at ``path`` is of another run; ``run`` may lack keys yet."""
    there = read(path)
    difference = first_difference({key: there.get(key) for key in run}, run)
    if difference:
        raise ValueError(f"{path.parent}: holds another run: {difference}; give another folder")


def read(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path.parent}: there is no {path.name}, so no corpus") from None
    except ValueError as error:
        raise ValueError(f"{path}: must be JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        schema = manifest.get("schema") if isinstance(manifest, dict) else None
        raise ValueError(f"{path}: must have schema {SCHEMA}, got {schema}")
    return manifest
