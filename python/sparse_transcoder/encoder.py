"""Encode hidden states with the C++ engine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypedDict

import torch

from . import _C
from . import _arguments as check
from .capture import capture_places
from .graph import attribution_feature
from .live import Monitor, Step, attach, changes_of, intervene, resolved
from .places import Decoder, decoder
from .probe import Place
from .prompts import Exclude, excluded, prompts_of
from .weights import TranscoderWeights, tensors_of, to_native


class LayerFeatures(TypedDict):
    """The result of one layer for hidden [B, T, H], or without B for [T, H]; K = min(top_k, F)."""

    layer: int
    activations: torch.Tensor
    """[B, T, K] float32, descending along K. Ranks that no feature fills hold 0."""
    indices: torch.Tensor
    """[B, T, K] int64, distinct in a row. Among ties the lower feature comes first. Ranks that no
    feature fills hold the lowest features that are not kept."""
    sparsity: torch.Tensor
    """[B, T] float32: the fraction of the F features that are kept, not capped by K."""


class PositionFeatures(LayerFeatures):
    """The result of one layer for the N real positions of a batch of prompts.

    Its tensors are [N, K] and [N] where those of LayerFeatures are [B, T, K] and [B, T].
    """

    batch_idx: torch.Tensor
    """[N] int64: the prompt of each position."""
    ctx_idx: torch.Tensor
    """[N] int64: the index of each position among the prompt's real tokens, from 0."""


