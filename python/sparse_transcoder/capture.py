"""Read hidden states from Hugging Face causal models, where a transcoder expects them."""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

HOOKS = (
    "mlp.hook_in",
    "ln2.hook_normalized",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "mlp.hook_out",
    "hook_mlp_out",
)
"""Places that :func:`capture` reads."""


@dataclasses.dataclass(frozen=True, eq=False)
class Captured:
    """Hidden states at the N real positions of a batch, prompt after prompt, without padding."""

    hidden: dict[int, torch.Tensor]
    """{layer: [N, H]}, in the model's dtype, on the layer's device."""
    batch_idx: torch.Tensor
    """[N] int64: the row of ``input_ids`` that each position came from."""
    ctx_idx: torch.Tensor
    """[N] int64: the index of each position among the row's real tokens, from 0. It is the same for
    left and right padding."""


class _Done(Exception):
    """Raised by the last hook: the rest of the forward pass is not needed."""


def capture(
    model: nn.Module,
    inputs: torch.Tensor | Mapping[str, torch.Tensor],
    layers: Iterable[int],
    hook: str | Mapping[int, str] | None = None,
    *,
    exact: bool = True,
) -> Captured:
    """Hidden states of ``layers`` at the real positions of a batch of prompts.

    The forward pass stops after the deepest place asked for. No logits are computed and nothing is
    recorded for gradients. The model keeps its mode, and its hooks are gone afterwards. A model
    serves one capture at a time.

    The hooks carry TransformerLens's names (https://github.com/TransformerLensOrg/TransformerLens)
    and may have the prefix ``blocks.{layer}.``:

    - ``mlp.hook_in``, ``mlp.hook_out``: the MLP's input and output.
    - ``hook_mlp_out``: what the MLP adds to the residual stream. That is its output, normalized
      where the model has a norm for it.
    - ``ln2.hook_normalized``: the output of the norm before the MLP. Of an RMSNorm it is read
      before the norm's weight is applied.
    - ``hook_resid_pre``, ``hook_resid_mid``, ``hook_resid_post``: the residual stream before the
      layer, between attention and MLP, and after the layer.

    Args:
        model: a model like Llama, Gemma, GPT-2 or GPT-NeoX: decoder layers in ``layers`` or ``h``,
            each with an ``mlp``.
        inputs: token ids [B, T] or [T], or a tokenizer's result with ``input_ids`` and
            ``attention_mask`` (1 is real, 0 is padding).
        layers: the layers to keep.
        hook: the place for all layers, or {layer: place}. None is ``mlp.hook_in``.
        exact: run each prompt by itself, without its padding. The result is then the same bit for
            bit whatever the batch and the padding. False runs the batch at once, which is faster
            for many short prompts and equal up to the model's rounding.

    Raises:
        ValueError: the architecture, a hook or a layer is unknown, or inputs have a wrong shape.
        TypeError: an argument has a wrong type.

    Example:
        >>> tokens = tokenizer(prompts, return_tensors="pt", padding=True)
        >>> captured = capture(model, tokens, layers=[5, 12])
        >>> encoder.encode_layer(12, captured.hidden[12])["indices"]  # [N, top_k]
    """
    ids, mask = _tokens(inputs)
    base, blocks = _decoder(model)
    wanted = sorted({operator.index(layer) for layer in layers})
    if not wanted:
        raise ValueError("layers must name at least one layer, got none")
    for layer in wanted:
        if not 0 <= layer < len(blocks):
            raise ValueError(
                f"layer {layer}: {type(model).__name__} has layers 0 to {len(blocks) - 1}"
            )
    places = {layer: _place(model, blocks[layer], layer, hook_of(hook, layer)) for layer in wanted}

    device = base.get_input_embeddings().weight.device
    batch_idx, ctx_idx = _positions(mask, device)
    ids, mask = ids.to(device), mask.to(device)
    hidden: dict[int, torch.Tensor] = {}
    if exact:
        done = 0
        for row, real in zip(ids, mask, strict=True):
            count = int(real.sum())
            if count == 0:
                continue
            for layer, states in _run(base, places, input_ids=row[real][None]).items():
                if layer not in hidden:
                    hidden[layer] = states.new_empty(len(ctx_idx), states.shape[-1])
                hidden[layer][done : done + count] = states[0]
            done += count
    else:
        position = (mask.cumsum(dim=1) - 1).clamp(min=0)
        states_of = _run(
            base, places, input_ids=ids, attention_mask=mask.long(), position_ids=position
        )
        hidden = {layer: states[mask.to(states.device)] for layer, states in states_of.items()}
    return Captured({layer: hidden[layer] for layer in wanted}, batch_idx, ctx_idx)


