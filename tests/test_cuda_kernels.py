"""The CUDA path against the float64 oracle, on any machine: its threads run as CPU threads."""

import functools
import math
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from oracle import FLOATS, SCREENINGS, check, integers, make_layer, normal, same_bits
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights

ROOT = Path(__file__).resolve().parent.parent
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    if not (ROOT / "csrc/cuda/chunk.cpp").exists():
        pytest.skip("the sources are not beside the tests")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    files = [ROOT / "tests/cuda_on_cpu" / name for name in ("encode.cpp", "streams.cpp")]
    wing = ("backend", "chunk", "streams", "weight_copy")
    files += [ROOT / f"csrc/cuda/{name}.cpp" for name in wing]
    files += [ROOT / f"csrc/{name}.cpp" for name in ("check_weights", "layer", "stamp")]
    steps = ("prepare", "product_few_rows", "product_int8", "product_tensor", "select")
    files += [ROOT / f"csrc/cuda/kernels/{name}.cu" for name in steps]
    places = ("tests/cuda_on_cpu", "csrc", "csrc/include")
    folders = [*(ROOT / place for place in places), TORCH / "include"]
    flags = ["-std=c++20", "-O1", "-fPIC", "-ffp-contract=off", *(f"-I{path}" for path in folders)]

    # A device stops at a vector access that is not aligned, and so does this.
    aligned = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]

    def compiled(file):
        made = folder / f"{file.parent.name}_{file.stem}.o"
        options = [*flags, *(aligned if file.suffix == ".cu" else [])]
        subprocess.run(["g++", *options, "-xc++", "-c", file, "-o", made], check=True)
        return made

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, files))
    libraries = [TORCH / "lib/libtorch_cpu.so", TORCH / "lib/libc10.so"]
    made = folder / "cuda_on_cpu.so"
    command = ["g++", "-shared", "-pthread", "-Wl,-Bsymbolic", *objects, *libraries, "-o", made]
    subprocess.run(command, check=True)
    torch.ops.load_library(made)
    return torch.ops.cuda_on_cpu


def encode(
    kernels, hidden, layer, top_k, tau, screening="auto", chunk=8, scores=512, room=64, lists=256
):
    """The result of the CUDA path with buffers of these sizes.

    scores: the floats of a tile. room: the room of a list beyond what is gated at a time. lists:
    the number of all lists; a row has several if it can.
    """
    batched = hidden if hidden.ndim == 3 else hidden[None]
    fields = [layer.get(name) for name in ("threshold", "k", "input_bias", "ln_weight", "ln_bias")]
    options = (top_k, tau, SCREENINGS.index(screening), chunk, scores, room, lists)
    values, ids, sparsity = kernels.encode(
        batched, layer["W_enc"], layer["b_enc"], *fields, *options
    )
    k, lead = values.shape[-1], hidden.shape[:-1]
    return {
        "activations": values.view(*lead, k),
        "indices": ids.view(*lead, k),
        "sparsity": sparsity.view(lead),
    }


def check_bits(got, hidden, layer, top_k, tau):
    check(got, hidden, layer, top_k, tau)
    encoder = SparseTranscoderEncoder({0: TranscoderWeights(**layer)}, top_k, tau)
    cpu = encoder.encode_layer(0, hidden)
    assert same_bits(got, {name: cpu[name] for name in got}), "the CPU gives other bits"


