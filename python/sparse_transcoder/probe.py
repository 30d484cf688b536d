"""Prove, with one short forward pass, what each place of a decoder holds.

Model families name their modules differently, scale what they add to the residual stream, norm it
before or after, add it inside a module, or add attention and MLP at once. Nothing here rests on a
family's name: the pass is watched through hooks on every module, and a place counts only where the
numbers of that pass agree, element by element, to the rounding of the model's dtype:

- layers: the outermost list of modules whose elements run once each, one after the other;
- MLP: what a layer itself calls, holds matrices, and gives the same row for the same row when it
  is run again on other rows in another order, as attention and recurrences do not;
- ``hook_resid_mid``, ``hook_mlp_out``: a tensor that a module reads, and a multiple of one that
  the MLP leads to, whose sum is the layer's output;
- norms: recomputed from their input.

Where no numbers agree, the place is a sentence that says why, and is refused with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

Key: TypeAlias = int | str | None
"""Which of a module's arguments or results: a position, a keyword, or None for the result
itself."""
Side: TypeAlias = Literal["input", "output"]

HOOKS = (
    "mlp.hook_in",
    "ln2.hook_normalized",
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "mlp.hook_out",
    "hook_mlp_out",
)
"""Places of a layer that have a name in every model."""

PROBE_TOKENS = 6
"""Tokens of the pass: enough that no sum agrees by chance, and that attention tells rows apart."""


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm before its weight and bias: x / sqrt(mean(x^2) + eps), of x - mean(x) where it is
    centred."""

    eps: float
    centred: bool

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        x = hidden.float()
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)).to(hidden.dtype)


@dataclasses.dataclass(frozen=True)
class Place:
    """One tensor of a forward pass: an argument or a result of a module, times ``scale``, or
    normed."""

    path: str
    """The module's name in the model."""
    module: nn.Module
    side: Side
    key: Key
    scale: float = 1.0
    norm: Norm | None = None
    writes: Place | None = None
    """Where this place is changed, when not by what its own module is given or gives."""
    addend: bool = False
    """The place is part of a sum that is proven, so its rows are the tokens in order, also where
    they are flat [B*T, H]."""

    def tensor(self, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> torch.Tensor:
        """The tensor as the module holds it, unscaled."""
        if self.side == "input":
            value = args[self.key] if isinstance(self.key, int) else kwargs[str(self.key)]
        else:
            value = output if self.key is None else output[self.key]
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"{self.path} must hold a tensor at its {self.side}, got {type(value).__name__}"
            )
        return value

    def value(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the place holds, a copy: the model may change its own tensor later."""
        if self.norm is not None:
            return self.norm(tensor.detach())
        return tensor.detach().clone() if self.scale == 1.0 else tensor.detach() * self.scale


@dataclasses.dataclass(frozen=True)
class Interface:
    """What a module was given and gave in the probe: (which one, shape), or None where it was no
    tensor; and how often it ran."""

    given: tuple[Key, tuple[int, ...]] | None
    gave: tuple[Key, tuple[int, ...]] | None


@dataclasses.dataclass(frozen=True)
class Layer:
    """A decoder layer and its places; a str is the reason why there is no such place."""

    path: str
    module: nn.Module
    places: dict[str, Place | str]


@dataclasses.dataclass(frozen=True)
class Probe:
    """What one forward pass showed about a model."""

    layers: list[Layer]
    interfaces: dict[str, Interface]
    """Of each module that ran, by name."""
    norms: dict[str, Norm]
    """Of each norm that could be recomputed, by name."""
    runs: dict[str, int]
    """How often each module ran in one pass, by name."""


def probe(model: nn.Module) -> Probe:
    """Watch ``model`` read a few tokens.

    Raises:
        ValueError: the model does not run on token ids alone, or has no list of decoder layers
            that run one after the other.
    """
    ids = torch.tensor([3, 5, 4, 7, 6, 8])
    watcher = _Watcher(model)
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:  # not model.eval(): a module may keep a mode of its own
            module.training = False
        with torch.no_grad(), uncompiled():
            try:
                call(model, input_ids=ids[None].to(input_device(model)))
            except Exception as error:
                detail = str(error).strip().splitlines() or [""]
                raise ValueError(
                    f"model must run on input_ids alone, {type(model).__name__} gives "
                    f"{type(error).__name__}: {detail[0]}"
                ) from error
    finally:
        watcher.remove()
        for module in training:
            module.training = True
    return watcher.result()


def call(model: nn.Module, **inputs: Any) -> Any:
    """Run the model without a cache; inputs that its forward does not take are left out."""
    takes, rest = parameters_of(model)
    if "use_cache" in takes or rest:
        inputs["use_cache"] = False
    return model(
        **{
            name: value
            for name, value in inputs.items()
            if name in takes or name in ("use_cache", "input_ids")
        }
    )


def parameters_of(model: nn.Module) -> tuple[set[str], bool]:
    """Names of the arguments of the model's forward, below its wrappers, and whether it takes
    others too."""
    inner = unwrapped(model)
    found = inspect.signature(type(inner).forward).parameters.values()
    return {p.name for p in found}, any(p.kind is p.VAR_KEYWORD for p in found)


def unwrapped(model: Any) -> Any:
    """The transformers model below torch.compile and peft."""
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return getattr(model, "_orig_mod", model)


def input_device(model: nn.Module) -> torch.device | None:
    """Where token ids go: the embedding's device, also where accelerate keeps its weights
    elsewhere; None where nobody says."""
    inner = unwrapped(model)
    embedding = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    for module in (embedding, inner):
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.device.type != "meta":
        return weight.device
    return next((p.device for p in model.parameters() if p.device.type != "meta"), None)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Compiled parts of a model run as they were written meanwhile: compiled code does not call
    hooks."""
    if "torch._dynamo" not in sys.modules:  # nothing can have been compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Key, torch.Tensor] | None:
    """The first floating-point tensor among a module's arguments, ``hidden_states`` before other
    keywords."""
    named = sorted(kwargs.items(), key=lambda item: item[0] != "hidden_states")
    every: list[tuple[Key, Any]] = [*enumerate(args), *named]
    for key, value in every:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return key, value
    return None


def first_result(output: Any) -> tuple[Key, torch.Tensor] | None:
    """The tensor that a module gives, or the first of several."""
    if isinstance(output, torch.Tensor):
        return None, output
    if isinstance(output, Mapping):
        return next(((str(k), v) for k, v in output.items() if isinstance(v, torch.Tensor)), None)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], torch.Tensor):
        return 0, output[0]
    return None


