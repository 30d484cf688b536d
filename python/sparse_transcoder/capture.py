"""Read hidden states from Hugging Face causal models, where a transcoder expects them."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .places import Decoder, decoder, padded_inputs, read
from .probe import HOOKS, Place, input_device
from .prompts import Prompts, prompts_of

__all__ = ["HOOKS", "Captured", "capture"]


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


def capture(
    model: nn.Module,
    inputs: torch.Tensor | Mapping[str, torch.Tensor],
    layers: Iterable[int],
    hook: str | Mapping[int, str] | None = None,
    *,
    exact: bool = True,
) -> Captured:
    """Hidden states of ``layers`` at the real positions of a batch of prompts.

    The forward pass stops after the deepest place asked for; no logits are computed, nothing is
    recorded for gradients, the model keeps its mode, and its hooks are gone afterwards. One
    capture on a model at a time. The first call on a model runs a pass of six tokens before, which
    proves what each place of that model holds.

    Hooks, with an optional prefix ``blocks.{layer}.``; they mean the same in every model, and a
    place that a model does not have, or that cannot be had exactly, is refused with the reason
    (docs/places.md):

    - ``mlp.hook_in``, ``mlp.hook_out``: what the MLP module is given and gives, without a residual
      that it adds.
    - ``hook_mlp_out``: what the MLP adds to the residual stream, after a norm or a multiplier that
      the model has there.
    - ``ln2.hook_normalized``: what the RMSNorm before the MLP gives, before its weight is applied.
    - ``hook_resid_pre``, ``hook_resid_mid``, ``hook_resid_post``: the residual stream before the
      layer, between attention and MLP, and after the layer. ``hook_resid_mid + hook_mlp_out ==
      hook_resid_post`` to rounding.
    - ``model.layers.3.self_attn:output``: any module of the model, ``:input`` or ``:output``; of a
      norm also ``:normalized``, before its weight and bias. ``{l}`` in it stands for the layer.

    Args:
        model: what ``AutoModelForCausalLM`` makes, also inside peft, accelerate's offload or
            torch.compile.
        inputs: token ids [B, T] or [T], or a tokenizer's result with ``input_ids`` and
            ``attention_mask`` (1 real, 0 padding); what else it holds is passed on where the model
            takes it.
        layers: the layers to keep.
        hook: the place for all layers, or {layer: place}; None is ``mlp.hook_in``.
        exact: run each prompt by itself, without its padding: the result is the same bit for bit
            whatever the batch and the padding. False runs the batch at once: faster for many short
            prompts, equal up to the model's rounding; refused where padding changes the model's
            rows.

    Raises:
        ValueError: a model without such layers, a hook or layer that it does not have, or inputs
            of a wrong shape. TypeError: a wrong
        type.

    Example:
        >>> captured = capture(model, tokenizer(prompts, return_tensors="pt", padding=True),
        layers=[5, 12])
        >>> encoder.encode_layer(12, captured.hidden[12])["indices"]  # [N, top_k]
    """
    prompts = prompts_of(inputs)
    known = decoder(model)
    wanted = sorted({operator.index(layer) for layer in layers})
    if not wanted:
        raise ValueError("layers must name at least one layer, got none")
    return capture_places(
        model, prompts, {layer: _place(known, hook, layer) for layer in wanted}, exact=exact
    )


def capture_places(
    model: nn.Module, prompts: Prompts, places: Mapping[int, Place], *, exact: bool
) -> Captured:
    """:func:`capture` of places that are already resolved."""
    device = input_device(model) or prompts.ids.device
    ids, mask = prompts.ids.to(device), prompts.mask.to(device)
    batch_idx, ctx_idx = mask.nonzero()[:, 0], (mask.cumsum(dim=1) - 1)[mask]
    rest = {
        n: v.to(device) if isinstance(v, torch.Tensor) else v
        for n, v in prompts.for_model(model).items()
    }
    hidden: dict[int, torch.Tensor] = {}
    if exact:
        done = 0
        for row in range(len(ids)):
            real = mask[row]
            count = int(real.sum())
            if count == 0:
                continue
            own = {name: _of_prompt(name, value, row, mask) for name, value in rest.items()}
            for layer, states in read(
                model, places, own | {"input_ids": ids[row][real][None]}
            ).items():
                if layer not in hidden:
                    hidden[layer] = states.new_empty(len(ctx_idx), states.shape[-1])
                hidden[layer][done : done + count] = states[0]
            done += count
    else:
        whole = padded_inputs(model, places, ids, mask) | rest | {"input_ids": ids}
        hidden = {
            layer: states[mask.to(states.device)]
            for layer, states in read(model, places, whole).items()
        }
    return Captured({layer: hidden[layer] for layer in places}, batch_idx, ctx_idx)


def _of_prompt(name: str, value: Any, row: int, mask: torch.Tensor) -> Any:
    """One prompt's part of an input: its real positions where the input is [B, T, ..], its row
    where it is [B, ..]."""
    if not isinstance(value, torch.Tensor):
        return value
    batch = len(mask)
    if value.shape[:2] == mask.shape:
        return value[row][mask[row]][None]
    if batch == 1:
        return value
    if value.ndim and value.shape[0] == batch:
        return value[row : row + 1]
    raise ValueError(
        f"{name} {list(value.shape)} must have a row for each of the {batch} prompts, or exact "
        "must be False"
    )


def _place(known: Decoder, hook: str | Mapping[int, str] | None, layer: int) -> Place:
    if isinstance(hook, Mapping):
        if layer not in hook:
            raise ValueError(
                f"layer {layer}: hook must name a place for each layer, got {sorted(hook)}"
            )
        hook = hook[layer]
    return known.place("mlp.hook_in" if hook is None else hook, layer)