@pytest.mark.parametrize(
    "tokens, size, features, top_k, tau, kind, dtype, options",
    [
        # At most 8 rows: no matrix product.
        (1, 33, 5000, 20, 1.0, "relu", torch.float32, {"scores": 5000}),
        (2, 64, 2500, 50, 1.0, "jumprelu", torch.bfloat16, {}),
        (5, 40, 300, 31, 0.0, "topk", torch.float16, {"chunk": 3}),
        (8, 65, 200, 32, 0.5, "relu", torch.float32, {"screening": "off"}),
        # The second tile is a multiple of four features and does not begin at one.
        (3, 40, 302, 20, 0.5, "relu", torch.float32, {"scores": 510}),
        # Screened in bfloat16, from a copy where there must be one.
        (9, 33, 300, 20, 1.0, "relu", torch.float32, {}),
        (12, 64, 700, 33, 0.5, "jumprelu", torch.bfloat16, {"chunk": 5, "scores": 1000}),
        (9, 40, 200, 8, 0.0, "topk", torch.float16, {}),
        # On tensor cores: rows and features that do not fill a block, inputs that do not fill a
        # stage, tiles, chunks, one row more than there may be.
        (9, 64, 300, 20, 1.0, "relu", torch.bfloat16, {"chunk": 64}),
        (16, 72, 131, 20, 0.5, "jumprelu", torch.float16, {"chunk": 16, "scores": 999}),
        (17, 200, 128, 20, 0.5, "relu", torch.float32, {"chunk": 17, "scores": 9999}),
        (33, 8, 500, 33, 0.0, "topk", torch.bfloat16, {"chunk": 64, "scores": 9999}),
        (63, 136, 257, 20, 0.5, "relu", torch.bfloat16, {"chunk": 64, "scores": 99999}),
        (64, 320, 120, 20, 0.5, "relu", torch.float32, {"chunk": 40}),
        (65, 64, 130, 20, 0.5, "relu", torch.bfloat16, {"chunk": 128}),
        # In float32, with products as coarse as TF32's.
        (9, 48, 300, 20, 1.0, "relu", torch.float32, {"screening": "off"}),
        (9, 40, 200, 20, 0.5, "relu", torch.bfloat16, {"screening": "off", "scores": 2000}),
        # In int8: inputs up to whole groups and beyond, tiles, chunks, more rows than it takes.
        (1, 33, 700, 20, 1.0, "relu", torch.float32, {"screening": "int8"}),
        (2, 128, 515, 50, 1.0, "jumprelu", torch.bfloat16, {"screening": "int8"}),
        (3, 129, 302, 20, 0.5, "relu", torch.float32, {"screening": "int8", "scores": 510}),
        (4, 520, 190, 20, 0.5, "jumprelu", torch.float16, {"screening": "int8"}),
        (5, 256, 300, 31, 0.0, "topk", torch.float16, {"screening": "int8", "chunk": 3}),
        (8, 1030, 131, 131, 0.5, "relu", torch.bfloat16, {"screening": "int8", "scores": 9999}),
        (9, 65, 300, 20, 0.5, "relu", torch.float32, {"screening": "int8", "chunk": 16}),
        (31, 200, 140, 20, 0.5, "topk", torch.float16, {"screening": "int8", "chunk": 64}),
        (64, 300, 129, 9, 0.5, "jumprelu", torch.bfloat16, {"screening": "int8", "chunk": 64}),
        (65, 40, 129, 20, 0.5, "relu", torch.float32, {"screening": "int8", "chunk": 33}),
        # k = F, and nothing at all.
        (3, 16, 1100, 1100, 0.5, "relu", torch.float32, {"scores": 4000}),
        (9, 32, 70, 33, 1e9, "relu", torch.bfloat16, {}),
    ],
)
def test_kernels(kernels, tokens, size, features, top_k, tau, kind, dtype, options):
    layer = make_layer(features, size, kind=kind, dtype=dtype)
    hidden = normal(tokens, size, seed=5).to(dtype)
    check_bits(encode(kernels, hidden, layer, top_k, tau, **options), hidden, layer, top_k, tau)


@pytest.mark.parametrize(
    "tokens, lists, screening",
    [(1, 256, "auto"), (2, 1, "auto"), (9, 1, "auto"), (1, 256, "int8"), (2, 1, "int8")],
)
@pytest.mark.parametrize("room", [40, 1100])
@pytest.mark.parametrize("order", ["random", "ascending", "descending, the k-th last"])
def test_lists_that_are_full(kernels, tokens, lists, screening, room, order):
    """About half of the features are active: lists are thinned again and again, and joined."""
    layer = make_layer(4500, 16)
    hidden = normal(1, 16, seed=5).repeat(tokens, 1)
    if order != "random":
        ranks = (hidden[0].double() @ layer["W_enc"].double().T + layer["b_enc"]).argsort()
        if order != "ascending":
            ranks = ranks.flip(0)
            ranks = torch.cat([ranks[:19], ranks[20:], ranks[19:20]])
        layer = {name: tensor[ranks].contiguous() for name, tensor in layer.items()}
    options = {"scores": 4500 * tokens, "room": room, "lists": lists, "screening": screening}
    check_bits(encode(kernels, hidden, layer, 20, 0.0, **options), hidden, layer, 20, 0.0)


@pytest.mark.parametrize("tokens, lists", [(2, 256), (2, 1), (9, 1)])
def test_features_at_their_gate_are_computed_when_lists_are_full(kernels, tokens, lists):
    """Thinning cannot drop them: each must be counted."""
    layer = make_layer(2500, 16)
    layer["W_enc"][:] = layer["W_enc"][:2].repeat(1250, 1)
    hidden = normal(tokens, 16, seed=5)
    layer["b_enc"] = torch.zeros(2500)
    layer["threshold"] = (hidden[0].double() @ layer["W_enc"].double().T).float()
    layer["threshold"][::2] -= 1e-7
    options = {"scores": 2300 * tokens, "room": 16, "lists": lists}
    check_bits(encode(kernels, hidden, layer, 10, 0.0, **options), hidden, layer, 10, 0.0)


@pytest.mark.parametrize("tokens, screening", [(3, "auto"), (9, "auto"), (3, "int8")])
def test_broken_huge_and_tied_rows(kernels, tokens, screening):
    layer = make_layer(200, 32)
    layer["W_enc"][100:] = layer["W_enc"][:100]
    layer["b_enc"][100:] = layer["b_enc"][:100]
    layer["W_enc"][50] = 0
    layer["W_enc"][51] *= 1e-41
    hidden = normal(2, tokens, 32, seed=6)[:, :, ::2].repeat(1, 1, 2)
    hidden[0, 1, 3], hidden[1, 0, 0] = math.nan, math.inf
    hidden[1, 1], hidden[0, 0], hidden[1, 2] = hidden[1, 1] * 1e30, hidden[0, 0] * 1e-41, 0
    got = encode(kernels, hidden, layer, 50, 0.0, screening, chunk=4)
    check(got, hidden, layer, 50, 0.0, unit=False)