class SparseTranscoderEncoder:
    """Exact top-k features of many layers, without the dense [tokens, features] matrix.

    For each row h the encoder computes ``pre = norm(h) @ W_enc.T + b_enc``. A feature is kept when
    its activation (relu, jumprelu or top-k, as the weights declare) is positive and at least
    ``activation_threshold``. The ``top_k`` largest activations are returned; among ties the lower
    feature comes first. Results are the same bit for bit whatever the chunk size, the batch, the
    layers beside it, or the threads. A row with NaN or Inf gives NaN activations and NaN sparsity
    in that row alone.

    Methods may be called from many threads at once, and the interpreter lock is released during the
    work. An encoder can be pickled and deep-copied: its weights and options travel, and a new
    engine is built from them. ``copy.copy`` shares the weights.

    Weights must stay as they are while an encoder holds them: copies and bounds are made of them
    when it is built. After a change, every method that uses the layer raises ValueError: build a
    new encoder. Changes are seen by the tensors' version counters and by what they are. Inference
    tensors count nothing, nor does writing through ``.data`` or NumPy: this is seen on the CPU
    where most of a tensor changes, and not on CUDA. There features would be found by the copies and
    bounds of the old weights, and their values computed from the new ones.

    Args:
        transcoders: {layer: weights}.
        top_k: the number of features returned per row. None takes each layer's own k from its
            checkpoint.
        activation_threshold: the smallest activation that is kept, inclusive.
        use_compile: replay captured work for shapes seen before, on CUDA, where a layer has at most
            64 rows. It has no effect on results.
        chunk_size: the number of rows worked on at a time. It bounds the workspace, not the result.
        screening: which low-precision copies of the encoders find the candidates. It has no effect
            on results. "auto" is the fastest on this machine: int8 and, for float32 weights, int16
            (1 + 2 bytes per weight; rows are padded to multiples of 64 inputs). "int8" and "int16"
            are that copy alone. "off" makes no copy.
            On CUDA all but "off" are bfloat16: a copy of 2 bytes per weight where the weights are
            not stored so. Up to 64 rows of a layer are screened by an int8 copy, 1 byte per weight
            in rows padded to multiples of 128 inputs: "int8" makes it of every layer whose weights
            stay on the device, and "auto" of large ones, unless device_weight_bytes bounds the
            memory. "auto" leaves it for a while where a layer's last calls showed that it does not
            pay: where very many features are near their gates.
        device_weight_bytes: encode layers whose weights are on the CPU on the current CUDA device,
            also where they are larger than the device. Encoders that fit in this many bytes, in the
            order of the layers, are copied there. The others stay in pinned host memory and stream
            through two device buffers in each call. None encodes each layer where its weights are.

    Raises:
        ValueError: an option, or a tensor's shape, device or value, is wrong.
        TypeError: a tensor's dtype, or an argument's type, is wrong.

    Example:
        >>> encoder = SparseTranscoderEncoder(load_transcoders("transcoders"), top_k=32)
        >>> encoder.encode_all_layers({12: hidden})[12]["activations"]  # [B, T, 32]
    """

    def __init__(
        self,
        transcoders: Mapping[int, TranscoderWeights],
        top_k: int | None = 20,
        activation_threshold: float = 1.0,
        use_compile: bool = True,
        chunk_size: int = 512,
        *,
        screening: str = "auto",
        device_weight_bytes: int | None = None,
    ) -> None:
        if not isinstance(transcoders, Mapping):
            name = type(transcoders).__name__
            raise TypeError(f"transcoders must map layers to TranscoderWeights, got {name}")
        named = {check.integer("layer", layer): w for layer, w in transcoders.items()}
        self.top_k = None if top_k is None else check.positive("top_k", top_k)
        self.activation_threshold = check.number("activation_threshold", activation_threshold)
        self.use_compile = bool(use_compile)
        self.chunk_size = check.positive("chunk_size", chunk_size)
        screenings = _C.Screening.__members__
        if not isinstance(screening, str) or screening not in screenings:
            raise ValueError(f"screening must be one of {', '.join(screenings)}, got {screening!r}")
        self.screening = screening
        self.device_weight_bytes = (
            None
            if device_weight_bytes is None
            else check.at_least(0, "device_weight_bytes", device_weight_bytes)
        )
        self._transcoders = named
        self._engine = _C.Engine(
            {layer: to_native(layer, weights) for layer, weights in named.items()},
            top_k=self.top_k or 0,
            activation_threshold=self.activation_threshold,
            chunk_size=self.chunk_size,
            lanes=0,
            screening=screenings[screening],
            use_graphs=self.use_compile,
            device_weight_bytes=-1
            if self.device_weight_bytes is None
            else self.device_weight_bytes,
        )
        self._tensors = {layer: tensors_of(weights) for layer, weights in named.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {
            "transcoders": self._transcoders,
            "top_k": self.top_k,
            "activation_threshold": self.activation_threshold,
            "use_compile": self.use_compile,
            "chunk_size": self.chunk_size,
            "screening": self.screening,
            "device_weight_bytes": self.device_weight_bytes,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        SparseTranscoderEncoder.__init__(self, **state)

    @property
    def layers(self) -> list[int]:
        """The layers that have a transcoder, ascending."""
        return self._engine.layers

    def encode_layer(self, layer_idx: int, hidden: torch.Tensor) -> LayerFeatures:
        """Encode one layer's hidden states.

        Args:
            layer_idx: one of ``layers``.
            hidden: [B, T, H] or [T, H], float32, bfloat16 or float16, of any strides, on the
                weights' device.

        Raises:
            KeyError: the layer has no transcoder.
            ValueError: hidden has a wrong shape or device.
            TypeError: hidden is no tensor, or has another dtype.

        Example:
            >>> encoder.encode_layer(12, hidden)["indices"]  # [B, T, top_k]
        """
        layer = check.integer("layer_idx", layer_idx)
        self._check_fields(layer)
        return _result(layer, self._engine.encode(layer, check.tensor(layer, hidden)))

    def encode_chunked(self, layer_idx: int, hidden: torch.Tensor) -> LayerFeatures:
        """The same as :meth:`encode_layer`, which works in chunks by itself.

        Callers of the reference project find it under this name.
        """
        return self.encode_layer(layer_idx, hidden)

    def encode_all_layers(
        self, hidden_states: Mapping[int, torch.Tensor]
    ) -> dict[int, LayerFeatures]:
        """Encode the hidden states of many layers at once, concurrently: {layer: result}.

        Layers that have no transcoder are named in one warning and left out. Arguments and errors
        are those of :meth:`encode_layer`.
        """
        if not isinstance(hidden_states, Mapping):
            name = type(hidden_states).__name__
            raise TypeError(f"hidden_states must map layers to tensors, got {name}")
        hidden_states = _by_layer(hidden_states)
        known = set(self.layers)
        unknown = [layer for layer in hidden_states if layer not in known]
        if unknown:
            names = ", ".join(map(str, unknown))
            warnings.warn(f"no transcoder for layers {names}: not encoded", stacklevel=2)
        wanted = [layer for layer in hidden_states if layer in known]
        for layer in wanted:
            self._check_fields(layer)
        encoded = self._engine.encode_all(
            {layer: check.tensor(layer, hidden_states[layer]) for layer in wanted}
        )
        return {layer: _result(layer, encoded[layer]) for layer in wanted}

    def encode_sparse(self, layer_idx: int, hidden: torch.Tensor) -> torch.Tensor:
        """Every kept feature of every row, however many: ``top_k`` plays no part.

        The dense matrix is never formed. A row with NaN or Inf holds one entry, NaN at feature 0.
        Arguments and errors are those of :meth:`encode_layer`.

        Returns:
            A sparse CSR tensor [N, F] float32, where N = B * T. It comes without torch's remark
            that such tensors are in beta.
        """
        layer = check.integer("layer_idx", layer_idx)
        self._check_fields(layer)
        found = self._engine.encode_sparse(layer, check.tensor(layer, hidden))
        return found.to_csr(self._transcoders[layer].W_enc.shape[0])

    def encode_into(
        self,
        hidden_states: Mapping[int, torch.Tensor],
        sink: Callable[[_C.SparseRows], None],
        *,
        keep: str = "all",
        features: torch.dtype = torch.int64,
        activations: torch.dtype = torch.float32,
    ) -> None:
        """Encode the hidden states of many layers at once, chunk by chunk into a sink, so that no
        result of the whole call is ever held.

        The sink gets at most ``chunk_size`` rows at a time, those of a layer in their order, the
        layers one after the other or mixed. Each has ``layer``, ``first_row`` and ``features`` with
        ``row_begin`` [rows + 1], ``features`` [M] ascending in a row and ``activations`` [M]. What
        it raises ends the call.

        Args:
            hidden_states: {layer: hidden}, as for :meth:`encode_layer`.
            sink: called with rows, which it may keep.
            keep: "all" kept features of each row, or of these the ``top_k`` strongest.
            features: int64, uint32, or uint16 where F is at most 65,536.
            activations: float32 or float16. In float16 a kept feature never becomes 0: it is 2^-24
                at least; one above 65,504 becomes that and is counted in ``clamped`` of its rows.

        Raises:
            As :meth:`encode_layer`. TypeError: another dtype. ValueError: another ``keep``.

        Example:
            >>> encoder.encode_into({12: hidden}, lambda rows: save(rows), features=torch.uint16)
        """
        if keep not in ("all", "top_k"):
            raise ValueError(f"keep must be all or top_k, got {keep!r}")
        hidden_states = _by_layer(hidden_states)
        self._engine.encode_into(
            {layer: check.tensor(layer, hidden) for layer, hidden in hidden_states.items()},
            sink,
            features=features,
            activations=activations,
            only_top_k=keep == "top_k",
        )

    def decode(
        self,
        layer_idx: int,
        features: LayerFeatures | torch.Tensor,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor | dict[int, torch.Tensor]:
        """Reconstruct what the decoder writes: ``W_dec @ activations + b_dec``.

        A layer with a skip connection adds ``W_skip @ hidden``.

        Args:
            layer_idx: one of ``layers``.
            features: a result of :meth:`encode_layer`, :meth:`encode_model` or
                :meth:`encode_sparse`.
            hidden: the hidden states [.., H] that were encoded. They are needed, and used, only
                with a skip connection.

        Returns:
            [B, T, d_out] float32, or [N, d_out] where ``features`` has N rows; d_out is H where the
            weights do not say otherwise. A decoder that is declared to write to several layers
            (``write_layers``) gives {layer: [.., H]} for this layer and those after it.

        Raises:
            KeyError: the layer has no transcoder.
            ValueError: the layer has no decoder, shapes do not fit, or the features are of another
                layer.
        """
        layer = check.integer("layer_idx", layer_idx)
        self._check_fields(layer)
        x = None if hidden is None else check.tensor(layer, hidden)
        expected = f"layer {layer}: features must be an encode result or sparse CSR"
        if isinstance(features, torch.Tensor):
            if features.layout != torch.sparse_csr:
                raise TypeError(f"{expected}, got {features.layout}")
            count = self._transcoder(layer).W_enc.shape[0]
            if features.ndim != 2 or features.shape[1] != count:
                raise ValueError(
                    f"layer {layer}: features must be [N, {count}], got {list(features.shape)}"
                )
            parts = (features.crow_indices(), features.col_indices(), features.values())
            y = self._engine.decode_sparse(layer, _C.SparseFeatures(*parts), x)
        elif isinstance(features, Mapping):
            if not {"activations", "indices"} <= features.keys():
                names = list(features)
                raise ValueError(
                    f"layer {layer}: features must hold activations and indices, got {names}"
                )
            if features.get("layer", layer) != layer:
                raise ValueError(
                    f"layer {layer}: features must be of this layer, got those of layer "
                    f"{features['layer']}"
                )
            activations = check.tensor(layer, features["activations"], "activations")
            indices = check.tensor(layer, features["indices"], "indices")
            y = self._engine.decode(layer, activations, indices, x)
        else:
            raise TypeError(f"{expected}, got {type(features).__name__}")
        return self._by_layer(layer, y)

    def extract_attribution_features(
        self,
        hidden_states: Mapping[int, torch.Tensor],
        top_k_global: int = 100,
        *,
        exclude: Exclude | None = None,
        inputs: Any = None,
    ) -> list[dict[str, Any]]:
        """The strongest features over all layers, batch rows and positions, strongest first.

        They are drawn from the ``top_k`` of each position. Among ties the order is that of layer,
        batch row, position and feature, all ascending. :func:`graph_json` makes a graph of them.

        Args:
            hidden_states: {layer: [B, T, H] or [T, H]}.
            top_k_global: the largest number of features.
            exclude: positions to leave out: a mask [B, T] that is true there, a set of token ids,
                or "special", which is what a tokenizer's result marks.
            inputs: the tokens of the hidden states, [B, T] or a tokenizer's result. They are needed
                for every ``exclude`` but a mask.

        Returns:
            One dict per feature: ``node_id`` ("{layer}_{feature}_{ctx_idx}", with "{batch}" after
            the layer when B > 1), ``feature`` (int), ``layer`` (str), ``batch_idx``, ``ctx_idx``,
            ``feature_type``, ``influence`` and ``activation`` (both are the activation).

        Raises:
            ValueError: the layers' hidden states differ in B or T.
        """
        limit = check.positive("top_k_global", top_k_global)
        encoded = self.encode_all_layers(hidden_states)
        rows = {tuple(e["sparsity"].shape) for e in encoded.values()}
        if len({shape if len(shape) == 2 else (1, *shape) for shape in rows}) > 1:
            shapes = ", ".join(f"{layer}: {list(hidden_states[layer].shape)}" for layer in encoded)
            raise ValueError(f"hidden_states must be of the same prompts, got {shapes}")
        # The strongest of each layer, in the order of the tie rule: rows ascend, and among equals
        # of a row features ascend.
        found: list[tuple[float, int, int, int, int, bool]] = []
        for layer in sorted(encoded):
            activations = encoded[layer]["activations"]
            batched = activations if activations.ndim == 3 else activations[None]
            if exclude is not None:
                out = excluded(exclude, (batched.shape[0], batched.shape[1]), inputs)
                batched = batched.masked_fill(out.to(batched.device)[..., None], 0.0)
            flat = batched.flatten()
            entries = torch.nonzero(flat > 0).flatten()
            if entries.numel() > limit:
                kth_best = torch.topk(flat[entries], limit).values[-1]
                entries = entries[flat[entries] >= kth_best]
            values = flat[entries].tolist()
            features = encoded[layer]["indices"].flatten()[entries].tolist()
            batches, positions, k = batched.shape
            for entry, value, feature in zip(entries.tolist(), values, features, strict=True):
                batch, position = divmod(entry // k, positions)
                found.append((value, layer, batch, position, feature, batches > 1))
        found.sort(key=lambda entry: -entry[0])
        return [
            attribution_feature(layer, feature, position, batch, value, many_prompts=many)
            for value, layer, batch, position, feature, many in found[:limit]
        ]

    def encode_model(
        self,
        model: torch.nn.Module,
        inputs: torch.Tensor | Mapping[str, Any],
        layers: Iterable[int] | None = None,
        hook: str | Mapping[int, str] | None = None,
        *,
        exact: bool = True,
        exclude: Exclude | None = None,
    ) -> dict[int, PositionFeatures]:
        """Run a Hugging Face causal model as far as it is needed and encode its hidden states:
        {layer: result}.

        Hidden states are read where each layer's weights say (``hook_in``); padded positions do
        not appear. With ``exact`` a batch of prompts gives the same as the prompts one by one, bit
        for bit. See :func:`sparse_transcoder.capture`.

        Args:
            model: see :func:`sparse_transcoder.capture`.
            inputs: token ids [B, T] or [T], or a tokenizer's result.
            layers: the layers to encode; None is all that have a transcoder.
            hook: where to read, for all layers or {layer: place}; needed for layers whose weights
                record no ``hook_in``. It wins over what they record, with one warning where the
                two are different places.
            exact: run each prompt by itself, without its padding.
            exclude: positions that are read but not encoded: "special" (every id that the model's
                configuration names, and what the tokenizer's result marks), a set of token ids, or
                a mask [B, T] that is true there. ``ctx_idx`` still counts them.

        Raises:
            KeyError: there is no transcoder for a layer. ValueError: ``hook`` is missing, the
                model has no such place, ``exclude``
            leaves nothing, or as in :func:`sparse_transcoder.capture`.

        Example:
            >>> encoder.encode_model(model, tokenizer(prompts, return_tensors="pt",
            padding=True))[12]["indices"]  # [N, top_k]
        """
        prompts = prompts_of(inputs)
        keep = None
        if exclude is not None:
            shape = (prompts.ids.shape[0], prompts.ids.shape[1])
            given = inputs if isinstance(inputs, Mapping) else prompts.ids
            keep = ~excluded(exclude, shape, given, model)[prompts.mask.cpu()]
            if not bool(keep.any()):
                raise ValueError("exclude must leave at least one position, got none")
        captured = capture_places(
            model, prompts, self._places(decoder(model), layers, hook), exact=exact
        )
        hidden, batch_idx, ctx_idx = captured.hidden, captured.batch_idx, captured.ctx_idx
        if keep is not None:
            hidden = {layer: states[keep.to(states.device)] for layer, states in hidden.items()}
            batch_idx, ctx_idx = (index[keep.to(index.device)] for index in (batch_idx, ctx_idx))
        return {
            layer: {
                **result,
                "batch_idx": batch_idx.to(result["indices"].device),
                "ctx_idx": ctx_idx.to(result["indices"].device),
            }
            for layer, result in self.encode_all_layers(hidden).items()
        }

    def attach(
        self,
        model: torch.nn.Module,
        layers: Iterable[int] | None = None,
        hook: str | Mapping[int, str] | None = None,
        *,
        exclude: Exclude | None = None,
        on_step: Callable[[Step], None] | None = None,
        keep: int | None = None,
    ) -> Monitor:
        """Encode every forward pass of a model while a ``with`` block is open: every step of
        ``generate``, with its KV cache.

        Each pass gives a :class:`~sparse_transcoder.live.Step`: the features of its real
        positions, equal bit for bit to what encoding the same rows afterwards gives. ``batch_idx``
        is the row of that pass, so the beams of a beam search are rows, and what an assistant
        model's guesses made the model read is there too. Only features are kept, and hidden states
        of one pass at a time. The model's own output does not change, and its hooks are gone after
        the block, also on errors.

        Args:
            model: see :func:`sparse_transcoder.capture`; compiled parts run uncompiled meanwhile.
            layers: the layers to encode; None is all that have a transcoder.
            hook: as in :meth:`encode_model`.
            exclude: "special" or token ids that are not encoded, as in :meth:`encode_model`.
            on_step: called with each step as it comes; nothing is kept then, so memory is flat
                however long the text.
            keep: how many steps ``monitor.steps`` holds at most, the last ones; None is all of
                them.

        Raises:
            KeyError: there is no transcoder for a layer. ValueError: the model has no such place,
                or ``hook`` is missing.

        Example:
            >>> with encoder.attach(model) as monitor:
            ...     model.generate(**inputs, max_new_tokens=50)
            >>> monitor.features()[12]["indices"]  # [N, top_k]: the prompt's positions and the
            generated ones
        """
        return attach(
            self, model, self._places(decoder(model), layers, hook), exclude, on_step, keep
        )

    def intervene(
        self,
        model: torch.nn.Module,
        changes: Mapping[int, Mapping[int, float] | Iterable[int]],
        mode: str = "add",
        *,
        hook: str | Mapping[int, str] | None = None,
        hook_in: str | Mapping[int, str] | None = None,
    ) -> AbstractContextManager[None]:
        """Change features in every forward pass of a model while a ``with`` block is open, at
        every position.

        To what the transcoder writes to (``hook_out``) is added, for each feature, its decoder
        direction times: the value ("add"); the value less the feature's activation there and then
        ("set"); less that activation ("ablate"). Activations are computed exactly, from what the
        model holds at ``hook_in`` in the same pass, whatever ``activation_threshold`` is. Hooks
        are gone after the block, also on errors; the model's weights are never touched.

        Args:
            model: see :func:`sparse_transcoder.capture`; compiled parts run uncompiled meanwhile.
            changes: {layer: {feature: value}}; for "ablate" also {layer: features}, and values
                play no part.
            mode: "add", "set" or "ablate".
            hook: where to write; needed for layers whose weights record no ``hook_out``, and wins
                over what they record.
            hook_in: where "set" and "ablate" read, as ``hook`` of :meth:`encode_model`.

        Raises:
            KeyError: there is no transcoder for a layer. ValueError: it has no W_dec or no such
                feature, a value is not finite, or
            the model has no such place, or one that can be read but not written. TypeError: an
            argument's type is wrong.

        Example:
            >>> with encoder.intervene(model, {12: {4071: 8.0}}):
            ...     model.generate(**inputs, max_new_tokens=50)
        """
        wanted = changes_of(self, changes, mode)
        known = decoder(model)
        reads = self._places(
            known, [c.layer for c in wanted if c.activations is not None], hook_in, "hook_in"
        )
        told: list[str | None] = []
        writes: dict[int, Place] = {}
        for change in wanted:
            for target in change.directions:
                recorded = self._transcoders[
                    target if target in self._transcoders else change.layer
                ].hook_out
                writes[target], differs = resolved(known, target, recorded, hook)
                told.append(differs)
                known.check_writable(writes[target], target)
        _tell("written", told)
        return intervene(model, wanted, reads, writes)

    def _places(
        self,
        known: Decoder,
        layers: Iterable[int] | None,
        hook: str | Mapping[int, str] | None,
        what: str = "hook",
    ) -> dict[int, Place]:
        """Where each layer's hidden states are read; one warning where the caller and the weights
        disagree."""
        wanted = (
            self.layers if layers is None else [check.integer("layer", layer) for layer in layers]
        )
        if not wanted and what == "hook":
            raise ValueError("layers must name at least one layer, got none")
        found = {
            layer: resolved(known, layer, self._transcoder(layer).hook_in, hook, what)
            for layer in wanted
        }
        _tell("read", [differs for _, differs in found.values()])
        others = [
            f"layer {layer} has those of layer {weights.layer}"
            for layer, weights in ((layer, self._transcoders[layer]) for layer in wanted)
            if weights.layer not in (0, layer)  # 0 may be a layer that nobody said
        ]
        if others:
            warnings.warn(
                f"transcoders are used in other layers than their own: {'; '.join(others)}",
                stacklevel=3,
            )
        return {layer: place for layer, (place, _) in found.items()}

    def feature_vector(self, layer: int, feature: int) -> torch.Tensor | dict[int, torch.Tensor]:
        """What one unit of a feature's activation writes: its decoder direction [d_out], float32.

        A decoder that writes to n layers gives {layer: direction} for this layer and those after
        it.

        Raises:
            KeyError: the layer has no transcoder.
            ValueError: the layer has no W_dec, or no such feature.
        """
        return self._written(layer, [check.integer("feature", feature)], [1.0])

    def steer(
        self, layer: int, strengths: Mapping[int, float]
    ) -> torch.Tensor | dict[int, torch.Tensor]:
        """The delta [d_out], float32, to add to what the transcoder writes to.

        It is the sum of strength times decoder direction. A decoder that writes to n layers gives
        {layer: delta} for this layer and those after it.

        Args:
            layer: one of ``layers``.
            strengths: {feature: strength}, in units of the feature's activation.

        Raises:
            KeyError: the layer has no transcoder.
            ValueError: the layer has no W_dec, or no such feature, or a strength is not finite.
            TypeError: ``strengths`` is no mapping of integers to numbers.

        Example:
            >>> hidden_out += encoder.steer(12, {4071: 8.0, 93: -2.0})
        """
        if not isinstance(strengths, Mapping):
            name = type(strengths).__name__
            raise TypeError(f"strengths must map features to numbers, got {name}")
        named = {
            check.integer("feature", feature): check.number("strength", value)
            for feature, value in strengths.items()
        }
        for feature, strength in named.items():
            if not math.isfinite(strength):
                raise ValueError(
                    f"layer {layer}: the strength of feature {feature} must be finite, "
                    f"got {strength}"
                )
        return self._written(layer, list(named), list(named.values()))

    def _transcoder(self, layer: int) -> TranscoderWeights:
        if layer not in self._transcoders:
            known = ", ".join(map(str, self.layers))
            raise KeyError(f"layer {layer}: there is no transcoder for it, only for layers {known}")
        self._check_fields(layer)
        self._engine.check_unchanged(layer)
        return self._transcoders[layer]

    def _check_fields(self, layer: int) -> None:
        """Refuse weights whose fields hold other tensors than those that the engine has."""
        for name, tensor in self._tensors.get(layer, ()):
            if getattr(self._transcoders[layer], name) is not tensor:
                raise ValueError(
                    f"layer {layer}: {name} must stay as it was when the encoder was built, it is "
                    "another tensor now; build a new encoder"
                )

    def _written(
        self, layer: int, features: list[int], strengths: list[float]
    ) -> torch.Tensor | dict[int, torch.Tensor]:
        """The sum of strength times column of W_dec; only these columns are read."""
        W_dec = self._transcoder(check.integer("layer", layer)).W_dec
        if W_dec is None:
            raise ValueError(f"layer {layer}: the weights have no W_dec")
        for feature in features:
            if not 0 <= feature < W_dec.shape[1]:
                raise ValueError(
                    f"layer {layer}: feature must be 0 to {W_dec.shape[1] - 1}, got {feature}"
                )
        columns = torch.tensor(features, dtype=torch.int64, device=W_dec.device)
        directions = W_dec.detach().index_select(1, columns).float()
        with torch.autocast(directions.device.type, enabled=False):
            return self._by_layer(layer, directions @ directions.new_tensor(strengths))

    def _by_layer(
        self, layer: int, written: torch.Tensor
    ) -> torch.Tensor | dict[int, torch.Tensor]:
        """What a decoder wrote: [.., d_out] as it is, or {layer: [.., H]} for several layers."""
        weights = self._transcoders[layer]
        if weights.write_layers == 1:
            return written
        parts = torch.split(written, weights.W_enc.shape[1], dim=-1)
        return {layer + i: part for i, part in enumerate(parts)}

    def explain(self, layer_idx: int, hidden: torch.Tensor) -> dict[str, int | float | str]:
        """How :meth:`encode_layer` finds the features of these rows, on the CPU.

        The result itself is dropped. Arguments and errors are those of :meth:`encode_layer`; hidden
        that is not on the CPU is a ValueError.

        Returns:
            ``rows`` and ``features``; ``pairs_int8``, ``pairs_int16`` and ``pairs_float32``, the
            (row, feature) pairs screened in each arithmetic; ``survivors`` of the int8 screen;
            ``computed``, the pairs computed exactly, of which ``ambiguous`` were too near their
            gate to be counted unseen; ``fallback_rows``, the rows too large to screen;
            ``prepare_ms``, ``screen_ms``, ``rescreen_ms``, ``compute_ms`` and ``finish_ms``, the
            milliseconds of each phase, summed over workers; ``instruction_set``, as
            :func:`cpu_instruction_set` names it.
        """
        layer = check.integer("layer_idx", layer_idx)
        explanation = self._engine.explain(layer, check.tensor(layer, hidden))
        names = [name for name in dir(explanation) if not name.startswith("_")]
        return {name: getattr(explanation, name) for name in names}

    @property
    def workspace_bytes(self) -> int:
        """Bytes of all workspaces. They grow when calls overlap, not with the tokens of a call."""
        return self._engine.memory().workspace_bytes

    def memory(self) -> dict[str, int]:
        """Bytes held, by name.

        ``weight_bytes`` are shared with the caller, ``gate_bytes`` are the vectors of one number
        per feature, ``screening_bytes`` the low-precision copies, and ``workspace_bytes`` the
        workspaces.
        """
        memory = self._engine.memory()
        return {name: getattr(memory, name) for name in dir(memory) if name.endswith("_bytes")}

    @staticmethod
    def encode_single_layer(
        hidden: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, top_k: int, threshold: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :func:`encode_single_layer`."""
        return encode_single_layer(hidden, W_enc, b_enc, top_k, threshold)


def encode_single_layer(
    hidden: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, top_k: int, threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode once with bare weights: relu(hidden @ W_enc.T + b_enc), kept at ``threshold``, top k.

    Each call prepares the weights anew. For more than one call build a
    :class:`SparseTranscoderEncoder`.

    Args:
        hidden: [B, T, H] or [T, H].
        W_enc: [F, H].
        b_enc: [F].
        top_k: the number of features returned per row.
        threshold: the smallest activation that is kept, inclusive.

    Returns:
        (activations [B, T, K], indices [B, T, K], sparsity [B, T]), with K = min(top_k, F).

    Raises:
        ValueError: a shape, a device, a value or an option is wrong.
        TypeError: a dtype or an argument's type is wrong.
    """
    weights = {0: TranscoderWeights(W_enc, b_enc)}
    k = check.positive("top_k", top_k)
    encoder = SparseTranscoderEncoder(weights, k, threshold, screening="off")
    result = encoder.encode_layer(0, hidden)
    return result["activations"], result["indices"], result["sparsity"]


def _by_layer(hidden_states: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {check.integer("layer", layer): hidden for layer, hidden in hidden_states.items()}


def _result(layer: int, features: _C.Features) -> LayerFeatures:
    return {
        "layer": layer,
        "activations": features.activations,
        "indices": features.indices,
        "sparsity": features.sparsity,
    }


def _tell(done: str, differences: Iterable[str | None]) -> None:
    said = [text for text in differences if text is not None]
    if said:
        warnings.warn(
            f"hidden states are {done} where the caller says: {'; '.join(said)}", stacklevel=4
        )
