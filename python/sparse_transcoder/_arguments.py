"""Checks of what callers pass. An error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from . import _C


def integer(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {number}")
    return number


def at_least(minimum: int, name: str, value: Any) -> int:
    number = integer(name, value)
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def positive(name: str, value: Any) -> int:
    return at_least(1, name, value)


def number(name: str, value: Any) -> float:
    is_number = hasattr(value, "__float__") or hasattr(value, "__index__")
    if isinstance(value, str) or not is_number:
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a number: {error}") from None
    if math.isnan(result):
        raise ValueError(f"{name} must be a number, got NaN")
    return result


def tensor(layer: int, value: Any, name: str = "hidden") -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"layer {layer}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise ValueError(f"layer {layer}: {name} must be a dense tensor, got a nested one")
    return value


def device(value: str | torch.device | None) -> torch.device:
    """A device of this machine. None is CUDA where there is one and
    this build has kernels for it, else the CPU."""
    if value is None:
        value = "cuda" if _C.cuda_kernels() and torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be cpu or cuda, got {value!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {chosen}")
    count = torch.cuda.device_count() if chosen.type == "cuda" else 0
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise ValueError(f"device must be here, got {chosen}, and torch sees {count} CUDA devices")
    return chosen
