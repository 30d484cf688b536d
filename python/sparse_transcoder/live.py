"""Read and change features while a model runs: what ``SparseTranscoderEncoder.attach`` and
``intervene`` do."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import inspect
import math
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from . import _arguments as check
from .places import Decoder, shaped, watching, writing
from .probe import Place, uncompiled, unwrapped
from .prompts import Exclude, excluded

if TYPE_CHECKING:
    from .encoder import PositionFeatures, SparseTranscoderEncoder


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """The features of one forward pass: of all positions of a prompt, then of one position per
    generated token."""

    features: dict[int, PositionFeatures]
    """{layer: result} of the N real positions of the pass, batch row after batch row; ``ctx_idx``
    counts from the prompt's start."""
    token_ids: torch.Tensor | None
    """[N] int64, the tokens that the model read there; None where it was given embeddings."""


CACHES = ("past_key_values", "cache_params", "state", "past_buckets_states", "mems")
"""What models call the argument that holds what they keep of earlier passes."""


class Monitor:
    """Encodes what a model's layers hold in every forward pass, while its ``with`` block is open.

    What is kept are the features alone, no hidden states: 12 bytes per feature, ``top_k`` of them
    per position and layer.
    """

    def __init__(
        self,
        encoder: SparseTranscoderEncoder,
        model: nn.Module,
        places: Mapping[int, Place],
        *,
        exclude: Exclude | None,
        on_step: Callable[[Step], None] | None,
        keep: int | None,
    ) -> None:
        self.steps: collections.deque[Step] = collections.deque(maxlen=keep)
        """The kept steps, in the order in which they came."""
        self._encoder = encoder
        self._model: nn.Module = unwrapped(model)
        self._places = dict(places)
        self._exclude = exclude
        self._on_step = on_step
        self._parameters = list(inspect.signature(type(self._model).forward).parameters)[1:]
        self._open = contextlib.ExitStack()
        self._hidden: dict[int, torch.Tensor] = {}
        self._batch = self._width = 0
        self._mask = torch.empty(0)
        self._ctx_idx = torch.empty(0)
        self._next = torch.empty(0, dtype=torch.int64)
        self._ids: torch.Tensor | None = None

    def __enter__(self) -> Monitor:
        try:
            self._open.enter_context(uncompiled())
            before = self._model.register_forward_pre_hook(self._begin, with_kwargs=True)
            self._open.callback(before.remove)
            self._open.enter_context(watching(self._places, self._see))
            after = self._model.register_forward_hook(self._end)
            self._open.callback(after.remove)
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        self._hidden = {}
        self._open.close()

    def features(self) -> dict[int, PositionFeatures]:
        """{layer: result} of all kept steps, one after the other: [N, K] and [N].

        Raises:
            ValueError: no step was kept.
        """
        if not self.steps:
            raise ValueError("features needs at least one kept step, got none")
        whole: dict[int, PositionFeatures] = {}
        for layer in self._places:
            parts = [step.features[layer] for step in self.steps]
            whole[layer] = {
                "layer": layer,
                "activations": torch.cat([part["activations"] for part in parts]),
                "indices": torch.cat([part["indices"] for part in parts]),
                "sparsity": torch.cat([part["sparsity"] for part in parts]),
                "batch_idx": torch.cat([part["batch_idx"] for part in parts]),
                "ctx_idx": torch.cat([part["ctx_idx"] for part in parts]),
            }
        return whole

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Which tokens this pass reads: the last T columns of the attention mask say which of them
        are real, and where they are."""
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        ids: torch.Tensor | None = given.get("input_ids")
        read: torch.Tensor | None = given.get("inputs_embeds") if ids is None else ids
        if read is None:
            raise ValueError(
                "the model must be given input_ids or inputs_embeds while a monitor is attached"
            )
        self._batch, self._width, device = read.shape[0], read.shape[1], read.device
        mask: Any = given.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            mask = mask.to(device).bool()
            position = (mask.cumsum(dim=1) - 1)[:, -self._width :]
            self._mask = mask[:, -self._width :]
        else:
            cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
            position = self._without_mask(mask, cache)
            position = (position[:, None] + torch.arange(self._width)).to(device)
            self._mask = torch.ones_like(position, dtype=torch.bool)
        self._next = position[:, -1].cpu() + 1
        self._ids = ids
        self._hidden = {}
        if self._exclude is not None:
            shape = (self._batch, self._width)
            self._mask = self._mask & ~excluded(self._exclude, shape, ids, self._model).to(device)
        self._ctx_idx = position

    def _without_mask(self, mask: Any, cache: Any) -> torch.Tensor:
        """[B], where the rows of a pass begin that has no mask [B, T]: after the one before it."""
        length: int | None
        try:
            length = 0 if cache is None else int(cache.get_seq_length())
        except (AttributeError, ValueError):  # the state of a recurrence has no length
            states = [
                getattr(layer, "has_previous_state", None) for layer in getattr(cache, "layers", ())
            ]
            known = [
                filled for state in states if isinstance(state, dict) for filled in state.values()
            ]
            length = 0 if known and not any(known) else None
        if length != 0 and self._next.shape[0] == self._batch:
            return self._next
        if length is None:
            raise ValueError(
                "a monitor must be attached before the pass that fills a model's state"
            )
        if mask is None or self._batch == 1:
            return torch.full((self._batch,), length)
        kind = (
            f"a tensor {list(mask.shape)}" if isinstance(mask, torch.Tensor) else "something else"
        )
        raise ValueError(
            f"attention_mask must be [batch, tokens] while a batch is monitored, got {kind}"
        )

    def _see(self, layer: int, tensor: torch.Tensor) -> None:
        if layer in self._hidden:
            raise ValueError(
                f"layer {layer}: {self._places[layer].path} must run once in a forward pass, it "
                "ran again"
            )
        self._hidden[layer] = shaped(self._places[layer], tensor, self._batch, self._width)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        for layer, place in self._places.items():
            if layer not in self._hidden:
                raise ValueError(
                    f"layer {layer}: the forward pass did not reach {place.path}:{place.side}"
                )
        hidden, self._hidden = self._hidden, {}
        mask = self._mask
        whole = bool(mask.all())
        rows = {
            layer: states.flatten(0, 1) if whole else states[mask.to(states.device)]
            for layer, states in hidden.items()
        }
        if not whole and not bool(mask.any()):
            return
        batch_idx, ctx_idx = mask.nonzero()[:, 0], self._ctx_idx[mask]
        features: dict[int, PositionFeatures] = {}
        for layer, result in self._encoder.encode_all_layers(rows).items():
            device = result["indices"].device
            features[layer] = {
                **result,
                "batch_idx": batch_idx.to(device),
                "ctx_idx": ctx_idx.to(device),
            }
        step = Step(features, None if self._ids is None else self._ids[mask])
        if self._on_step is None:
            self.steps.append(step)
        else:
            self._on_step(step)


def attach(
    encoder: SparseTranscoderEncoder,
    model: nn.Module,
    places: Mapping[int, Place],
    exclude: Exclude | None,
    on_step: Callable[[Step], None] | None,
    keep: int | None,
) -> Monitor:
    """See :meth:`SparseTranscoderEncoder.attach`."""
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step must be callable, got {type(on_step).__name__}")
    if isinstance(exclude, torch.Tensor):
        raise TypeError('exclude must be "special" or token ids while a model runs, got a mask')
    if exclude is not None:  # its errors now, not in the middle of a pass
        excluded(exclude, (1, 1), torch.zeros(1, 1, dtype=torch.int64), unwrapped(model))
    limit = None if keep is None else check.positive("keep", keep)
    return Monitor(encoder, model, places, exclude=exclude, on_step=on_step, keep=limit)


Mode = Literal["add", "set", "ablate"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Change:
    """What is done to the features of one layer's transcoder."""

    layer: int
    values: torch.Tensor
    """[n] float32; what is added or what the activations become."""
    directions: dict[int, torch.Tensor]
    """{layer that is written to: [n, d_out] float32}."""
    activations: Callable[[torch.Tensor], torch.Tensor] | None
    """[N, H] to the features' activations [N, n]; None where they do not matter."""


