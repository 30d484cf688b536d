"""The CUDA kernels' logic against the float64 oracle, on any machine: their threads run as CPU threads (tests/cuda_on_cpu)."""

import ctypes
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from oracle import check, make_layer, normal, same_bits
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights

ROOT = Path(__file__).resolve().parent.parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if not (ROOT / "csrc/kernels/select_cuda.cu").exists():
        pytest.skip("the sources are not beside the tests")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    source = (ROOT / "csrc/kernels/select_cuda.cu").read_text()
    launches = re.compile(r"kernel<<<(.*?), threads, 0,.*?>>>\((.*?)\);", re.DOTALL)
    source, found = launches.subn(r"launch(\1, threads, [&] { kernel(\2); });", source)
    assert found == 3
    (folder / "kernels.cpp").write_text(source)
    here = ROOT / "tests/cuda_on_cpu"
    files = [folder / "kernels.cpp", here / "encode.cpp"]
    includes = [f"-I{here}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/kernels'}"]
    command = ["g++", "-std=c++20", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-pthread", *includes, *files]
    subprocess.run([*command, "-o", folder / "kernels.so"], check=True)
    return ctypes.CDLL(str(folder / "kernels.so"))


def pointers(tensors):
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


def encode(kernels, hidden, layer, top_k, tau, chunk, panel, groups):
    """The steps that csrc/encode_cuda.cpp makes, with the per-feature vectors of csrc/layer.cpp."""
    batched = (hidden if hidden.ndim == 3 else hidden[None]).contiguous()
    batch, tokens, size = batched.shape
    W, features = layer["W_enc"].contiguous(), layer["W_enc"].shape[0]
    wide, bias = W.float().contiguous(), layer["b_enc"].float()
    norm = (W.double().norm(dim=1) * (1 + 2**-20)).float().clamp(min=torch.finfo(torch.float32).tiny)
    gate = torch.full((features,), max(tau, 1.4e-45), dtype=torch.float32)
    if "threshold" in layer:
        gate = torch.maximum(gate, torch.nextafter(layer["threshold"].float(), torch.tensor(math.inf)))
    slack = (gate.double().abs() + bias.double().abs()) * 2**-21 + size * 2**-125
    low, high = (gate.double() - bias - slack).float(), (gate.double() - bias + slack).float()
    accumulation = (size + 8) * 2**-22
    roundoff = accumulation / (1 - accumulation) + 2**-9 + 2**-20
    k = min(top_k, features)
    most_active = min(layer.get("k", features), features)
    rows = batch * tokens
    activations, indices, sparsity = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64), torch.empty(rows)
    norms = [t if t is None else t.float() for t in map(layer.get, ("input_bias", "ln_weight", "ln_bias"))]
    integer, real, pointer = ctypes.c_int64, ctypes.c_float, lambda t: ctypes.c_void_p(t.data_ptr())
    kernels.encode(
        *(pointer(batched), DTYPES[batched.dtype], integer(batch), integer(tokens), integer(size)),
        *(pointer(W), DTYPES[W.dtype], pointer(wide), integer(features), pointers([norm, bias, gate, low, high])),
        *(
            pointers(norms),
            real(norm.max()),
            real(bias.abs().max()),
            real(roundoff),
            integer(chunk),
            integer(panel),
            groups,
        ),
        *(
            min(k, most_active),
            integer(most_active),
            integer(k),
            pointer(activations),
            pointer(indices),
            pointer(sparsity),
        ),
    )
    lead = hidden.shape[:-1]
    return {
        "activations": activations.view(*lead, k),
        "indices": indices.view(*lead, k),
        "sparsity": sparsity.view(lead),
    }


@pytest.mark.parametrize(
    "tokens, size, features, top_k, tau, kind, dtype, options",
    [
        (3, 33, 100, 20, 1.0, "relu", torch.float32, (2, 64, 1)),
        (2, 64, 2500, 50, 1.0, "relu", torch.bfloat16, (2, 2500, 2)),
        (3, 40, 1500, 31, 0.0, "jumprelu", torch.float16, (1, 700, 3)),
        (2, 65, 300, 40, 0.0, "topk", torch.float32, (2, 128, 2)),
        (2, 16, 3000, 600, 0.0, "relu", torch.float32, (2, 1500, 1)),  # lists are sorted and cut
        (2, 16, 1100, 1100, 0.5, "relu", torch.float32, (2, 1100, 2)),  # k = F: fillers
        (2, 32, 70, 33, 1e9, "relu", torch.float32, (2, 70, 1)),  # nothing is kept
    ],
)
def test_kernels(kernels, tokens, size, features, top_k, tau, kind, dtype, options):
    layer = make_layer(features, size, kind=kind, dtype=dtype)
    hidden = normal(tokens, size, seed=5).to(dtype)
    got = encode(kernels, hidden, layer, top_k, tau, *options)
    check(got, hidden, layer, top_k, tau)
    weights = TranscoderWeights(**layer)
    cpu = SparseTranscoderEncoder({0: weights}, top_k, tau).encode_layer(0, hidden)
    assert same_bits(got, {name: cpu[name] for name in got}), "the CPU gives other bits"


def test_broken_huge_and_tied_rows(kernels):
    layer = make_layer(200, 32)
    layer["W_enc"][100:] = layer["W_enc"][:100]
    layer["b_enc"][100:] = layer["b_enc"][:100]
    hidden = normal(2, 3, 32, seed=6)
    hidden[0, 1, 3], hidden[1, 0, 0], hidden[1, 2] = math.nan, math.inf, hidden[1, 2] * 1e30
    got = encode(kernels, hidden, layer, 50, 0.0, 4, 100, 2)
    check(got, hidden, layer, 50, 0.0, unit=False)


def test_layer_norm_and_input_bias(kernels):
    layer = make_layer(100, 48, input_bias=normal(48, seed=7), ln_weight=normal(48, seed=8), ln_bias=normal(48, seed=9))
    hidden = normal(3, 48, seed=10)
    check(encode(kernels, hidden, layer, 20, 0.5, 2, 100, 1), hidden, layer, 20, 0.5)