@pytest.mark.parametrize(
    "scale, weights",
    [(1e-40, 1), (1e-33, 1), (1e-4, 1), (1e4, 1), (3e35, 1), (3e35, 1e-28), (1, 1e-28)],
)
def test_int8_gives_the_bits_of_the_cpu_at_any_scale(kernels, scale, weights):
    layer = make_layer(150, 200)
    layer["W_enc"][140:] = layer["W_enc"][:10]
    layer["b_enc"] = torch.full((150,), -scale * weights)
    hidden = normal(4, 200, seed=5) * scale
    hidden[1] = 14 * layer["W_enc"][5] * scale  # the largest sums there are
    hidden[2] = 0
    hidden[3, :2] *= 3
    layer["W_enc"] *= weights
    got = encode(kernels, hidden, layer, 20, 0.0, "int8")
    encoder = SparseTranscoderEncoder({0: TranscoderWeights(**layer)}, 20, 0.0)
    want = encoder.encode_layer(0, hidden)
    assert same_bits(got, {name: want[name] for name in got})
    assert (got["activations"][[0, 1, 3], :2] > 0).all()


def test_weights_that_are_not_aligned(kernels):
    """Tensor cores cannot read them."""
    layer = make_layer(150, 64, dtype=torch.bfloat16)
    moved = torch.cat([torch.zeros(1).bfloat16(), layer["W_enc"].flatten()])
    layer["W_enc"] = moved[1:].view(150, 64)
    assert layer["W_enc"].data_ptr() % 16 != 0
    hidden = normal(20, 64, seed=5)
    check_bits(encode(kernels, hidden, layer, 10, 0.5, chunk=64), hidden, layer, 10, 0.5)


@pytest.mark.parametrize("tokens", [3, 9])
@pytest.mark.parametrize("lost_by", ["rows", "weights", "sums"])
def test_margins_hold_at_their_worst(kernels, tokens, lost_by):
    """Each feature is active by a hair.

    What bfloat16 takes from a row lies along the weights, or the reverse, or all terms of a sum
    have one sign.
    """
    size, tau = 64, 1.0
    x = normal(tokens, size, seed=3)
    W = (x - x.bfloat16().float()).sign() * 0.25  # exact in bfloat16
    if lost_by == "weights":
        x, W = W, x
    if lost_by == "sums":
        x, W = torch.full((tokens, size), 0.5), torch.full((tokens, size), 0.25)
    exact = (x.double() * W.double()).sum(1)
    layer = {
        "W_enc": torch.cat([W, -W]),
        "b_enc": torch.cat([tau - exact + 1e-5, tau + exact + 1e-5]).float(),
    }
    check_bits(encode(kernels, x, layer, 4, tau), x, layer, 4, tau)


def test_any_strides(kernels):
    layer = make_layer(100, 24)
    hidden = normal(24, 3, 8, seed=6).permute(2, 1, 0)
    check_bits(encode(kernels, hidden, layer, 10, 0.5), hidden, layer, 10, 0.5)


@pytest.mark.parametrize("tokens, screening", [(3, "auto"), (9, "auto"), (3, "int8")])
def test_layer_norm_and_input_bias(kernels, tokens, screening):
    fields = {
        "input_bias": normal(48, seed=7),
        "ln_weight": normal(48, seed=8),
        "ln_bias": normal(48, seed=9),
    }
    layer = make_layer(100, 48, **fields)
    hidden = normal(tokens, 48, seed=10)
    got = encode(kernels, hidden, layer, 20, 0.5, screening, chunk=4)
    check(got, hidden, layer, 20, 0.5)


# The int8 screen


@functools.cache
def signs(size):
    """The signs that R flips, in float64."""
    hashed = [i * 0x9E3779B1 & 0xFFFFFFFF for i in range(size)]
    hashed = [(h ^ h >> 15) * 0x85EBCA77 for h in hashed]
    return torch.tensor([-1.0 if h & 0x80000000 else 1.0 for h in hashed], dtype=torch.float64)


