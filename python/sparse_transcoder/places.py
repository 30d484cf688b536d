"""Names of places in a decoder, resolved to a module's argument or result in one model, or refused
by name.

``probe.py`` proves what each place holds. Here stand the names: those of TransformerLens, any
module of the model, and what checkpoints record in the words of the project that trained them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from .probe import (
    HOOKS,
    PROBE_TOKENS,
    Layer,
    Place,
    Probe,
    Side,
    call,
    input_device,
    probe,
    uncompiled,
    unwrapped,
)


class Decoder:
    """The decoder layers of one model and their places, proven by one short forward pass."""

    def __init__(self, model: nn.Module, found: Probe) -> None:
        self._model = model
        self._name = type(unwrapped(model)).__name__
        self._probe = found

    @property
    def layers(self) -> list[Layer]:
        return self._probe.layers

    def check(self, layer: int) -> None:
        """ValueError where the model has no such layer."""
        if not 0 <= layer < len(self.layers):
            raise ValueError(f"layer {layer}: {self._name} has layers 0 to {len(self.layers) - 1}")

    def place(self, hook: str, layer: int) -> Place:
        """The place that a caller names: one of HOOKS, ``blocks.{l}.`` before it or not, or
        ``module:input|output|normalized``.

        Raises:
            ValueError: no such place in this model, and why. TypeError: ``hook`` is no string.
        """
        self.check(layer)
        name = short(hook, layer)
        if name in HOOKS:
            found = self.layers[layer].places[name]
            if isinstance(found, str):
                raise ValueError(f"layer {layer}: {self._name} has no {name}: {found}")
            return found
        named = re.fullmatch(r"(.+):(input|output|normalized)", name)
        if named is None:
            raise ValueError(
                f"layer {layer}: hook must be one of {', '.join(HOOKS)}, or a module of the model "
                "and :input or :output "
                f"after it, got {hook!r}"
            )
        return self._of_module(named[1], named[2], layer)

    def recorded(self, hook: str, layer: int) -> Place:
        """The place that a checkpoint records, also in the words of Gemma Scope 2,
        dictionary_learning, sparsify and nnsight.

        Raises:
            ValueError: no such place in this model, and why.
        """
        try:
            return self.place(
                translated(
                    hook, layer, self.layers[layer].path if layer < len(self.layers) else ""
                ),
                layer,
            )
        except ValueError as error:
            raise ValueError(
                f"{error} (the weights record {hook!r}; hook= reads at another place)"
            ) from None

    def check_writable(self, place: Place, layer: int) -> None:
        """ValueError where what a place holds cannot be changed, only read."""
        if place.norm is not None:
            raise ValueError(
                f"layer {layer}: {place.path} before its weight can be read, not written"
            )
        middle = self.layers[layer].places.get("hook_resid_mid")
        if isinstance(middle, Place) and place.writes is None and place == middle:
            raise ValueError(
                f"layer {layer}: hook_resid_mid can be read, not written: nothing that leads to it "
                "alone is known"
            )

    def same(self, one: Place, other: Place) -> bool:
        """Whether two places hold the same on a few tokens."""
        if dataclasses.replace(one, writes=None, addend=False) == dataclasses.replace(
            other, writes=None, addend=False
        ):
            return True
        ids = torch.tensor([[3, 1, 2, 1]], device=input_device(self._model))
        held = read(self._model, {0: one, 1: other}, {"input_ids": ids})
        return torch.equal(held[0], held[1].to(held[0].device))

    def _of_module(self, path: str, side: str, layer: int) -> Place:
        full, module = self._module(path, layer)
        for index, other in enumerate(self.layers):
            if index != layer and (full + ".").startswith(other.path + "."):
                raise ValueError(
                    f"layer {layer}: hook must be a place of that layer, {path} is in layer {index}"
                )
        runs = self._probe.runs.get(full, 0)
        if runs != 1:
            raise ValueError(
                f"layer {layer}: {full} must run once in a forward pass of {self._name}, it runs "
                f"{runs} times"
            )
        interface = self._probe.interfaces[full]
        end: Side = "output" if side == "output" else "input"
        held = interface.gave if end == "output" else interface.given
        kind = type(module).__name__
        if held is None:
            raise ValueError(f"layer {layer}: {full}:{end} must be a tensor, {kind} has none there")
        key, shape = held
        if len(shape) != 3 or shape[:2] != (1, PROBE_TOKENS):
            raise ValueError(
                f"layer {layer}: {full}:{end} must be [batch, tokens, H], it is {list(shape)} for "
                f"{PROBE_TOKENS} tokens"
            )
        if side != "normalized":
            return Place(full, module, end, key)
        norm = self._probe.norms.get(full)
        if norm is None:
            raise ValueError(
                f"layer {layer}: {full}:normalized must be of an RMSNorm or LayerNorm, {kind} "
                "gives something else"
            )
        return Place(full, module, end, key, norm=norm)

    def _module(self, path: str, layer: int) -> tuple[str, nn.Module]:
        """A module by its name, also where a wrapper has put something before it or the model is a
        part of the named one."""
        modules = dict(self._model.named_modules())
        wanted = path
        while True:
            if wanted in modules:
                return wanted, modules[wanted]
            ends = [name for name in modules if name.endswith("." + wanted)]
            if len(ends) == 1:
                return ends[0], modules[ends[0]]
            if len(ends) > 1:
                raise ValueError(
                    f"layer {layer}: {path} must name one module of {self._name}, it may be "
                    f"{', '.join(ends[:4])}"
                )
            _, dot, wanted = wanted.partition(".")
            if not dot or not re.search(
                r"(^|\.)\d+(\.|$)", wanted
            ):  # only what stands before the layer's number may be absent
                raise ValueError(f"layer {layer}: {self._name} has no module {path}")


_known: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[Hashable, ...], Probe]] = (
    weakref.WeakKeyDictionary()
)


def decoder(model: Any) -> Decoder:
    """The decoder of a model. The first call on a model, and the first after its modules or
    multipliers changed, runs a short forward pass.

    Raises:
        TypeError: ``model`` is no torch module. ValueError: as
            :func:`sparse_transcoder.probe.probe`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    now: tuple[Hashable, ...] = (
        *((name, id(module), type(module)) for name, module in model.named_modules()),
        *(_changes(t) for t in (*model.parameters(), *model.buffers()) if t.numel() == 1),
    )
    known = _known.get(model)
    if known is None or known[0] != now:
        known = now, probe(model)
        _known[model] = known
    if (name := _dropping(model)) is not None:
        warnings.warn(
            f"the model is in training mode: dropout in {name} makes its hidden states random; "
            "call model.eval()",
            stacklevel=4,
        )
    return Decoder(model, known[1])


