"""Checks of what callers pass: an error names the argument, what was expected and what came."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch


def _integer(name: str, value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{name} must fit in 64 bits, got {number}")
    return number


def _at_least(least: int, name: str, value: Any) -> int:
    number = _integer(name, value)
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _positive(name: str, value: Any) -> int:
    return _at_least(1, name, value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, str) or (not hasattr(value, "__float__") and not hasattr(value, "__index__")):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a number: {error}") from None
    if math.isnan(result):
        raise ValueError(f"{name} must be a number, got NaN")
    return result


def _tensor(layer: int, value: Any, name: str = "hidden") -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"layer {layer}: {name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise ValueError(f"layer {layer}: {name} must be a dense tensor, got a nested one")
    return value


def _device(value: str | torch.device | None) -> torch.device:
    """A device that is here; None is CUDA where there is one, else the CPU."""
    if value is None:
        value = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be cpu or cuda, got {value!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {chosen}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be here, got {chosen}, and torch sees {torch.cuda.device_count()} CUDA devices")
    return chosen