@dataclasses.dataclass(eq=False)
class _Call:
    """One call of a module inside a layer. Tensors are those of the stream's size alone, [T, H]."""

    path: str
    module: nn.Module
    outer: tuple[_Call, ...]
    """The calls inside the layer that this one is part of."""
    start: int
    inputs: dict[Key, torch.Tensor]
    end: int = -1
    output_key: Key = None
    output: torch.Tensor | None = None
    by_position: bool = False

    def given(self, key: Key) -> Place:
        return Place(self.path, self.module, "input", key, addend=True)

    def gave(self, scale: float = 1.0) -> Place:
        return Place(self.path, self.module, "output", self.output_key, scale, addend=True)


@dataclasses.dataclass(eq=False)
class _Run:
    """One run of an element of an outermost list of modules."""

    path: str
    stack: str
    index: int
    module: nn.Module
    key: Key = None
    stream: torch.Tensor | None = None
    output_key: Key = None
    output: torch.Tensor | None = None
    calls: list[_Call] = dataclasses.field(default_factory=list)
    places: dict[str, Place | str] = dataclasses.field(default_factory=dict)


class _Watcher:
    """Hooks on every module of a model, for one pass."""

    def __init__(self, model: nn.Module) -> None:
        self.name = type(model).__name__
        self.config = getattr(unwrapped(model), "config", None)
        self.elements: dict[nn.Module, tuple[str, int]] = {}
        self.sizes: dict[str, int] = {}
        self.runs: list[_Run] = []
        self.interfaces: dict[str, Interface] = {}
        self.norms: dict[str, Norm] = {}
        self.counts: Counter[str] = Counter()
        self.current: _Run | None = None
        self.open: list[_Call] = []
        self.clock = 0
        self.paused = False
        lists: list[str] = []
        self.handles = []
        for path, module in model.named_modules():
            if (
                isinstance(module, nn.ModuleList)
                and len(module)
                and not any(path.startswith(f"{p}.") for p in lists)
            ):
                lists.append(path)
                self.sizes[path] = len(module)
                for index, element in enumerate(module):
                    self.elements.setdefault(element, (path, index))
            self.handles += [
                module.register_forward_pre_hook(self._before(path), with_kwargs=True),
                module.register_forward_hook(self._after(path), with_kwargs=True),
            ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _before(self, path: str) -> Callable[[nn.Module, Any, Any], None]:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.paused:
                return
            if module in self.elements and self.current is None:
                stack, index = self.elements[module]
                self.current = _Run(path, stack, index, module)
                found = first_tensor(args, kwargs)
                if found is not None:
                    self.current.key, self.current.stream = found[0], found[1].detach().clone()
            elif self.current is not None:
                self.clock += 1
                named: list[tuple[Key, Any]] = [*enumerate(args), *kwargs.items()]
                inputs = {key: self._rows(value) for key, value in named if self._in_stream(value)}
                opened = _Call(path, module, tuple(self.open), self.clock, inputs)
                self.current.calls.append(opened)
                self.open.append(opened)

        return before

    def _after(self, path: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        def after(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            if self.paused:
                return
            self.counts[path] += 1
            given, gave = first_tensor(args, kwargs), first_result(output)
            self.interfaces[path] = Interface(
                None if given is None else (given[0], tuple(given[1].shape)),
                None if gave is None else (gave[0], tuple(gave[1].shape)),
            )
            if given is not None and gave is not None and not _has_matrix(module):
                norm = _norm_of(module, given[1], gave[1])
                if norm is not None:
                    self.norms[path] = norm
            if self.open and self.open[-1].module is module:
                closed = self.open.pop()
                self.clock += 1
                closed.end = self.clock
                if gave is not None and self._in_stream(gave[1]):
                    closed.output_key, closed.output = gave[0], self._rows(gave[1])
                    leads = given is not None and given[0] in closed.inputs  # not a residual alone
                    if not closed.outer and leads and _has_matrix(module):
                        self.paused = True
                        try:
                            closed.by_position = _by_position(module, args, kwargs, gave[1])
                        finally:
                            self.paused = False
            elif self.current is not None and self.current.module is module:
                run, self.current = self.current, None
                if gave is not None:
                    run.output_key, run.output = gave[0], gave[1].detach().clone()
                run.places = _places(run)
                run.calls = []
                self.runs.append(run)

        return after

    def _in_stream(self, value: Any) -> bool:
        """The tensor has the size of the layer's own input, with or without its batch axis."""
        stream = self.current.stream if self.current is not None else None
        if stream is None or not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return False
        size = stream.shape[-1]
        return tuple(value.shape) in ((PROBE_TOKENS, size), (1, PROBE_TOKENS, size))

    def _rows(self, value: torch.Tensor) -> torch.Tensor:
        return value.detach().reshape(PROBE_TOKENS, -1).clone()

    def result(self) -> Probe:
        stack = self._stack()
        runs = [run for run in self.runs if run.stack == stack]
        layers = []
        for index in range(self.sizes[stack]):
            mine = [run for run in runs if run.index == index]
            if len(mine) != 1:
                element = next(m for m, where in self.elements.items() if where == (stack, index))
                why = f"the layer runs {len(mine)} times in one pass"
                layers.append(Layer(f"{stack}.{index}", element, dict.fromkeys(HOOKS, why)))
            else:
                layers.append(Layer(mine[0].path, mine[0].module, mine[0].places))
        for this, following in itertools.pairwise(runs):
            if (
                this.output is None
                or following.stream is None
                or not _same(this.output, following.stream)
            ):
                why = f"what layer {this.index} gives is not what layer {following.index} is given"
                this.places["hook_resid_post"] = this.places["hook_resid_mid"] = this.places[
                    "hook_mlp_out"
                ] = why
        return Probe(layers, self.interfaces, self.norms, dict(self.counts))

    def _stack(self) -> str:
        """The list of decoder layers: every element that ran took and gave tensors of one shape."""
        found = []
        for stack in self.sizes:
            runs = [run for run in self.runs if run.stack == stack]
            shapes = {
                tuple(t.shape) for run in runs for t in (run.stream, run.output) if t is not None
            }
            whole = all(run.stream is not None and run.output is not None for run in runs)
            if runs and whole and len(shapes) == 1 and PROBE_TOKENS in next(iter(shapes)):
                found.append(stack)
        declared = {
            getattr(self.config, name, None)
            for name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        }
        if len(found) > 1:
            found = [stack for stack in found if self.sizes[stack] in declared] or found
        if len(found) == 1:
            return found[0]
        has = f"{len(found)} such lists: {', '.join(found)}" if found else "none"
        raise ValueError(
            f"model must have one list of decoder layers that run one after the other, {self.name} "
            f"has {has}"
        )


def _has_matrix(module: nn.Module) -> bool:
    return any(
        t.ndim >= 2 for t in (*module.parameters(), *module.buffers())
    )  # GPTQ and AWQ hold theirs as buffers


def _by_position(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> bool:
    """The module gives the same row for the same row wherever it stands, and whatever the other
    rows are."""
    # Backwards, and with row 2 in the place of row 1: another order, and another set of rows.
    order = [*range(PROBE_TOKENS - 1, 1, -1), 2, 0]

    def mixed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim < 2:
            return value
        if value.shape[0] == 1 and value.shape[1] == PROBE_TOKENS:
            return value[:, order]
        return value[order] if value.shape[0] == PROBE_TOKENS else value

    try:
        again = first_result(
            module(*map(mixed, args), **{name: mixed(value) for name, value in kwargs.items()})
        )
    except Exception:
        return False
    if again is None or again[1].shape != output.shape or not bool(output.any()):
        return False
    a, b = again[1].double(), mixed(output).double()
    # int8 products (bitsandbytes) round a row by what the others hold: a few percent, where
    # attention differs by its own size.
    quantised = any(not p.is_floating_point() for p in module.parameters())
    error = 0.05 if quantised else 64 * torch.finfo(output.dtype).eps
    return bool(((a - b).abs() <= error * b.abs().max()).all())


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.device), b)


def _places(run: _Run) -> dict[str, Place | str]:
    """Every place of one layer, or the reason why it has none."""
    kind = type(run.module).__name__
    places: dict[str, Place | str] = {}
    stream, output = run.stream, run.output
    if stream is None or stream.ndim != 3 or tuple(stream.shape[:2]) != (1, PROBE_TOKENS):
        shape = "no tensor" if stream is None else _shape(stream)
        why: str | None = f"{kind} is given {shape}, not hidden states [1, {PROBE_TOKENS}, H]"
    elif output is None or output.shape != stream.shape:
        gives = "no tensor" if output is None else _shape(output)
        why = f"{kind} is given {_shape(stream)} and gives {gives}"
    else:
        why = None
        places["hook_resid_pre"] = Place(run.path, run.module, "input", run.key)
        places["hook_resid_post"] = Place(run.path, run.module, "output", run.output_key)
    if why is not None:
        for name in ("hook_resid_pre", "hook_resid_post", "hook_resid_mid", "hook_mlp_out"):
            places[name] = why

    mlp = _mlp(run)
    if isinstance(mlp, str):
        for name in HOOKS:
            places.setdefault(name, mlp)
        return places
    first, last = mlp
    key, given = next(iter(first.inputs.items()))
    places["mlp.hook_in"] = first.given(key)
    inner = [c for c in run.calls if last in c.outer and c.output is not None][::-1]
    places["mlp.hook_out"] = _without_residual(last, inner, first)
    places["ln2.hook_normalized"] = _normalized(run, first, given, kind)
    if why is None and stream is not None and output is not None:
        mid, added = _sum(run, first, last, inner, stream[0], output[0], kind)
        places["hook_resid_mid"], places["hook_mlp_out"] = mid, added
    return places


def _shape(tensor: torch.Tensor) -> str:
    return str(list(tensor.shape))


def _mlp(run: _Run) -> tuple[_Call, _Call] | str:
    """The call that is the MLP, twice, or the two linear maps that a layer without an MLP module
    calls; or why there is none."""
    kind = type(run.module).__name__
    own = [c for c in run.calls if not c.outer]
    found = [c for c in own if c.by_position]
    leaves = [c for c in own if _is_linear(c.module)]
    up = [c for c in leaves if c.inputs and (c.output is None or c in found)]
    down = [c for c in leaves if c.output is not None and (not c.inputs or c in found)]
    whole = [c for c in found if c not in leaves]
    if len(whole) == 1:
        return whole[0], whole[0]
    names = [c.path.removeprefix(run.path + ".") for c in (whole or own)]
    listed = ", ".join(dict.fromkeys(names))
    if len(whole) > 1:
        return f"{kind} has more than one module that works on each position by itself: {listed}"
    if len(up) == 2 and up == down:  # as wide inside as outside
        up, down = up[:1], down[1:]
    if len(up) == 1 and len(down) == 1 and up[0].start < down[0].start:
        return up[0], down[0]
    return (
        f"{kind} has no module that works on each position by itself, only "
        f"{listed or 'none that can be watched'}"
    )


def _is_linear(module: nn.Module) -> bool:
    return not any(True for _ in module.children()) and _has_matrix(module)


def _without_residual(last: _Call, inner: list[_Call], first: _Call) -> Place | str:
    """What the MLP gives; where it adds an argument of its own to that, what it gives before."""
    assert last.output is not None
    for residual in [*first.inputs.values(), *last.inputs.values()]:
        for part in inner:
            scale = _addend(last.output, residual, part.output)
            if scale is not None:
                return part.gave(scale)
        if any(
            _addend(x, residual, part.output) is not None
            for c in inner
            for x in c.inputs.values()
            for part in inner
        ):
            return f"{type(last.module).__name__} adds a residual before it is done"
    if len(last.inputs) > 1:
        return (
            f"{type(last.module).__name__} is given a second hidden state, and what it does with "
            "it is not known"
        )
    return last.gave()


def _normalized(run: _Run, mlp: _Call, given: torch.Tensor, kind: str) -> Place | str:
    before = [
        c
        for c in run.calls
        if c.start < mlp.start and c.output is not None and not _has_matrix(c.module)
    ]
    norms = [
        c for c in before if c.output is not None and torch.equal(c.output, given) and c.inputs
    ]
    if not norms:
        return f"{kind} has no norm whose output is the MLP's input"
    norm = norms[-1]
    users = [
        c
        for c in run.calls
        if not c.outer and c is not mlp and c.start > norm.end and _has_matrix(c.module)
    ]
    if any(torch.equal(value, given) for c in users for value in c.inputs.values()):
        return f"{kind} has one norm for attention and MLP, no second one"
    key, x = next(iter(norm.inputs.items()))
    assert norm.output is not None
    found = _norm_of(norm.module, x, norm.output)
    if found is None:
        return (
            f"{norm.path} ({type(norm.module).__name__}) is neither an RMSNorm nor a LayerNorm "
            "that can be recomputed"
        )
    if found.centred:
        return (
            f"{norm.path} is a LayerNorm, where TransformerLens 2 means its output and "
            "TransformerLens 3 what stands before its "
            f"weight and bias: say {norm.path}:output or {norm.path}:normalized"
        )
    return dataclasses.replace(norm.given(key), norm=found)


def _sum(
    run: _Run,
    first: _Call,
    last: _Call,
    inner: list[_Call],
    stream: torch.Tensor,
    output: torch.Tensor,
    kind: str,
) -> tuple[Place | str, Place | str]:
    """resid_mid and what the MLP adds to it, of which the layer's output is the sum."""
    own = [c for c in run.calls if not c.outer]
    after: list[_Call] = [last]  # what the MLP gives, and norms that it goes through
    for c in own:
        if c.start > last.end and c.output is not None and not _has_matrix(c.module):
            if any(
                torch.equal(x, done.output)
                for done in after
                for x in c.inputs.values()
                if done.output is not None
            ):
                after.append(c)
    parts = [*after, *inner]
    middles = [
        (c, key, x)
        for c in run.calls[::-1]
        if c.start <= first.start and last not in c.outer
        for key, x in c.inputs.items()
    ]
    for c, key, middle in middles:
        for part in parts:
            scale = _addend(output, middle, part.output, run.module)
            if scale is None:
                continue
            added = part.gave(scale)
            if torch.equal(middle, stream):
                return f"{kind} adds nothing to the stream before its MLP", added
            attention = [
                a for a in run.calls if a.end < first.start and a.end > 0 and a.output is not None
            ]
            attention.sort(key=lambda a: (len(a.outer), -a.end))
            scales = ((a, _addend(middle, stream, a.output, run.module)) for a in attention)
            writes = next((a.gave(s) for a, s in scales if s is not None), None)
            return dataclasses.replace(c.given(key), writes=writes), added
    others = [
        c for c in run.calls if c.output is not None and c not in parts and last not in c.outer
    ]
    others.sort(key=lambda c: len(c.outer))
    for part in parts:
        for other in others:
            scale = _addend_beside(output - stream, stream, part.output, other.output, run.module)
            if scale is not None:
                why = (
                    f"{kind} adds attention and MLP to the stream at once, so nothing stands "
                    "between them"
                )
                return why, part.gave(scale)
    why = (
        f"the output of {kind} is not what stands before its MLP plus a multiple of what the MLP "
        "gives"
    )
    return why, why


def _addend(
    total: torch.Tensor, base: torch.Tensor, part: Any, owner: nn.Module | None = None
) -> float | None:
    """c where total = base + c * part to rounding in every element, else None."""
    if part is None or total.shape != base.shape or part.shape != base.shape:
        return None
    t, b, p = total.double(), base.double(), part.double()
    square = (p * p).sum()
    if not bool(square > 0):
        return None
    return _checked(t, b, [p], [float(((t - b) * p).sum() / square)], total.dtype, owner)


def _addend_beside(
    difference: torch.Tensor, base: torch.Tensor, part: Any, other: Any, owner: nn.Module
) -> float | None:
    """c where difference = c * part + d * other for some d, to rounding in every element, else
    None."""
    if part is None or other is None or part.shape != base.shape or other.shape != base.shape:
        return None
    b, p, o = base.double(), part.double(), other.double()
    pp, oo, po = float((p * p).sum()), float((o * o).sum()), float((p * o).sum())
    determinant = pp * oo - po * po
    if not determinant > 1e-9 * pp * oo:
        return None
    d = difference.double()
    dp, do = float((d * p).sum()), float((d * o).sum())
    c, e = (dp * oo - do * po) / determinant, (do * pp - dp * po) / determinant
    if c == 0 or e == 0:
        return None
    return _checked(b + d, b, [p, o], [c, e], difference.dtype, owner)


def _checked(
    total: torch.Tensor,
    base: torch.Tensor,
    parts: list[torch.Tensor],
    scales: list[float],
    dtype: torch.dtype,
    owner: nn.Module | None,
) -> float | None:
    eps = torch.finfo(dtype).eps
    known = (
        [1.0, *(v for v in vars(owner).values() if isinstance(v, float))]
        if owner is not None
        else [1.0]
    )
    near = [next((k for k in known if abs(k - s) <= 16 * eps * abs(k)), s) for s in scales]
    rest, bound = total - base, total.abs() + base.abs()
    if bool(
        (rest.abs() <= 4 * eps * bound).all()
    ):  # the parts change nothing, so they are not known to be added
        return None
    for part, scale in zip(parts, near, strict=True):
        rest, bound = rest - scale * part, bound + (scale * part).abs()
    return near[0] if bool((rest.abs() <= 4 * eps * bound).all()) else None


def _norm_of(module: nn.Module, given: torch.Tensor, gave: torch.Tensor) -> Norm | None:
    """The norm that gives what the module gave, times one weight and plus one bias per column;
    None where none does.

    Weight and bias are fitted to the rows, so it does not matter how the module stores them, or
    where.
    """
    if given.shape != gave.shape or not gave.is_floating_point():
        return None
    x, y = given.detach().double(), gave.detach().double()
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    if x.shape[0] < 4 or not bool(y.any()):  # fewer rows do not prove a weight and a bias
        return None
    for eps in {
        value for value in vars(module).values() if isinstance(value, float) and 0 <= value < 0.1
    }:
        for centred in (False, True):
            v = x - x.mean(-1, keepdim=True) if centred else x
            n = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps)
            about = n.mean(0) if centred else torch.zeros_like(n[0])
            centre = y.mean(0) if centred else torch.zeros_like(y[0])
            gain = ((n - about) * (y - centre)).sum(0) / (n - about).pow(2).sum(0)
            bias = centre - gain * about
            bound = (n * gain).abs() + bias.abs() + gain.abs()
            if bool(
                ((n * gain + bias - y).abs() <= 32 * torch.finfo(gave.dtype).eps * bound).all()
            ):
                return Norm(eps, centred)
    return None