def _dropping(model: nn.Module) -> str | None:
    """The first module that drops something while it runs, by a module's p or an attribute such as
    attention_dropout."""
    for name, module in model.named_modules():
        if not module.training:
            continue
        for attribute, value in vars(module).items():
            drops = attribute == "p" if isinstance(module, _DropoutNd) else "drop" in attribute
            if drops and isinstance(value, float) and value > 0:
                return name or type(module).__name__
    return None


def _changes(scale: torch.Tensor) -> int:
    """How often a multiplier of the model was written to, so far as torch counts it."""
    return 0 if scale.is_inference() else scale._version


def short(hook: Any, layer: int) -> str:
    """A hook's name without the prefix ``blocks.{layer}.``, and with the layer in place of a
    literal ``{l}``."""
    if not isinstance(hook, str):
        raise TypeError(f"layer {layer}: hook must be a string, got {type(hook).__name__}")
    prefixed = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook.replace("{l}", str(layer)))
    if prefixed and prefixed[2] in HOOKS:
        if int(prefixed[1]) != layer:
            raise ValueError(f"layer {layer}: hook must be a place of that layer, got {hook!r}")
        return prefixed[2]
    return hook.replace("{l}", str(layer))


def translated(hook: str, layer: int, path: str) -> str:
    """A name that a checkpoint records, as :meth:`Decoder.place` takes it; ``path`` is the layer's
    own name in the model."""
    name = short(hook, layer)
    if name in HOOKS or ":" in name:
        return name
    worded = re.fullmatch(
        r"(resid_pre|resid_mid|resid_post|mlp_out)_layer_(\d+)", name
    )  # dictionary_learning
    located = re.fullmatch(
        r"(?:.*\.)?(?:layers|layer|h|blocks)(?:\.(\d+)|\[(\d+)\])(?:\.(.+?))??(?:\.(input|output))?",
        name,
    )
    number = worded[2] if worded else (located[1] or located[2]) if located else None
    if number is None:
        return name
    if int(number) != layer:
        raise ValueError(f"layer {layer}: hook must be a place of that layer, got {hook!r}")
    if worded:
        return "mlp.hook_out" if worded[1] == "mlp_out" else f"hook_{worded[1]}"
    assert located is not None
    if re.match(r"blocks\.\d+\..*hook_", name):  # a name of TransformerLens that is none of HOOKS
        return name
    part, side = located[3], located[4] or "output"
    if part is None:
        return "hook_resid_post" if side == "output" else "hook_resid_pre"
    return f"{path}.{part}:{side}"


class _Done(Exception):
    """Raised by the last hook: the rest of the forward pass is not needed."""