def activations_of(
    encoder: SparseTranscoderEncoder, layer: int, features: list[int]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function of hidden rows [N, H] to the activations [N, n] of these features, 0 where a
    feature is not active.

    They are the transcoder's own: ``activation_threshold`` of the encoder, which says what is
    reported, plays no part.
    """
    from .encoder import SparseTranscoderEncoder as Encoder

    weights = encoder._transcoder(layer)
    rows = torch.tensor(features, dtype=torch.int64)
    if (
        weights.k is not None
    ):  # a feature is active where it is among the k largest: all of them count
        whole = Encoder({layer: weights}, None, 0.0, screening=encoder.screening)

        def of_all(hidden: torch.Tensor) -> torch.Tensor:
            found = whole.encode_layer(layer, hidden.to(weights.W_enc.device))
            hit = found["indices"].unsqueeze(-1) == rows.to(found["indices"].device)  # [N, k, n]
            return (found["activations"].unsqueeze(-1) * hit).sum(1)

        return of_all
    at = rows.to(weights.W_enc.device)
    part = dataclasses.replace(
        weights,
        W_enc=weights.W_enc.detach().index_select(0, at),
        b_enc=weights.b_enc.detach().index_select(0, at),
        threshold=None
        if weights.threshold is None
        else weights.threshold.detach().index_select(0, at),
        W_dec=None,
        b_dec=None,
        W_skip=None,
    )
    few = Encoder({layer: part}, len(features), 0.0, screening="off")

    def of_few(hidden: torch.Tensor) -> torch.Tensor:
        found = few.encode_layer(layer, hidden.to(part.W_enc.device))
        return torch.zeros_like(found["activations"]).scatter(
            -1, found["indices"], found["activations"]
        )

    return of_few


@contextlib.contextmanager
def intervene(
    model: nn.Module,
    changes: list[_Change],
    reads: Mapping[int, Place],
    writes: Mapping[int, Place],
) -> Iterator[None]:
    """Add to each place of ``writes`` what the changes ask for, while the block is open."""
    active: dict[int, torch.Tensor] = {}
    computes = {
        change.layer: change.activations for change in changes if change.activations is not None
    }

    def see(layer: int, tensor: torch.Tensor) -> None:
        compute = computes[layer]
        active[layer] = compute(tensor.reshape(-1, tensor.shape[-1]))

    def begin(module: nn.Module, args: Any) -> None:
        active.clear()

    def delta(target: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def of(tensor: torch.Tensor) -> torch.Tensor:
            with torch.autocast(tensor.device.type, enabled=False):
                return exact(tensor)

        def exact(tensor: torch.Tensor) -> torch.Tensor:
            total = torch.zeros((), device=tensor.device)
            for change in changes:
                if target not in change.directions:
                    continue
                directions = change.directions[target].to(tensor.device)
                if directions.shape[-1] != tensor.shape[-1]:
                    raise ValueError(
                        f"layer {target}: the decoder writes {directions.shape[-1]} numbers, "
                        f"{writes[target].path} holds "
                        f"{tensor.shape[-1]}"
                    )
                wanted = change.values.to(tensor.device)
                if change.activations is None:
                    total = total + wanted @ directions
                    continue
                if change.layer not in active:
                    raise ValueError(
                        f"layer {target}: the activations of layer {change.layer} must be read "
                        "before it is written"
                    )
                now = active[change.layer].to(tensor.device)
                total = total + ((wanted - now) @ directions).reshape(tensor.shape)
            return total.expand(tensor.shape)

        return of

    with contextlib.ExitStack() as stack:
        stack.enter_context(uncompiled())
        stack.callback(unwrapped(model).register_forward_pre_hook(begin).remove)
        # Reads come first: a place that is read and written is read as it was.
        stack.enter_context(watching({layer: reads[layer] for layer in computes}, see))
        for target, place in writes.items():
            stack.callback(writing(place, delta(target)).remove)
        yield


def changes_of(
    encoder: SparseTranscoderEncoder,
    changes: Mapping[int, Mapping[int, float] | Iterable[int]],
    mode: str,
) -> list[_Change]:
    """What :meth:`SparseTranscoderEncoder.intervene` was asked for, checked.

    Raises:
        KeyError: no transcoder for a layer. TypeError, ValueError: as there.
    """
    if mode not in ("add", "set", "ablate"):
        raise ValueError(f"mode must be add, set or ablate, got {mode!r}")
    if not isinstance(changes, Mapping):
        raise TypeError(f"changes must map layers to features, got {type(changes).__name__}")
    if not changes:
        raise ValueError("changes must name at least one layer, got none")
    found = []
    for layer, wanted in (
        (check.integer("layer", layer), wanted) for layer, wanted in changes.items()
    ):
        encoder._transcoder(layer)
        if not isinstance(wanted, Mapping):
            if (
                mode != "ablate"
                or isinstance(wanted, (str, bytes))
                or not isinstance(wanted, Iterable)
            ):
                raise TypeError(
                    f"layer {layer}: changes must map features to numbers, got "
                    f"{type(wanted).__name__}"
                )
            wanted = dict.fromkeys(wanted, 0.0)
        features = [check.integer("feature", feature) for feature in wanted]
        if not features:
            raise ValueError(f"layer {layer}: changes must name at least one feature, got none")
        values = [
            0.0 if mode == "ablate" else check.number("value", value) for value in wanted.values()
        ]
        for feature, value in zip(features, values, strict=True):
            if not math.isfinite(value):
                raise ValueError(
                    f"layer {layer}: the value of feature {feature} must be finite, got {value}"
                )
        vectors = [encoder.feature_vector(layer, feature) for feature in features]
        parts = [vector if isinstance(vector, dict) else {layer: vector} for vector in vectors]
        directions = {target: torch.stack([part[target] for part in parts]) for target in parts[0]}
        compute = None if mode == "add" else activations_of(encoder, layer, features)
        found.append(_Change(layer, torch.tensor(values, dtype=torch.float32), directions, compute))
    return found


def resolved(
    known: Decoder,
    layer: int,
    recorded: str,
    hook: str | Mapping[int, str] | None,
    what: str = "hook",
) -> tuple[Place, str | None]:
    """A layer's place, and a sentence where the caller's name and the recorded one mean different
    places.

    Raises:
        ValueError: nobody names a place, or the model does not have it. TypeError: a name is no
            string.
    """
    if isinstance(hook, Mapping):
        hook = hook.get(layer)
    if hook is None:
        if not recorded:
            raise ValueError(f"layer {layer}: {what} must be given, the weights record none")
        return known.recorded(recorded, layer), None
    place = known.place(hook, layer)
    if not recorded:
        return place, None
    try:
        if known.same(place, known.recorded(recorded, layer)):
            return place, None
    except ValueError:
        pass  # the model has no such place
    return place, f"{hook} in layer {layer}, where the weights record {recorded}"
