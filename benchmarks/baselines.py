"""What the encoder is compared with.

Each contender encodes every layer of a case once, and all see the same numbers.
"""

import contextlib
import importlib.util
import io

import torch
import torch.nn.functional as F

DENSE_BYTES = (
    1 << 30
)  # the dense matrix a baseline may hold; longer inputs go through it in chunks of CHUNK rows
CHUNK = 512


def reference_pipeline(x, W, b, k, threshold):
    """What is usually written: the dense [rows, F] matrix, its threshold, topk, and its mean."""
    act = torch.relu(x @ W.T + b)
    kept = act >= threshold
    values, indices = torch.where(kept, act, 0.0).topk(k, dim=-1)
    return values, indices, kept.float().mean(dim=-1)


def linear_topk(x, W, b, k, threshold):
    """The shortest dense form: no threshold and no sparsity."""
    return F.linear(x, W, b).topk(k, dim=-1)


def product(x, W, b, k, threshold):
    """The matrix product alone: x @ W.T, nothing selected."""
    return F.linear(x, W)


def over_layers(step, rows, layers, k, threshold):
    """A call that runs `step` on each layer, in chunks where the dense matrix is too large."""

    def call():
        results = []
        for x, (W, b) in zip(rows, layers, strict=True):
            whole = x.shape[0] * W.shape[0] * 4 <= DENSE_BYTES
            for part in [x] if whole else x.split(CHUNK):
                result = step(part, W, b, k, threshold)
                # A bare product is dropped chunk by chunk, as nobody could hold it.
                results.append(None if step is product and not whole else result)
        return results

    return call


def sparsify_step():
    """sparsify's fused_encoder: linear, relu, topk; None when it is not installed."""
    if importlib.util.find_spec("sparsify") is None:
        return None
    with contextlib.redirect_stdout(io.StringIO()):  # it prints when it finds no Triton
        from sparsify.fused_encoder import fused_encoder

    def sparsify_fused_encoder(x, W, b, k, threshold):
        return fused_encoder(x, W, b, k, "topk")[:2]

    return sparsify_fused_encoder


def flashinfer_step():
    """linear, then FlashInfer's radix top-k; None when it is not installed or has none."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    import flashinfer

    if not hasattr(flashinfer, "top_k"):
        return None

    def linear_flashinfer_topk(x, W, b, k, threshold):
        return flashinfer.top_k(F.linear(x, W, b), k, sorted=True)

    return linear_flashinfer_topk


def circuit_tracer_step(layers, threshold):
    """circuit-tracer's encode_sparse with its JumpReLU at the threshold, if it is installed.

    It also copies one encoder row for every active feature, which is part of its result.
    """
    if importlib.util.find_spec("circuit_tracer") is None:
        return None
    from circuit_tracer.transcoder import SingleLayerTranscoder
    from circuit_tracer.transcoder.activation_functions import JumpReLU

    coders = {}
    for W, b in layers:
        gate = JumpReLU(torch.tensor(threshold), 1.0)
        coder = SingleLayerTranscoder(W.shape[1], 1, gate, 0, device=W.device, dtype=W.dtype)
        coder.W_enc, coder.b_enc = torch.nn.Parameter(W, False), torch.nn.Parameter(b, False)
        coders[W.data_ptr()] = coder

    def circuit_tracer_encode_sparse(x, W, b, k, threshold):
        return coders[W.data_ptr()].encode_sparse(x, zero_positions=slice(0, 0))

    return circuit_tracer_encode_sparse
