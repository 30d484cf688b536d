"""circuit-tracer on this engine.

Its attribution code (https://github.com/safety-research/circuit-tracer) runs unchanged, without the
dense [positions, features] matrix.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

from .. import _C
from ..encoder import SparseTranscoderEncoder
from ..weights import TranscoderWeights

RELUS = (torch.relu, torch.nn.functional.relu)


def on_engine(
    transcoders: TranscoderSet | CrossLayerTranscoder,
    *,
    chunk_size: int = 512,
    screening: str = "auto",
) -> TranscoderSet | CrossLayerTranscoder:
    """The same transcoders, whose features are found by the engine: all layers in one call.

    ``encode_sparse``, ``select_decoder_vectors``, ``compute_reconstruction`` and
    ``compute_attribution_components`` give what circuit-tracer's own give, except that a row with
    NaN or Inf holds one entry, NaN at feature 0. Vectors of active features are gathered into
    tensors of the final size. Parameters are shared with the transcoders given, which are left as
    they are. The engine is made at the first call, and made anew after parameters were cast, moved
    or changed. An encoder that circuit-tracer loads lazily is then read once and held.

    Args:
        transcoders: relu, JumpReLU or TopK transcoders, one for each layer or cross-layer.
        chunk_size: see :class:`SparseTranscoderEncoder`.
        screening: see :class:`SparseTranscoderEncoder`.

    Raises:
        TypeError: ``transcoders`` is neither of the two classes.
        ValueError: an activation is neither relu, JumpReLU nor TopK.

    Example:
        >>> model = ReplacementModel.from_pretrained_and_transcoders(
        ...     "google/gemma-2-2b", on_engine(transcoders)
        ... )
    """
    if isinstance(transcoders, CrossLayerTranscoder):
        return EngineCrossLayerTranscoder(transcoders, chunk_size, screening)
    if isinstance(transcoders, TranscoderSet):
        return EngineTranscoderSet(transcoders, chunk_size, screening)
    name = type(transcoders).__name__
    raise TypeError(
        f"transcoders must be a circuit-tracer TranscoderSet or CrossLayerTranscoder, got {name}"
    )


class EngineTranscoderSet(TranscoderSet):
    """A TranscoderSet on the engine. All but the methods here is circuit-tracer's own."""

    def __init__(self, transcoders: TranscoderSet, chunk_size: int, screening: str) -> None:
        views = {
            layer: EngineTranscoder(transcoder, layer)
            for layer, transcoder in enumerate(transcoders)
        }
        encoders = _Encoders([_of_single(view) for view in views.values()], chunk_size, screening)
        for view in views.values():
            view._encoders = encoders
        super().__init__(
            views,
            transcoders.feature_input_hook,
            transcoders.feature_output_hook,
            transcoders.scan,
        )
        self._encoders = encoders

    def select_decoder_vectors(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Active features [L, N, F]: (positions, layers, features, scaled decoder vectors [nnz, H],
        0 to nnz - 1)."""
        sparse = features if features.is_sparse else features.to_sparse()
        layers, positions, feature_ids = sparse.indices()
        vectors = sparse.values().new_empty(len(layers), self[0].d_model)
        for layer, part in _parts(layers, len(self)):
            self._scaled_decoders(vectors[part], layer, feature_ids[part], sparse.values()[part])
        mapping = torch.arange(len(layers), device=sparse.device)
        return positions, layers, feature_ids, vectors, mapping

    def compute_attribution_components(
        self, mlp_inputs: torch.Tensor, zero_positions: slice = slice(0, 1)
    ) -> dict[str, torch.Tensor]:
        """See circuit-tracer's TranscoderSet. mlp_inputs [L, N, H]."""
        features, encoder_vecs = self._encoders.encode_all(mlp_inputs, zero_positions)
        _, layers, _, decoder_vecs, mapping = self.select_decoder_vectors(features)
        positions = features.indices()[1]
        reconstruction = torch.zeros_like(mlp_inputs)
        for layer, part in _parts(layers, len(self)):
            transcoder = self[layer]
            written = _sums(decoder_vecs[part], positions[part], mlp_inputs.shape[1])
            if transcoder.W_skip is not None:
                written = written + transcoder.compute_skip(mlp_inputs[layer])
            reconstruction[layer] = written + transcoder.b_dec
        return {
            "activation_matrix": features,
            "reconstruction": reconstruction,
            "encoder_vecs": encoder_vecs,
            "decoder_vecs": decoder_vecs,
            "encoder_to_decoder_map": mapping,
            "decoder_locations": features.indices()[:2],
        }

    def _scaled_decoders(
        self, out: torch.Tensor, layer: int, features: torch.Tensor, activations: torch.Tensor
    ) -> None:
        transcoder = self[layer]
        held = None if transcoder.lazy_decoder else transcoder.W_dec
        _gather(out, held, transcoder._get_decoder_vectors, features, activations)


class EngineTranscoder(SingleLayerTranscoder):
    """A view of a SingleLayerTranscoder whose ``encode_sparse`` runs on the engine.

    All else is the transcoder's own.
    """

    _encoders: _Encoders

    def __init__(self, transcoder: SingleLayerTranscoder, layer: int) -> None:
        torch.nn.Module.__init__(self)
        self.__dict__.update(transcoder.__dict__)
        self._layer = layer

    def encode_sparse(
        self, input_acts: torch.Tensor, zero_positions: slice = slice(0, 1)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Active features of input_acts [N, H], none of them at ``zero_positions``.

        Returns:
            (activations, a sparse COO tensor [N, F]; their encoder rows [nnz, H]).
        """
        found, rows = self._encoders.encode({self._layer: input_acts}, zero_positions)
        _, positions, features = found.indices()
        return _sparse((positions, features), found.values(), tuple(found.shape[1:])), rows


class EngineCrossLayerTranscoder(CrossLayerTranscoder):
    """A CrossLayerTranscoder on the engine. All but the methods here is circuit-tracer's own."""

    def __init__(self, transcoder: CrossLayerTranscoder, chunk_size: int, screening: str) -> None:
        torch.nn.Module.__init__(self)
        self.__dict__.update(transcoder.__dict__)
        self._encoders = _Encoders(
            [_of_cross(self, layer) for layer in range(self.n_layers)],
            chunk_size,
            screening,
        )

    def encode_sparse(
        self, x: torch.Tensor, zero_positions: slice = slice(0, 1)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Active features of x [L, N, H], none of them at ``zero_positions``.

        Returns:
            (activations, a sparse COO tensor [L, N, F]; their encoder rows [nnz, H]).
        """
        return self._encoders.encode_all(x, zero_positions)

    def select_decoder_vectors(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Active features [L, N, F], each written to its layer and those after it: for the R
        vectors written (positions, layers, features, scaled decoder vectors [R, H], numbers of the
        active features)."""
        sparse = features if features.is_sparse else features.to_sparse()
        layers, positions, feature_ids = sparse.indices()
        written = self.n_layers - layers
        ends = written.cumsum(0)
        total = int(ends[-1]) if len(ends) else 0
        vectors = sparse.values().new_empty(total, self.d_model)
        for layer, part in _parts(layers, self.n_layers):
            if part.start == part.stop:
                continue
            end = int(ends[part.stop - 1])
            begin = end - (part.stop - part.start) * (self.n_layers - layer)
            _gather(
                vectors[begin:end].view(-1, self.n_layers - layer, self.d_model),
                None if self.lazy_decoder else self.W_dec[layer],
                functools.partial(self._get_decoder_vectors, layer),
                feature_ids[part],
                sparse.values()[part],
            )
        mapping = torch.arange(len(layers), device=sparse.device).repeat_interleave(written)
        after = torch.arange(total, device=sparse.device) - (ends - written)[mapping]
        return positions[mapping], layers[mapping] + after, feature_ids[mapping], vectors, mapping

    def compute_reconstruction(
        self,
        pos_ids: torch.Tensor,
        layer_ids: torch.Tensor,
        decoder_vectors: torch.Tensor,
        input_acts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[L, N, H], the sum of what is written to each layer and position.

        N is that of input_acts [L, N, H], or else the last position written to and those before.
        """
        if input_acts is not None:
            count = input_acts.shape[1]
        else:
            count = int(pos_ids.max()) + 1
        groups = layer_ids * count + pos_ids
        sums = _sums(decoder_vectors, groups, self.n_layers * count)
        written: torch.Tensor = sums.view(self.n_layers, count, -1) + self.b_dec[:, None]
        if self.W_skip is not None:
            assert input_acts is not None, (
                "Transcoder has skip connection but no input_acts were provided"
            )
            written = written + input_acts @ self.W_skip
        return written


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """Where the encoder of one layer is found."""

    W_enc: Callable[[], torch.Tensor]
    b_enc: Callable[[], torch.Tensor]
    activation: Callable[[], Any]
    threshold: Callable[[], torch.Tensor]
    """Of a JumpReLU, for this layer."""
    held: Callable[[], list[torch.Tensor]]
    """The tensors that these are made of, as far as they are in memory."""
    source: str = ""


def _of_single(transcoder: SingleLayerTranscoder) -> _Encoder:
    return _Encoder(
        lambda: transcoder.W_enc,
        lambda: transcoder.b_enc,
        lambda: transcoder.activation_function,
        lambda: transcoder.activation_function.threshold,
        lambda: _held(transcoder),
        transcoder.transcoder_path or "",
    )


def _of_cross(transcoder: CrossLayerTranscoder, layer: int) -> _Encoder:
    return _Encoder(
        lambda: transcoder._get_encoder_weights(layer),
        lambda: transcoder.b_enc[layer],
        lambda: transcoder.activation_function,
        lambda: transcoder.activation_function.threshold[layer],
        lambda: _held(transcoder),
        transcoder.clt_path or "",
    )


def _held(module: SingleLayerTranscoder | CrossLayerTranscoder) -> list[torch.Tensor]:
    own = [module.b_enc] if module.lazy_encoder else [module.W_enc, module.b_enc]
    activation = module.activation_function
    return [*own, activation.threshold] if isinstance(activation, JumpReLU) else own


class _Encoders:
    """The encoders of all layers on one engine."""

    def __init__(self, layers: list[_Encoder], chunk_size: int, screening: str) -> None:
        self._layers = layers
        self._chunk_size, self._screening = chunk_size, screening
        self._built_of: list[tuple[Any, ...]] = []
        for layer, encoder in enumerate(layers):
            _check_activation(layer, encoder.activation())

    def encode_all(
        self, x: torch.Tensor, zero_positions: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`encode` of all layers, x [L, N, H]."""
        if len(x) != len(self._layers):
            raise ValueError(
                f"inputs must be those of {len(self._layers)} layers, got {list(x.shape)}"
            )
        return self.encode(dict(enumerate(x)), zero_positions)

    def encode(
        self, inputs: Mapping[int, torch.Tensor], zero_positions: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Active features of these layers as a sparse COO tensor [L, N, F], none of them at
        ``zero_positions``; and their encoder rows [nnz, H]."""
        self._build_if_changed()
        shape = next(iter(inputs.values())).shape
        active = torch.ones(shape[0], dtype=torch.bool)
        active[zero_positions] = False
        at = active.nonzero().flatten()
        states: dict[Any, torch.Tensor] = {
            layer: x.detach()[at.to(x.device)].to(self._weights[layer].W_enc.dtype)
            for layer, x in inputs.items()
        }
        found = self._encoder._engine.encode_sparse_all(states)
        entries = [
            self._entries(layer, found[layer], x, at.to(x.device)) for layer, x in states.items()
        ]
        sizes = [len(features) for _, features, _ in entries]
        first = self._weights[0].W_enc
        rows = first.new_empty(sum(sizes), first.shape[1])
        for layer, part, (_, features, _) in zip(
            inputs, torch.split(rows, sizes), entries, strict=True
        ):
            torch.index_select(self._weights[layer].W_enc, 0, features, out=part)
        layers = torch.tensor(list(inputs), device=rows.device)
        sparse = _sparse(
            (
                layers.repeat_interleave(torch.tensor(sizes, device=rows.device)),
                torch.cat([positions for positions, _, _ in entries]),
                torch.cat([features for _, features, _ in entries]),
            ),
            torch.cat([values for _, _, values in entries]),
            (len(self._layers), shape[0], first.shape[0]),
        )
        return sparse, rows

    def _entries(
        self, layer: int, found: _C.SparseFeatures, x: torch.Tensor, at: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A layer's positions, features and activations, ascending; row n of x is at[n]."""
        dtype = self._layers[layer].b_enc().dtype
        counts = found.row_begin.diff()
        rows = torch.arange(len(x), device=x.device).repeat_interleave(
            counts, output_size=len(found.features)
        )
        features, values = found.features, found.activations
        if layer in self._shifts:
            values = values + self._shifts[layer][features]
        kept = None
        if layer in self._shifts or dtype != values.dtype:
            values = values.to(dtype)
            kept = values != 0  # a negative threshold lets 0 pass, and the dtype may not hold less
        more = []
        k = self._weights[layer].k
        if k is not None:
            short = (counts < k) & x.isfinite().all(1)
            kept = ~short[rows] if kept is None else kept & ~short[rows]
            for some in torch.split(short.nonzero().flatten(), self._chunk_size):
                more.append(self._whole_top_k(layer, x, some))
        if kept is not None and not bool(kept.all()):
            rows, features, values = rows[kept], features[kept], values[kept]
        if more:
            rows, features, values = (
                torch.cat(parts) for parts in zip((rows, features, values), *more, strict=True)
            )
            order = torch.argsort(rows * self._weights[layer].W_enc.shape[0] + features)
            rows, features, values = rows[order], features[order], values[order]
        return at[rows], features, values

    def _whole_top_k(
        self, layer: int, x: torch.Tensor, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The k largest of rows that have fewer positive ones: circuit-tracer's TopK keeps negative
        ones too, which the engine does not."""
        weights = self._weights[layer]
        pre = torch.nn.functional.linear(x[rows], weights.W_enc, weights.b_enc)
        values, features = pre.topk(weights.k or 1, dim=-1)
        there = values != 0
        positions = rows[:, None].expand(values.shape)
        return positions[there], features[there], values[there]

    def _build_if_changed(self) -> None:
        tensors = [tensor for encoder in self._layers for tensor in encoder.held()]
        built_of: list[tuple[Any, ...]] = [
            (t.data_ptr(), -1 if t.is_inference() else t._version, t.dtype, t.device)
            for t in tensors
        ]
        activations = [encoder.activation() for encoder in self._layers]
        built_of += [(activation, getattr(activation, "k", None)) for activation in activations]
        if built_of == self._built_of:
            return
        self._weights: dict[int, TranscoderWeights] = {}
        self._shifts: dict[int, torch.Tensor] = {}
        for layer, encoder in enumerate(self._layers):
            self._weights[layer] = self._weights_of(layer, encoder)
        self._encoder = SparseTranscoderEncoder(
            self._weights,
            activation_threshold=0.0,
            chunk_size=self._chunk_size,
            screening=self._screening,
        )
        # Their memory must not be given to others, by whose address they would be known.
        self._alive = [tensor.detach() for tensor in tensors]
        self._built_of = built_of

    def _weights_of(self, layer: int, encoder: _Encoder) -> TranscoderWeights:
        activation = encoder.activation()
        _check_activation(layer, activation)
        W_enc, b_enc = encoder.W_enc().detach(), encoder.b_enc().detach()
        threshold = None
        if isinstance(activation, JumpReLU):
            threshold = encoder.threshold().detach().float().expand(1, W_enc.shape[0])[0]
            if bool((threshold < 0).any()):
                # act - threshold is above 0 where act is above threshold.
                self._shifts[layer] = threshold.clamp(max=0)
                b_enc = b_enc.float() - self._shifts[layer]
                threshold = threshold.clamp(min=0)
        return TranscoderWeights(
            W_enc,
            b_enc,
            layer=layer,
            threshold=None if threshold is None else threshold.contiguous(),
            k=activation.k if isinstance(activation, TopK) else None,
            source=encoder.source,
        )


def _check_activation(layer: int, activation: Any) -> None:
    modules = (JumpReLU, TopK, torch.nn.ReLU)
    if not isinstance(activation, modules) and activation not in RELUS:
        name = getattr(activation, "__name__", type(activation).__name__)
        raise ValueError(f"layer {layer}: activation must be relu, JumpReLU or TopK, got {name}")


def _sparse(
    indices: tuple[torch.Tensor, ...], values: torch.Tensor, shape: tuple[int, ...]
) -> torch.Tensor:
    """Entries that ascend, as a sparse COO tensor."""
    return torch.sparse_coo_tensor(
        torch.stack(indices), values, shape, is_coalesced=True, check_invariants=False
    )


def _parts(layers: torch.Tensor, count: int) -> list[tuple[int, slice]]:
    """Where the entries of each layer are, of ascending ones."""
    ends = torch.bincount(layers, minlength=count).cumsum(0).tolist()
    return [
        (layer, slice(begin, end))
        for layer, (begin, end) in enumerate(itertools.pairwise([0, *ends]))
    ]


def _gather(
    out: torch.Tensor,
    decoder: torch.Tensor | None,
    read: Callable[[torch.Tensor], torch.Tensor],
    features: torch.Tensor,
    activations: torch.Tensor,
) -> None:
    """out[i] = activations[i] * decoder[features[i]]; without a decoder in memory the rows of the
    unique features are read."""
    if decoder is None or decoder.dtype != out.dtype:
        unique, features = torch.unique(features, return_inverse=True)
        decoder = read(unique.cpu()).to(out.dtype)
    torch.index_select(decoder.detach(), 0, features, out=out)
    out.mul_(activations.view(-1, *[1] * (out.ndim - 1)))


def _sums(vectors: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    """[count, H], the sum of the vectors [R, H] of each group."""
    if len(vectors) == 0:
        return vectors.new_zeros(count, vectors.shape[1])
    sizes = torch.bincount(groups, minlength=count)
    return torch.nn.functional.embedding_bag(
        torch.argsort(groups, stable=True), vectors, sizes.cumsum(0) - sizes, mode="sum"
    )