@contextlib.contextmanager
def watching(
    places: Mapping[Any, Place], see: Callable[[Any, torch.Tensor], None]
) -> Iterator[None]:
    """While the block is open, ``see(key, tensor)`` gets a copy of what each place holds in each
    forward pass."""
    handles = []
    try:
        for key, place in places.items():
            handles.append(_hook(place, functools.partial(_shown, see, key, place)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shown(
    see: Callable[[Any, torch.Tensor], None], key: Any, place: Place, tensor: torch.Tensor
) -> None:
    see(key, place.value(tensor))


def _hook(place: Place, use: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    """Call ``use`` with the tensor of a place in each forward pass; what it returns takes the
    tensor's place, None changes nothing."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = use(place.tensor(args, kwargs, None))
        if changed is None:
            return None
        if isinstance(place.key, int):
            return (*args[: place.key], changed, *args[place.key + 1 :]), kwargs
        return args, kwargs | {str(place.key): changed}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        changed = use(place.tensor(args, {}, output))
        if changed is None or place.key is None:
            return changed
        if isinstance(output, tuple) and isinstance(place.key, int):
            parts = [*output[: place.key], changed, *output[place.key + 1 :]]
            return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
        output[place.key] = changed  # a list or a mapping, the model's own
        return output

    if place.side == "input":
        return place.module.register_forward_pre_hook(before, with_kwargs=True)
    return place.module.register_forward_hook(after)


def writing(place: Place, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Add ``change(tensor)`` to what a place holds in each forward pass; the handle's ``remove``
    ends it."""
    at = place.writes or place

    def use(tensor: torch.Tensor) -> torch.Tensor:
        delta = change(tensor) / at.scale
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        return (wide + delta.to(tensor.device).reshape(tensor.shape)).to(tensor.dtype)

    return _hook(at, use)


@torch.no_grad()
def read(
    model: nn.Module, places: Mapping[Any, Place], inputs: Mapping[str, Any]
) -> dict[Any, torch.Tensor]:
    """One forward pass, as far as the last place: {key: [B, T, H]}."""
    batch, width = inputs["input_ids"].shape
    seen: dict[Any, torch.Tensor] = {}
    # A model that collects its own outputs on the way must end its pass, or it does not clean up.
    config = getattr(unwrapped(model), "config", None)
    stop = not any(
        getattr(config, f"output_{what}", False)
        for what in ("hidden_states", "attentions", "router_logits")
    )

    def see(key: Any, tensor: torch.Tensor) -> None:
        seen[key] = shaped(places[key], tensor, batch, width)
        if stop and len(seen) == len(places):
            raise _Done

    with uncompiled(), watching(places, see), contextlib.suppress(_Done):
        call(model, **inputs)
    for key, place in places.items():
        if key not in seen:
            raise ValueError(
                f"the forward pass of {type(unwrapped(model)).__name__} did not reach "
                f"{place.path}:{place.side}"
            )
    return seen


def shaped(place: Place, tensor: torch.Tensor, batch: int, width: int) -> torch.Tensor:
    """The tensor as [B, T, H]; ValueError where its rows are not the tokens."""
    if place.addend and tensor.ndim == 2 and tensor.shape[0] == batch * width:
        return tensor.reshape(batch, width, -1)
    if tensor.ndim != 3 or tensor.shape[:2] != (batch, width):
        raise ValueError(
            f"{place.path}:{place.side} must be [{batch}, {width}, H], it is {list(tensor.shape)}"
        )
    return tensor


def padded_inputs(
    model: nn.Module, places: Mapping[Any, Place], ids: torch.Tensor, mask: torch.Tensor
) -> dict[str, Any]:
    """What to give a model beside a padded batch, ids and mask [B, T], so that its rows are those
    of the prompts alone.

    That is tried on a few tokens, padded as the batch is, with position ids and without.

    Raises:
        ValueError: the rows differ either way: a model may not know of padding at all.
    """
    if bool(mask.all()):
        return {}
    order = mask.long()
    sides = {
        "right": bool((order.diff(dim=1) <= 0).all()),
        "left": bool((order.diff(dim=1) >= 0).all()),
    }
    side = next((name for name, true in sides.items() if true), "")
    keep = {"right": [1, 1, 1, 1, 0, 0], "left": [0, 0, 1, 1, 1, 1], "": [0, 1, 1, 0, 1, 1]}[side]
    kept = torch.tensor([[1] * len(keep), keep], device=ids.device).bool()
    tokens = torch.tensor([[3, 5, 4, 7, 6, 8]] * 2, device=ids.device, dtype=ids.dtype)
    alone = read(model, places, {"input_ids": tokens[1][kept[1]][None]})
    tokens = tokens.masked_fill(~kept, int(ids[~mask][0]))
    for named in (True, False):
        tried = _padding(kept, named)
        both = read(model, places, tried | {"input_ids": tokens})
        if all(
            _near(both[key][1][kept[1].to(rows.device)], rows[0]) for key, rows in alone.items()
        ):
            return _padding(mask, named)
    where = f"padding on the {side}" if side else "padding between tokens"
    raise ValueError(
        f"exact=False: with {where} {type(unwrapped(model)).__name__} gives other rows than for a "
        "prompt alone: exact must be True"
    )


def _padding(mask: torch.Tensor, positions: bool) -> dict[str, Any]:
    named = {"position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)} if positions else {}
    return {"attention_mask": mask.long(), **named}


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    share = 1e-3 if b.dtype in (torch.float32, torch.float64) else 0.05
    return bool((a - b).abs().max() <= share * b.abs().max())