def mixed(rows):
    """The product with Hadamard's matrix, 128 inputs at a time."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < 128:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (rows.view(len(rows), -1, 128) @ matrix).view(len(rows), -1)


def errors_of(W):
    """What int8 takes from rotated weights, [F, inputs]."""
    size = W.shape[1]
    z = mixed(torch.nn.functional.pad(W.double() * signs(size), (0, -size % 128)))
    scale = (z.abs().amax(1, keepdim=True) / 127).float().double()
    return z - scale * (z / scale).round()


def unrotated(y, size):
    return (mixed(y.double())[:, :size] * signs(size) / 128).float()


def draw(kind, size, features, seed):
    """Rows [64, size] and weights [features, size] that are hard for the screen."""
    x, W = normal(64, size, seed=seed), normal(features, size, seed=seed + 1)
    inputs = (size + 127) // 128 * 128
    if kind == "heavy tails":
        x, W = x**5, W**5
    if kind == "one large input":
        x[:, 3] *= 1e4
        W[::2, 5] *= 1e3
    if kind == "weights' errors":  # rows that lie along what int8 takes from a feature
        x = unrotated(errors_of(W)[:64], size)
    if kind == "rows' errors":  # one large number, whose scale takes all others from the row
        y = torch.full((64, inputs), 0.45 / 32512)
        y[:, 0] = torch.arange(1, 65)
        y[:, 1:] *= y[:, :1]
        z = torch.ones(features, inputs)
        z[:, 0] = 0
        x, W = unrotated(y, size), unrotated(z, size)
    if kind == "largest sums":
        z = torch.ones(features, inputs)
        z[1::2, 1:] = 0
        x, W = unrotated(torch.ones(64, inputs), size), unrotated(z, size)
        x[::2] *= -1
    if kind == "any scale":
        powers = integers(64 + features, 1, low=-30, high=15, seed=seed)
        x, W = x * 10 ** powers[:64], W * 10 ** powers[64:]
    if kind == "below the normal range":
        x *= 1e-39
    return x, W


@pytest.mark.parametrize(
    "kind",
    [
        "gaussian",
        "heavy tails",
        "one large input",
        "weights' errors",
        "rows' errors",
        "largest sums",
        "any scale",
        "below the normal range",
    ],
)
@pytest.mark.parametrize(
    "size, rows",
    [(40, 1), (200, 2), (640, 4), (1024, 8), (40, 9), (640, 16), (200, 33), (1024, 64), (65536, 3)],
)
def test_int8_scores_stay_within_their_margins(kernels, kind, size, rows):
    for seed in (0, 10) if size <= 1024 else (0,):
        x, W = draw(kind, size, 70 if size <= 1024 else 8, seed)
        x = x[:rows].contiguous()
        scores, margin = kernels.int8_scores(x, W, rows > 8)
        off = (scores.double() - x.double() @ W.double().T).abs()
        norms = x.double().norm(dim=1, keepdim=True) * W.double().norm(dim=1)
        worst = (off / (margin + (size + 128) * 2.0**-124)).max()
        assert scores.isfinite().all() and margin.isfinite().all()
        assert worst <= 1, f"{worst:.3f} of the margin"
        if kind == "gaussian":
            assert (margin <= (0.02 if size <= 1024 else 0.05) * norms).all()
            assert worst > 0.05 or size > 1024
        if kind == "below the normal range":  # such rows are all error
            assert (margin <= 200 * norms).all()
        if kind in ("weights' errors", "rows' errors") and size in (640, 1024):
            assert worst > 0.9, f"the margin could be {worst:.3f} of what it is"


def planes_of(q):
    """The high and the low byte of q, which is 256 times the first plus the second."""
    high = (q + 128) >> 8
    return high.to(torch.int8), (q - 256 * high).to(torch.int8)


def check_int8_product(kernels, q, p, first, tensor_cores):
    """Scores of integers q [rows, inputs] and p [F, inputs], bit for bit."""
    rows, features = len(q), len(p) - first
    row_scale, scale = normal(rows, seed=1).abs(), normal(len(p), seed=2).abs() / 128
    got = kernels.int8_product(
        *planes_of(q), row_scale, p.to(torch.int8), scale, first, tensor_cores
    )
    exact = q.long() @ p[first:].long().T
    assert exact.abs().max() < 2**31
    want = exact.float() * row_scale[:, None] * scale[first:]
    assert torch.equal(got[:-1].view(rows, features), want)
    assert got[-1] == -1, "written beyond the end"


@pytest.mark.parametrize(
    "rows, inputs, features, first",
    [
        (9, 128, 128, 0),
        (16, 256, 131, 3),
        (17, 384, 127, 0),
        (32, 640, 260, 129),
        (33, 1152, 40, 1),
        (63, 128, 129, 0),
        (64, 512, 257, 128),
        (3, 640, 257, 128),
        (5, 128, 129, 0),
        (20, 384, 1000, 1),  # so many blocks that three at once are better than two
    ],
)
@pytest.mark.parametrize("tensor_cores", [False, True])
def test_int8_products_are_exact(kernels, rows, inputs, features, first, tensor_cores):
    if rows > 8 and not tensor_cores:
        rows = 8
    q = integers(rows, inputs, low=-32512, high=32513, seed=3).long()
    p = integers(features, inputs, low=-127, high=128, seed=4).long()
    q[rows // 2], p[features // 2] = 0, 0
    q[-1], p[-1] = 32512, torch.arange(inputs) % 3 - 1
    check_int8_product(kernels, q, p, first, tensor_cores)


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_int8_sums_may_leave_int32_on_the_way(kernels, tensor_cores):
    """The longest rows: sums of high bytes, shifted, wrap around, and what they end at does not."""
    inputs, rows = 1 << 16, 9 if tensor_cores else 8
    q = torch.full((rows, inputs), 32512)
    q[:, inputs // 2 :] *= -1
    q[1] *= -1
    q[2, ::2] *= -1
    q[3] = 258  # the sum is 127 * 258 * 2^16, just below 2^31
    q[4] = -258
    q[5] = -128  # whose high byte is 0
    p = torch.full((3, inputs), 127)
    p[1] = -127
    p[2] = integers(inputs, low=-127, high=128, seed=4).long()
    p[2, inputs // 2 :] = p[2, : inputs // 2]
    check_int8_product(kernels, q, p, 0, tensor_cores)


# The bfloat16 screen on tensor cores


@pytest.mark.parametrize("kind", ["random", "same sign", "cancelling", "one large product"])
@pytest.mark.parametrize(
    "rows, size, features, first",
    [
        (5, 264, 129, 0),
        (9, 8, 128, 0),
        (16, 40, 131, 3),
        (17, 72, 260, 129),
        (33, 1000, 40, 0),
        (64, 264, 257, 128),
        (50, 264, 1000, 1),  # so many blocks that three at once are better than two
    ],
)
def test_bfloat16_products_stay_within_their_bound(kernels, kind, rows, size, features, first):
    x, W = normal(rows, size, seed=1), normal(features, size, seed=2)
    if kind == "same sign":
        x, W = x.abs() + 0.1, W.abs() + 0.1
    if kind == "cancelling":
        half = size // 2
        x[:, half:], W[:, half:] = x[:, :half], -W[:, :half]
    if kind == "one large product":  # to which all the others are aligned
        x[:, 0], W[:, 0] = 1e4, 1e4
    x, W = x.bfloat16(), W.bfloat16()
    got = kernels.bf16_product(x, W, first)
    assert got[-1] == -1, "written beyond the end"
    x, W = x.double(), W[first:].double()
    off = (got[:-1].view(rows, features - first).double() - x @ W.T).abs()
    bound = (size // 16 + 84) * 2.0**-24 * (x.abs() @ W.abs().T)
    worst = (off / bound).max().item()
    assert worst <= 1, f"{worst:.3f} of the bound"
    if kind == "one large product" and size < 300:
        assert worst > 0.7, "the simulation is not at its worst"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("screening", SCREENINGS)
def test_bytes_of_the_screening_copies(kernels, dtype, screening):
    bf16 = 2 * (screening != "off" and dtype != torch.bfloat16)
    shapes = [(50, 130, False)]
    if (dtype, screening) in ((torch.bfloat16, "auto"), (torch.bfloat16, "int16")):
        shapes += [(1 << 17, 128, True), ((1 << 17) - 1, 128, False)]
    for features, size, large in shapes:
        W = torch.zeros(features, size, dtype=dtype)
        copy, weights = features * (-(-size // 128) * 128), features * size
        without_int8 = W.nbytes + bf16 * weights
        for room in (-1, 1 << 40, without_int8, 0):
            int8 = screening == "int8" or (screening == "auto" and large and room < 0)
            fits = room < 0 or room >= without_int8 + copy * int8
            want = (bf16 * weights + (copy + 8 * features) * int8) * fits
            got = kernels.screening_bytes(W, SCREENINGS.index(screening), room)
            assert got == want, (features, size, room)


@pytest.mark.parametrize("screening", SCREENINGS)
def test_out_of_memory_while_a_layer_is_prepared(kernels, screening):
    """Whichever tensor finds no room: one line, or no int8 copy with "auto"."""
    large = screening == "auto"  # which makes an int8 copy of large layers alone
    W, where = torch.zeros(1 << 17 if large else 50, 128), SCREENINGS.index(screening)
    whole, found = kernels.screening_bytes(W, where, -1), set()
    for failing in (0, 256, 4096) if large else range(150):
        try:
            found.add(kernels.screening_bytes(W, where, -1, failing))
        except torch.OutOfMemoryError as error:
            text = str(error).splitlines()[0]
            assert re.match(r"layer 0: out of memory: .* \d+ bytes on cpu, .* \"int16\"", text), (
                text
            )
            found.add("error")
    assert found == {"error", whole, *([2 * W.numel()] if large else [])}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("kind, tokens, chunk", [("relu", 3, 2), ("topk", 10, 4), ("relu", 10, 64)])
def test_every_kept_feature(kernels, kind, tokens, chunk, streamed):
    layer = make_layer(300, 24, kind=kind)
    hidden = normal(1, tokens, 24, seed=5)
    hidden[0, 1], hidden[0, 2, 3] = 0.0, math.nan
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN and the largest integers
    try:
        assert torch.empty(3).isnan().all()
        begin, features, values = kernels.encode_sparse(
            hidden, layer["W_enc"], layer["b_enc"], layer.get("k"), 0.5, chunk, streamed
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert begin[0] == 0 and begin[-1] == len(features) == len(values)
    counts = begin.diff()
    rows = torch.arange(tokens).repeat_interleave(counts)
    assert all((part.diff() > 0).all() for part in features.split(counts.tolist())), (
        "not ascending in a row"
    )
    assert features[rows == 2].tolist() == [0] and values[rows == 2].isnan().all()
    dense = torch.zeros(tokens, 300).index_put((rows, features), values)
    activations, indices = dense.sort(dim=-1, descending=True, stable=True)
    activations[2], indices[2] = math.nan, torch.arange(300)
    sparsity = (counts.double() / 300).float()
    sparsity[2] = math.nan
    got = {"activations": activations, "indices": indices, "sparsity": sparsity}
    check(got, hidden[0], layer, 300, 0.5)


@pytest.mark.parametrize("top_k", [5, 300])
@pytest.mark.parametrize("kind, tokens, chunk", [("relu", 3, 2), ("topk", 10, 4), ("relu", 10, 64)])
def test_the_strongest_features_in_small_types(kernels, kind, tokens, chunk, top_k):
    layer = make_layer(300, 24, kind=kind)
    hidden = normal(1, tokens, 24, seed=5)
    hidden[0, 1], hidden[0, 2, 3] = 0.0, math.nan
    layer["b_enc"][7] = 7e4  # its activation is more than float16 holds
    begin, features, values = kernels.encode_into(
        hidden, layer["W_enc"], layer["b_enc"], layer.get("k"), 0.5, chunk, top_k
    )
    assert features.dtype == torch.uint16 and values.dtype == torch.float16
    activations, indices, _ = encode(kernels, hidden[0], layer, top_k, 0.5).values()
    for row in range(tokens):
        got = slice(int(begin[row]), int(begin[row + 1]))
        if row == 2:
            assert features[got].tolist() == [0] and values[got].isnan().all()
            continue
        kept = activations[row] > 0
        order = indices[row][kept].sort()
        assert features[got].tolist() == order.values.tolist()
        want = activations[row][kept][order.indices].clamp(max=65504).half()
        assert torch.equal(values[got], want) and bool(kept.any())


# Streams: work runs in an order drawn by lot among those that events allow


@pytest.mark.parametrize("seed, screening", [(0, "auto"), (1, "auto"), (2, "int8"), (3, "int8")])
@pytest.mark.parametrize(
    "rows, size, streamed, use_graphs, failing",
    [
        ([2, 2, 2, 2], 16, [0, 0, 0], True, None),  # seen, made, replayed
        ([1, 2, 1, 2, 1], 16, [0, 0, 0], True, None),
        ([2, 2], 16, [0, 0, 0], False, None),
        ([11, 3, 11, 11], 16, [0, 0, 0], True, None),  # three chunks per layer
        ([9, 2], 16, [1, 1, 1], True, None),
        # Inputs that are no multiple of eight: products of torch's from nine rows on.
        ([11, 3, 11], 20, [0, 0, 0], True, None),
        ([9, 2], 20, [1, 1, 1], True, None),
        ([2, 9, 2], 20, [0, 1, 1], False, None),
        ([9, 9], 20, [0, 1, 1], True, 5),  # the first call fails when most of it is under way
    ],
)
def test_streams(kernels, rows, size, streamed, use_graphs, failing, seed, screening):
    layers = [make_layer(features, size, seed=10 * features) for features in (40, 64, 30)]
    for layer in layers:
        layer["b_enc"][:] = 0
    hidden = [
        normal(count, size, seed=100 * call + i)[None]
        for call, count in enumerate(rows)
        for i in range(len(layers))
    ]
    callers = [call % 2 + 1 for call in range(len(rows))]
    weights = [layer["W_enc"] for layer in layers]
    got = kernels.encode_calls(
        weights,
        streamed,
        hidden,
        callers,
        5,
        4,
        use_graphs,
        seed,
        -1 if failing is None else failing,
        SCREENINGS.index(screening),
    )
    for i, x in enumerate(hidden):
        if failing is not None and i < len(layers):
            continue
        values, ids, sparsity = got[3 * i : 3 * i + 3]
        result = {"activations": values[None], "indices": ids[None], "sparsity": sparsity[None]}
        check(result, x, layers[i % len(layers)], 5, 0.0)


@pytest.mark.parametrize(
    "rows, size, screening, replayed",
    [
        (9, 16, "int16", True),
        (64, 16, "int16", True),
        (65, 16, "int16", False),
        (9, 20, "int16", False),
        (9, 16, "off", False),
        (8, 20, "off", True),
        (64, 20, "int8", True),
        (65, 20, "int8", False),
    ],
)
def test_calls_without_products_of_torchs_are_replayed(kernels, rows, size, screening, replayed):
    layer = make_layer(30, size)
    layer["b_enc"][:] = 0
    hidden = [normal(rows, size, seed=call)[None] for call in range(3)]
    kernels.fail_graphs(0)
    options = (5, 64, True, 1, -1, SCREENINGS.index(screening))
    got = kernels.encode_calls([layer["W_enc"]], [0], hidden, [1] * 3, *options)
    assert kernels.launched_graphs() == 2 * replayed
    for i, x in enumerate(hidden):
        names = ("activations", "indices", "sparsity")
        check({name: got[3 * i + n][None] for n, name in enumerate(names)}, x, layer, 5, 0.0)


@pytest.mark.parametrize(
    "dtype, size, rows, input_bias, screening, few, tensor, first",
    [
        (torch.bfloat16, 64, torch.bfloat16, False, "int16", "few_rows", "tensor_bf16", 5),
        (torch.float32, 64, torch.bfloat16, False, "int16", "few_rows", "tensor_bf16", 5),
        # Rows that must be rounded.
        (torch.bfloat16, 64, torch.float32, False, "int16", "few_rows", "tensor_bf16", 9),
        (torch.bfloat16, 64, torch.bfloat16, True, "int16", "few_rows", "tensor_bf16", 9),
        # A row's bytes are no multiple of 16.
        (torch.bfloat16, 65, torch.bfloat16, False, "int16", "few_rows", "library", 9),
        (torch.float32, 64, torch.bfloat16, False, "off", "few_rows", "library", 9),
        (torch.float16, 65, torch.float32, True, "int8", "few_rows_int8", "tensor_int8", 5),
    ],
)
def test_what_multiplies(kernels, dtype, size, rows, input_bias, screening, few, tensor, first):
    names = ("few_rows", "few_rows_int8", "tensor_bf16", "tensor_int8", "library")
    counts = (1, 4, 5, 8, 9, 64, 65)
    W, hidden = torch.zeros(130, size, dtype=dtype), torch.zeros(1, size, dtype=rows)
    bias = torch.zeros(size) if input_bias else None
    for have in (True, False):
        got = kernels.products(W, bias, SCREENINGS.index(screening), have, hidden, counts)
        begin, last = (first, 64) if have else (9, 0)
        want = [few if n < begin else tensor if n <= last else "library" for n in counts]
        assert [names[n] for n in got] == want


@pytest.mark.parametrize("screening", ["int16", "int8"])
def test_a_device_without_tensor_cores(kernels, screening):
    layer = make_layer(130, 64, dtype=torch.bfloat16)
    layer["b_enc"][:] = 0
    launches = []
    for rows, have in ((8, False), (9, False), (9, True)):
        hidden = [normal(rows, 64, seed=call)[None] for call in range(2)]
        options = (5, 64, True, 1, -1, SCREENINGS.index(screening))
        kernels.fail_graphs(0)
        kernels.set_tensor_cores(have)
        got = kernels.encode_calls([layer["W_enc"]], [0], hidden, [1, 1], *options)
        kernels.set_tensor_cores(True)
        launches.append(kernels.launched_graphs())
        for i, x in enumerate(hidden):
            names = ("activations", "indices", "sparsity")
            check({name: got[3 * i + n][None] for n, name in enumerate(names)}, x, layer, 5, 0.0)
    assert launches == [1, 0, 1]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "dtype, screening, streamed, failing",
    [
        (torch.bfloat16, "auto", False, None),
        (torch.float32, "auto", False, None),
        (torch.float16, "off", False, None),  # widened tiles
        (torch.float16, "off", True, None),
        (torch.bfloat16, "auto", True, None),
        (torch.bfloat16, "auto", False, 2),  # a tile of the first call, on either stream
        (torch.bfloat16, "auto", True, 3),
    ],
)
def test_tiles_of_a_single_chunk(kernels, dtype, screening, streamed, failing, seed):
    """They take turns on two streams: one selects while the other multiplies."""
    layer = make_layer(120 + seed % 2 * 30, 16, dtype=dtype)  # 4 tiles, or 5
    layer["b_enc"][:] = 0
    rows = [9, 10, 9]
    hidden = [normal(count, 16, seed=call)[None] for call, count in enumerate(rows)]
    kernels.set_tensor_cores(False)  # so that these rows have torch's product
    got = kernels.encode_tiles(
        layer["W_enc"],
        streamed,
        hidden,
        [call % 2 + 1 for call in range(len(rows))],
        5,
        300,
        seed,
        -1 if failing is None else failing,
        SCREENINGS.index(screening),
    )
    kernels.set_tensor_cores(True)
    for call, x in enumerate(hidden):
        if failing is not None and call == 0:
            continue
        values, ids, sparsity = got[3 * call : 3 * call + 3]
        result = {"activations": values[None], "indices": ids[None], "sparsity": sparsity[None]}
        check(result, x, layer, 5, 0.0)


def test_graphs_that_cannot_be_made(kernels):
    """Such calls are enqueued as they are; after three failures a shape is not tried again."""
    layer, calls = make_layer(64, 16), 8
    layer["b_enc"][:] = 0
    hidden = [normal(2, 16, seed=call)[None] for call in range(calls)]
    launches = []
    for failures in (0, 1, 3, 0):
        kernels.fail_graphs(failures)
        got = kernels.encode_calls([layer["W_enc"]], [0], hidden, [1] * calls, 5, 4, True, 1, -1, 3)
        launches.append(kernels.launched_graphs())
        for i, x in enumerate(hidden):
            names = ("activations", "indices", "sparsity")
            found = {name: got[3 * i + n][None] for n, name in enumerate(names)}
            check(found, x, layer, 5, 0.0)
    assert launches[0] > 3 and launches == [launches[0], launches[0] - 1, 0, launches[0]]


# The int8 screen on trial: "auto" leaves it where features crowd at their gates


def crowded_layer(size=128, crowd=250, others=50):
    """A layer without a bias, of which `crowd` features are near copies of one direction."""
    W = normal(crowd + others, size, seed=1) / math.sqrt(size)
    W[:crowd] = 1 / math.sqrt(size) + 1e-3 * W[:crowd]
    return {"W_enc": W, "b_enc": torch.zeros(len(W))}


def crowded_rows(tokens, size=128, seed=5):
    """Rows for which these features are at a gate of 1."""
    return (1 + 1e-4 * normal(tokens, size, seed=seed)) / math.sqrt(size)


def planted_rows(layer, tokens, crowd=250, seed=5):
    """Rows of a few other features of the layer, well above a gate of 1."""
    W = layer["W_enc"][crowd:]
    x = sum(3 * W[integers(tokens, low=0, high=len(W), seed=seed + i).long()] for i in range(3))
    return x - x.mean(1, keepdim=True)


def encode_on_trial(kernels, layers, calls, period, use_graphs=True, seed=1, chunk=64, **options):
    """Checks every result. [calls, layers] screened in int8, candidates [calls, layers, 64]."""
    hidden = [rows[None] for call in calls for rows in call]
    weights = [layer["W_enc"] for layer in layers]
    got, seen = kernels.encode_on_trial(
        weights, hidden, 5, 1.0, chunk, use_graphs, seed, period, **options
    )
    for i, x in enumerate(hidden):
        values, ids, sparsity = got[3 * i : 3 * i + 3]
        result = {"activations": values[None], "indices": ids[None], "sparsity": sparsity[None]}
        check(result, x, layers[i % len(layers)], 5, 1.0)
    return seen[..., 0] > 0, seen[..., 1:]


@pytest.mark.parametrize("tokens, period", [(1, 6), (9, 3)])
@pytest.mark.parametrize("use_graphs", [True, False])
def test_crowded_rows_leave_the_int8_screen_and_try_it_again(kernels, tokens, period, use_graphs):
    layer, count = crowded_layer(), 2 * period + 2
    calls = [[crowded_rows(tokens, seed=call)] for call in range(count)]
    kernels.fail_graphs(0)
    used, _ = encode_on_trial(kernels, [layer], calls, period, use_graphs)
    assert used[:, 0].nonzero().flatten().tolist() == [0, period, 2 * period]
    # The first call of either screen is enqueued as it is.
    assert kernels.launched_graphs() == (count - 2 if use_graphs else 0)


def test_int8_by_choice_is_never_left(kernels):
    calls = [[crowded_rows(2, seed=call)] for call in range(4)]
    used, _ = encode_on_trial(kernels, [crowded_layer()], calls, 0)
    assert used.all()


def test_rows_that_no_longer_crowd_come_back_for_good(kernels):
    layer = crowded_layer()
    calls = [[crowded_rows(1)]] + [[planted_rows(layer, 1, seed=9 * call)] for call in range(16)]
    used, _ = encode_on_trial(kernels, [layer], calls, 6)
    assert used[:, 0].tolist() == [True] + 5 * [False] + 11 * [True]


def test_one_crowded_row_now_and_then_is_not_enough(kernels):
    layer, crowded = crowded_layer(crowd=200, others=100), {1, 30}
    calls = [
        [crowded_rows(1) if call in crowded else planted_rows(layer, 1, 200, seed=9 * call)]
        for call in range(33)
    ]
    used, candidates = encode_on_trial(kernels, [layer], calls, 50)
    assert used.all()
    assert all((candidates[call, 0, 0] >= 200) == (call in crowded) for call in range(33))


@pytest.mark.parametrize("seed", [1, 2])
def test_layers_of_one_call_choose_for_themselves(kernels, seed):
    layers = [crowded_layer(size) for size in (128, 256, 384)]  # their int8 inputs tell them apart
    calls = [
        [
            crowded_rows(3, 256, seed=call) if i == 1 else planted_rows(layer, 3, seed=9 * call)
            for i, layer in enumerate(layers)
        ]
        for call in range(5)
    ]
    kernels.fail_graphs(0)
    used, _ = encode_on_trial(kernels, layers, calls, 3, seed=seed, chunk=2)
    assert used[:, [0, 2]].all() and used[:, 1].nonzero().flatten().tolist() == [0, 3]
    assert kernels.launched_graphs() == 3


@pytest.mark.parametrize("room, lists", [(9999, 256), (0, 256), (0, 1)])
def test_every_candidate_is_counted(kernels, room, lists):
    """Where lists are full, they are computed when a feature is selected, and not at the end."""
    layer = crowded_layer(16, 3000, 0)
    rows = crowded_rows(3, 16)
    rows[1, 2] = math.nan
    calls = [[rows], [rows[:2]]]
    _, candidates = encode_on_trial(
        kernels, [layer], calls, 1, chunk=2, use_graphs=False, room=room, lists=lists
    )
    assert candidates[0, 0, :4].tolist() == [3000, 0, 3000, 0]
    assert not candidates[1].any(), "they are read once"


@pytest.mark.parametrize("screening", SCREENINGS)
def test_int8_is_on_trial_with_auto_alone(kernels, screening):
    for features, large in ((1 << 17, True), (300, False)):
        W = torch.zeros(features, 128).bfloat16()
        assert kernels.on_trial(W, SCREENINGS.index(screening)) == (large and screening == "auto")


@pytest.mark.parametrize(
    "rows, candidates, int8",
    [
        # Per row of 5120 x 40960 weights: planted, Gaussian and dense ones.
        *((rows, 30, range(600)) for rows in (1, 9, 64)),
        *((rows, 278, range(600)) for rows in (1, 16, 32)),
        (1, 14134, [0, 1, 2, 256, 512]),
        (8, 14134, [0, 1, 2, 256, 512]),
        (16, 14134, [0, 1, 256, 512]),
        (32, 14134, [0, 256, 512]),
        (64, 14134, [0, 256, 512]),
    ],
)
def test_calls_that_leave_int8_lose_by_it(kernels, rows, candidates, int8):
    """Where int8 is slower on an H100, and only there."""
    assert kernels.int8_calls(40960, [rows] * 600, [candidates] * 600) == list(int8)


@pytest.mark.parametrize("candidates, calls", [(30, (5120, 5120)), (14134, (20, 80))])
def test_threads_share_a_trial(kernels, candidates, calls):
    got = kernels.int8_calls(40960, [16] * 2560, [candidates] * 2560, 2)
    assert calls[0] <= len(got) <= calls[1]  # 20 periods
