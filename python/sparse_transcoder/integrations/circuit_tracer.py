"""circuit-tracer on this engine.

Its attribution code (https://github.com/safety-research/circuit-tracer) runs unchanged, without the
dense [positions, features] matrix.
"""

from __future__ import annotations

import torch
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

from ..encoder import SparseTranscoderEncoder
from ..weights import TranscoderWeights

RELUS = (torch.relu, torch.nn.functional.relu)


def on_engine(
    transcoders: TranscoderSet, *, chunk_size: int = 512, screening: str = "auto"
) -> TranscoderSet:
    """The same TranscoderSet, whose ``encode_sparse`` runs on the engine.

    So does ``compute_attribution_components``, which calls it. The set given is left as it is.
    Parameters are shared and must stay on their device. An encoder that circuit-tracer loads lazily
    is read once and held.

    Args:
        transcoders: relu or JumpReLU transcoders.
        chunk_size: see :class:`SparseTranscoderEncoder`.
        screening: see :class:`SparseTranscoderEncoder`.

    Raises:
        TypeError: ``transcoders`` is not a TranscoderSet.
        ValueError: an activation is neither relu nor JumpReLU, or a threshold is negative.

    Example:
        >>> model = ReplacementModel.from_pretrained_and_transcoders(
        ...     "google/gemma-2-2b", on_engine(transcoders)
        ... )
    """
    if not isinstance(transcoders, TranscoderSet):
        name = type(transcoders).__name__
        raise TypeError(f"transcoders must be a circuit-tracer TranscoderSet, got {name}")
    weights = {layer: _weights(layer, transcoder) for layer, transcoder in enumerate(transcoders)}
    encoder = SparseTranscoderEncoder(
        weights, activation_threshold=0.0, chunk_size=chunk_size, screening=screening
    )
    return TranscoderSet(
        {
            layer: EngineTranscoder(transcoder, encoder, layer, weights[layer].W_enc)
            for layer, transcoder in enumerate(transcoders)
        },
        transcoders.feature_input_hook,
        transcoders.feature_output_hook,
        transcoders.scan,
    )


class EngineTranscoder(SingleLayerTranscoder):
    """A view of a SingleLayerTranscoder whose ``encode_sparse`` runs on the engine.

    All else is the transcoder's own.
    """

    def __init__(
        self,
        transcoder: SingleLayerTranscoder,
        encoder: SparseTranscoderEncoder,
        layer: int,
        W_enc: torch.Tensor,
    ) -> None:
        torch.nn.Module.__init__(self)
        self.__dict__.update(transcoder.__dict__)
        self._encoder, self._layer, self._encoder_rows = encoder, layer, W_enc

    def encode_sparse(
        self, input_acts: torch.Tensor, zero_positions: slice = slice(0, 1)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Active features of input_acts [N, H], none of them at ``zero_positions``.

        Returns:
            (activations, a sparse COO tensor [N, F]; their encoder rows [nnz, H]).
        """
        found = self._encoder.encode_sparse(self._layer, input_acts.to(self._encoder_rows.dtype))
        positions = torch.arange(found.shape[0], device=found.device)
        active = torch.ones_like(positions, dtype=torch.bool)
        active[zero_positions] = False
        rows = positions.repeat_interleave(found.crow_indices().diff())
        kept = active[rows]
        features = found.col_indices()[kept]
        acts = torch.sparse_coo_tensor(
            torch.stack((rows[kept], features)),
            found.values()[kept].to(self.dtype),
            tuple(found.shape),
            check_invariants=False,
        ).coalesce()
        return acts, self._encoder_rows[acts.indices()[1]]


def _weights(layer: int, transcoder: SingleLayerTranscoder) -> TranscoderWeights:
    activation = transcoder.activation_function
    threshold = None
    if isinstance(activation, JumpReLU):
        if bool((activation.threshold < 0).any()):
            raise ValueError(
                f"layer {layer}: JumpReLU thresholds must not be negative, "
                f"got {activation.threshold.min()}"
            )
        threshold = activation.threshold.detach().expand(transcoder.d_transcoder).contiguous()
    elif activation not in RELUS and not isinstance(activation, torch.nn.ReLU):
        name = getattr(activation, "__name__", type(activation).__name__)
        raise ValueError(f"layer {layer}: activation must be relu or JumpReLU, got {name}")
    return TranscoderWeights(
        transcoder.W_enc.detach(),
        transcoder.b_enc.detach(),
        layer=layer,
        threshold=threshold,
        source=transcoder.transcoder_path or "",
    )