def _tokens(inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, T] and mask [B, T] bool."""
    mask = None
    ids = inputs
    if isinstance(inputs, Mapping):
        if "input_ids" not in inputs:
            names = ", ".join(map(str, inputs)) or "nothing"
            raise ValueError(f"inputs must hold input_ids, got {names}")
        unknown = [str(key) for key in inputs if key not in ("input_ids", "attention_mask")]
        if unknown:
            more = ", ".join(unknown)
            raise ValueError(
                f"inputs must hold input_ids and attention_mask alone, got also {more}"
            )
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
    width = ids.shape[-1]
    return ids.reshape(-1, width), mask.reshape(-1, width).bool()


def _positions(mask: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """batch_idx [N] and ctx_idx [N] of the real positions of mask [B, T]."""
    batch_idx = mask.nonzero()[:, 0]
    ctx_idx = (mask.cumsum(dim=1) - 1)[mask]
    return batch_idx.to(device), ctx_idx.to(device)


def _decoder(model: Any) -> tuple[Any, nn.ModuleList]:
    """The module to call, which has no language-model head, and its decoder layers."""
    base = getattr(model, "base_model", model)
    base = getattr(base, "language_model", base)
    for name in ("layers", "h"):
        blocks = getattr(base, name, None)
        if (
            isinstance(blocks, nn.ModuleList)
            and len(blocks)
            and hasattr(base, "get_input_embeddings")
        ):
            return base, blocks
    raise ValueError(
        "model must be a Hugging Face causal model with decoder layers in model.layers, "
        f"transformer.h or gpt_neox.layers, got {type(model).__name__}"
    )


def hook_of(hook: str | Mapping[int, str] | None, layer: int) -> str:
    """The hook of a layer, without the prefix ``blocks.{layer}.``."""
    name = hook
    if isinstance(hook, Mapping):
        name = hook.get(layer)
        if name is None:
            raise ValueError(
                f"layer {layer}: hook must name a place for each layer, got {sorted(hook)}"
            )
    if name is None:
        return "mlp.hook_in"
    if not isinstance(name, str):
        raise TypeError(f"layer {layer}: hook must be a string, got {type(name).__name__}")
    prefixed = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    if prefixed and int(prefixed[1]) == layer:
        name = prefixed[2]
    if name not in HOOKS:
        known = ", ".join(HOOKS)
        raise ValueError(f"layer {layer}: hook must be one of {known}, got {name!r}")
    return name


_Place = tuple[nn.Module, bool, Callable[[torch.Tensor], torch.Tensor] | None]
"""A module, whether its input (True) or its output is read, and what is done to that."""


def _place(model: Any, block: nn.Module, layer: int, hook: str) -> _Place:
    if hook == "hook_resid_pre":
        return block, True, None
    if hook == "hook_resid_post":
        return block, False, None
    mlp = getattr(block, "mlp", None)
    if not isinstance(mlp, nn.Module):
        name = type(block).__name__
        raise ValueError(f"layer {layer}: {hook} needs a layer with an mlp, got {name}")
    if hook == "mlp.hook_in":
        return mlp, True, None
    if hook == "mlp.hook_out":
        return mlp, False, None
    if hook == "hook_mlp_out":
        for name in ("post_feedforward_layernorm", "post_mlp_layernorm"):
            if isinstance(getattr(block, name, None), nn.Module):
                return getattr(block, name), False, None
        return mlp, False, None
    norm = _norm_before_mlp(block)
    if norm is None:
        name = type(block).__name__
        raise ValueError(
            f"layer {layer}: {hook} needs a norm between attention and MLP, got {name}"
        )
    if hook == "hook_resid_mid":
        return norm, True, None
    if isinstance(norm, nn.LayerNorm):
        return norm, False, None
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if "RMSNorm" not in type(norm).__name__ or eps is None:
        name = type(norm).__name__
        raise ValueError(f"layer {layer}: {hook} needs a LayerNorm or RMSNorm with eps, got {name}")
    return norm, True, lambda hidden: _rms_normalized(hidden, eps)


def _norm_before_mlp(block: nn.Module) -> nn.Module | None:
    """The norm whose input is the residual stream between attention and MLP, if there is one."""
    if getattr(block, "use_parallel_residual", False):
        return None  # The MLP reads beside the attention, not after it.
    names = ["pre_feedforward_layernorm", "ln_2"]
    if not hasattr(block, "post_feedforward_layernorm"):
        names.append("post_attention_layernorm")  # Else this one norms the attention's output.
    norms = (getattr(block, name, None) for name in names)
    return next((norm for norm in norms if isinstance(norm, nn.Module)), None)


def _rms_normalized(hidden: torch.Tensor, eps: float) -> torch.Tensor:
    x = hidden.float()
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)


@torch.no_grad()
def _run(
    base: Any, places: Mapping[int, _Place], **inputs: torch.Tensor
) -> dict[int, torch.Tensor]:
    """One forward pass as far as the last place: {layer: [B, T, H]}."""
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int, value: Any, change: Callable[[torch.Tensor], torch.Tensor] | None) -> None:
        states = value[0] if isinstance(value, tuple) else value
        seen[layer] = states if change is None else change(states)
        if len(seen) == len(places):
            raise _Done

    def reader(layer: int, module: nn.Module, of_input: bool, change: Any) -> Any:
        if of_input:
            return module.register_forward_pre_hook(
                lambda _, args, kwargs: keep(layer, args or kwargs["hidden_states"], change),
                with_kwargs=True,
            )
        return module.register_forward_hook(lambda _, args, output: keep(layer, output, change))

    handles = []
    try:
        for layer, (module, of_input, change) in places.items():
            handles.append(reader(layer, module, of_input, change))
        base(**inputs, use_cache=False)
    except _Done:
        return seen
    finally:
        for handle in handles:
            handle.remove()
    missing = next(layer for layer in places if layer not in seen)
    name = type(places[missing][0]).__name__
    raise ValueError(f"layer {missing}: the model's forward pass did not reach its {name}")
