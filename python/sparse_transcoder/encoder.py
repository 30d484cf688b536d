"""Encode hidden states with the C++ engine."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

import torch

from . import _C
from . import _arguments as check
from .capture import capture, hook_of
from .graph import attribution_feature
from .weights import TranscoderWeights, to_native


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

    Args:
        transcoders: {layer: weights}.
        top_k: the number of features returned per row. None takes each layer's own k from its
            checkpoint.
        activation_threshold: the smallest activation that is kept, inclusive.
        use_compile: replay captured work for shapes seen before, on CUDA, where a layer has at most
            8 rows. It has no effect on results.
        chunk_size: the number of rows worked on at a time. It bounds the workspace, not the result.
        screening: which low-precision copies of the encoders find the candidates. It has no effect
            on results. "auto" is the fastest on this machine: int8 and, for float32 weights, int16
            (1 + 2 bytes per weight). "int8" and "int16" are that copy alone. "off" makes no copy.
            On CUDA all but "off" are bfloat16: a copy of 2 bytes per weight where the weights are
            not stored so.
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
        hidden = {check.integer("layer", layer): rows for layer, rows in hidden_states.items()}
        known = set(self.layers)
        unknown = [layer for layer in hidden if layer not in known]
        if unknown:
            names = ", ".join(map(str, unknown))
            warnings.warn(f"no transcoder for layers {names}: not encoded", stacklevel=2)
        encoded = self._engine.encode_all(
            {layer: check.tensor(layer, hidden[layer]) for layer in hidden if layer in known}
        )
        return {layer: _result(layer, encoded[layer]) for layer in hidden if layer in known}

    def encode_sparse(self, layer_idx: int, hidden: torch.Tensor) -> torch.Tensor:
        """Every kept feature of every row, however many: ``top_k`` plays no part.

        The dense matrix is never formed. A row with NaN or Inf holds one entry, NaN at feature 0.
        Arguments and errors are those of :meth:`encode_layer`.

        Returns:
            A sparse CSR tensor [N, F] float32, where N = B * T. It comes without torch's remark
            that such tensors are in beta.
        """
        layer = check.integer("layer_idx", layer_idx)
        found = self._engine.encode_sparse(layer, check.tensor(layer, hidden))
        return found.to_csr(self._transcoders[layer].W_enc.shape[0])

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
            ValueError: the layer has no decoder, or shapes do not fit.
        """
        layer = check.integer("layer_idx", layer_idx)
        x = None if hidden is None else check.tensor(layer, hidden)
        expected = f"layer {layer}: features must be an encode result or sparse CSR"
        if isinstance(features, torch.Tensor):
            if features.layout != torch.sparse_csr:
                raise TypeError(f"{expected}, got {features.layout}")
            parts = (features.crow_indices(), features.col_indices(), features.values())
            y = self._engine.decode_sparse(layer, _C.SparseFeatures(*parts), x)
        elif isinstance(features, Mapping):
            if not {"activations", "indices"} <= features.keys():
                names = list(features)
                raise ValueError(
                    f"layer {layer}: features must hold activations and indices, got {names}"
                )
            activations = check.tensor(layer, features["activations"], "activations")
            indices = check.tensor(layer, features["indices"], "indices")
            y = self._engine.decode(layer, activations, indices, x)
        else:
            raise TypeError(f"{expected}, got {type(features).__name__}")
        return self._by_layer(layer, y)

    def extract_attribution_features(
        self, hidden_states: Mapping[int, torch.Tensor], top_k_global: int = 100
    ) -> list[dict[str, Any]]:
        """The strongest features over all layers, batch rows and positions, strongest first.

        They are drawn from the ``top_k`` of each position. Among ties the order is that of layer,
        batch row, position and feature, all ascending. :func:`graph_json` makes a graph of them.

        Args:
            hidden_states: {layer: [B, T, H] or [T, H]}.
            top_k_global: the largest number of features.

        Returns:
            One dict per feature: ``node_id`` ("{layer}_{feature}_{ctx_idx}", with "{batch}" after
            the layer when B > 1), ``feature`` (int), ``layer`` (str), ``batch_idx``, ``ctx_idx``,
            ``feature_type``, ``influence`` and ``activation`` (both are the activation).
        """
        limit = check.positive("top_k_global", top_k_global)
        encoded = self.encode_all_layers(hidden_states)
        # The strongest of each layer, in the order of the tie rule: rows ascend, and among equals
        # of a row features ascend.
        found: list[tuple[float, int, int, int, int, bool]] = []
        for layer in sorted(encoded):
            activations = encoded[layer]["activations"]
            batched = activations if activations.ndim == 3 else activations[None]
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
        inputs: torch.Tensor | Mapping[str, torch.Tensor],
        layers: Iterable[int] | None = None,
        hook: str | None = None,
        *,
        exact: bool = True,
    ) -> dict[int, PositionFeatures]:
        """Run a Hugging Face causal model as far as needed and encode its hidden states.

        Hidden states are read where the weights of each layer say (``hook_in``). Padded positions
        do not appear. With ``exact`` a batch of prompts gives the same as the prompts one by one,
        bit for bit.

        Args:
            model: see :func:`sparse_transcoder.capture`.
            inputs: token ids [B, T] or [T], or a tokenizer's result with ``input_ids`` and
                ``attention_mask``.
            layers: the layers to encode. None is all that have a transcoder.
            hook: where to read. It is needed for layers whose weights record no ``hook_in``, and
                must agree with those that do.
            exact: run each prompt by itself, without its padding.

        Returns:
            {layer: result} with tensors [N, K] and [N] for the N real positions of all prompts.

        Raises:
            KeyError: a layer has no transcoder.
            ValueError: ``hook`` is missing or disagrees with the weights, or the reasons of
                :func:`sparse_transcoder.capture`.

        Example:
            >>> tokens = tokenizer(prompts, return_tensors="pt", padding=True)
            >>> encoder.encode_model(model, tokens)[12]["indices"]  # [N, top_k]
        """
        wanted = self.layers if layers is None else [check.integer("layer", i) for i in layers]
        hooks = {layer: self._hook(layer, hook) for layer in wanted}
        captured = capture(model, inputs, hooks, hooks, exact=exact)
        return {
            layer: {
                **result,
                "batch_idx": captured.batch_idx.to(result["indices"].device),
                "ctx_idx": captured.ctx_idx.to(result["indices"].device),
            }
            for layer, result in self.encode_all_layers(captured.hidden).items()
        }

    def _hook(self, layer: int, hook: str | None) -> str:
        """The place that a layer reads, from its weights or from the caller."""
        recorded = self._transcoder(layer).hook_in
        if not recorded:
            if hook is None:
                raise ValueError(f"layer {layer}: hook must be given, the weights record none")
            return hook
        if hook is not None and hook_of(recorded, layer) != hook_of(hook, layer):
            raise ValueError(
                f"layer {layer}: hook must be {recorded} as the weights record, got {hook}"
            )
        return recorded

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
        return self._transcoders[layer]

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
            ``rescored``, the pairs computed exactly, of which ``ambiguous`` were too near their
            gate to be counted unseen; ``fallback_rows``, the rows too large to screen;
            ``prepare_ms``, ``screen_ms``, ``refine_ms``, ``rescore_ms`` and ``finish_ms``, the
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


def _result(layer: int, features: _C.Features) -> LayerFeatures:
    return {
        "layer": layer,
        "activations": features.activations,
        "indices": features.indices,
        "sparsity": features.sparsity,
    }
