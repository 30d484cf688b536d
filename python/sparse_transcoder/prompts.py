"""What callers give a model to read: token ids, which of them are padding, and which a caller
wants to leave out."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch

from .probe import parameters_of, unwrapped

Exclude: TypeAlias = "Literal['special'] | Iterable[int] | torch.Tensor"
"""Positions to leave out: "special", a set of token ids, or a mask [B, T] or [T] that is true
there."""


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
    """A batch of prompts."""

    ids: torch.Tensor
    """[B, T], on the caller's device."""
    mask: torch.Tensor
    """[B, T] bool, false at padding."""
    rest: dict[str, Any]
    """Everything else that the caller gave beside them."""

    def for_model(self, model: Any) -> dict[str, Any]:
        """What of the rest the model's forward takes."""
        takes = parameters_of(model)[0]
        return {
            name: value for name, value in self.rest.items() if name in takes and value is not None
        }


def prompts_of(inputs: Any) -> Prompts:
    """Token ids [B, T] or [T], or a mapping that holds them as ``input_ids``.

    Raises:
        TypeError, ValueError: a wrong type or shape, or no real token.
    """
    ids, mask, rest = inputs, None, {}
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            raise ValueError(
                f"inputs must hold input_ids, got {', '.join(map(str, inputs)) or 'nothing'}"
            )
        rest = {
            str(name): value
            for name, value in inputs.items()
            if name not in ("input_ids", "attention_mask")
        }
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    for name, tensor in (("input_ids", ids), ("attention_mask", mask)):
        if tensor is not None and not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"input_ids must be integers, got {ids.dtype}")
    if ids.ndim not in (1, 2):
        raise ValueError(f"input_ids must be [B, T] or [T], got {list(ids.shape)}")
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask must be {list(ids.shape)} as input_ids, got {list(mask.shape)}"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask must be 0 and 1, got other values")
    if not bool(mask.any()):
        raise ValueError("inputs must hold at least one token that is not padding, got none")
    if ids.ndim == 1:
        rest = {
            n: v[None] if isinstance(v, torch.Tensor) and v.shape == ids.shape else v
            for n, v in rest.items()
        }
    width = ids.shape[-1]
    return Prompts(ids.reshape(-1, width), mask.reshape(-1, width).bool(), rest)


def special_ids(model: Any) -> set[int]:
    """Every token id that the model's configuration names: ``bos_token_id``, ``pad_token_id``,
    ``image_token_id``, ..."""
    inner = unwrapped(model)
    config: Any = getattr(inner, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    found: set[int] = set()
    for part in (config, text, getattr(inner, "generation_config", None)):
        for name, value in (part.to_dict() if part is not None else {}).items():
            if _is_token_id(name):
                found |= {
                    v
                    for v in (value if isinstance(value, (list, tuple)) else [value])
                    if isinstance(v, int) and v >= 0
                }
    return found


def _is_token_id(name: str) -> bool:
    return name.endswith(("_token_id", "_token_ids", "_token_index"))


def excluded(
    exclude: Exclude, shape: tuple[int, int], inputs: Any = None, model: Any = None
) -> torch.Tensor:
    """[B, T] bool, on the CPU: the positions that ``exclude`` names.

    Args:
        exclude: see :data:`Exclude`. "special" is what a tokenizer's ``special_tokens_mask``
            marks, and every id that the model's configuration names.
        shape: (B, T).
        inputs: token ids [B, T] or [T], a list of them, or a tokenizer's result.
        model: a transformers model, where there is one.

    Raises:
        ValueError: a mask of another shape, ids or special tokens that nobody gives. TypeError:
            another type.
    """
    if isinstance(exclude, torch.Tensor) and exclude.ndim == len(shape) - 1:
        exclude = exclude[None]
    if isinstance(exclude, torch.Tensor):
        if tuple(exclude.shape) != shape:
            raise ValueError(
                f"exclude must be a mask {list(shape)} as the tokens, got {list(exclude.shape)}"
            )
        if not bool(((exclude == 0) | (exclude == 1)).all()):
            raise ValueError(
                "exclude must be a mask of 0 and 1, or a set of token ids, got a tensor of other "
                "values"
            )
        return exclude.detach().bool().cpu()
    ids = inputs["input_ids"] if isinstance(inputs, Mapping) else inputs
    if isinstance(ids, torch.Tensor):
        ids = ids.detach().cpu().reshape(shape)
    elif ids is not None:
        ids = torch.tensor([int(token) for token in ids], dtype=torch.int64).reshape(shape)
    if isinstance(exclude, str):
        if exclude != "special":
            raise ValueError(f'exclude must be "special", token ids or a mask, got {exclude!r}')
        marked = _marked(inputs, shape)
        known = special_ids(model) if model is not None else set()
        if marked is None and not known:
            raise ValueError(
                'exclude="special" needs a tokenizer\'s result with '
                "return_special_tokens_mask=True, or a model whose "
                "configuration names special tokens: give their ids, set(tokenizer.all_special_ids)"
            )
        of_ids = (
            torch.isin(ids, torch.tensor(sorted(known), dtype=ids.dtype))
            if known and ids is not None
            else None
        )
        both = [mask for mask in (marked, of_ids) if mask is not None]
        return both[0] | both[-1]
    if isinstance(exclude, Mapping) or not isinstance(exclude, Iterable):
        raise TypeError(
            f'exclude must be "special", token ids or a mask, got {type(exclude).__name__}'
        )
    wanted = list(exclude)
    for token in wanted:
        if not isinstance(token, numbers.Integral) or isinstance(token, bool):
            raise TypeError(
                f"exclude must hold token ids, got {type(token).__name__}; a mask must be a tensor"
            )
    if ids is None:
        raise ValueError("exclude by token ids needs the tokens' ids, got none")
    return torch.isin(ids, torch.tensor([int(token) for token in wanted], dtype=ids.dtype))


def _marked(inputs: Any, shape: tuple[int, int]) -> torch.Tensor | None:
    """What a tokenizer's result says is special; fast tokenizers say it without being asked."""
    if not isinstance(inputs, Mapping):
        return None
    mask = inputs.get("special_tokens_mask")
    if mask is None and getattr(inputs, "encodings", None):
        mask = [encoding.special_tokens_mask for encoding in inputs.encodings]  # type: ignore[attr-defined]
    if mask is None:
        return None
    return torch.as_tensor(mask).bool().cpu().reshape(shape)
