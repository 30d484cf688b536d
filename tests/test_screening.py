"""Every screening mode on every instruction set, on data made to break a screen.

All give the same bits, which are those of the float64 oracle. The instruction set is chosen once
per process, so that each encodes the cases of this file in a process of its own.
"""

import functools
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import (
    SCREENINGS,
    check,
    gates,
    make_layer,
    normal,
    pre_activations,
    same_bits,
    tolerances,
    wide,
)
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights

ARM = platform.machine() in ("aarch64", "arm64")
X86 = "avx2", "avx2vnni", "avx512vnni", "avx512amx"
CPUS = ("portable", *(("neon", "neondot") if ARM else X86))
RESULTS = ("activations", "indices", "sparsity")


def python(code, cpu):
    """Runs code in a process of its own, with this instruction set."""
    environment = {
        **os.environ,
        "SPARSE_TRANSCODER_CPU": cpu,
        "PYTHONPATH": str(Path(__file__).parent),
    }
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


@functools.cache
def refusal(cpu):
    """Why this machine cannot run an instruction set; empty where it can."""
    done = python("import sparse_transcoder; sparse_transcoder.cpu_instruction_set()", cpu)
    lines = done.stderr.splitlines()
    assert done.returncode == 0 or lines[-1].startswith(
        "ValueError: SPARSE_TRANSCODER_CPU must be"
    ), done.stderr
    return lines[-1] if done.returncode else ""


# Rows


def gaussian(tokens, layer, seed):
    return normal(tokens, layer["W_enc"].shape[1], seed=seed)


def planted(tokens, layer, seed):
    """A few features of each row stand out, as when trained; the bias keeps the others down."""
    W = layer["W_enc"].float()
    features, hidden_size = W.shape
    chosen = torch.randint(features, (tokens, 6), generator=torch.Generator().manual_seed(seed))
    directions = W[chosen] / W[chosen].norm(dim=-1, keepdim=True).clamp(min=1e-30)
    strengths = 4 + 4 * normal(tokens, 6, seed=seed + 1).abs()
    return (strengths[..., None] * directions).sum(1) + 0.3 * normal(
        tokens, hidden_size, seed=seed + 2
    )


def heavy_tailed(tokens, layer, seed):
    """Outlier inputs that all rows share, outlier elements, and a first row far larger."""
    hidden_size = layer["W_enc"].shape[1]
    hidden = normal(tokens, hidden_size, seed=seed) * torch.exp(
        normal(tokens, hidden_size, seed=seed + 1)
    )
    hidden *= torch.exp(1.5 * normal(hidden_size, seed=seed + 2))
    hidden[0] *= 300
    return hidden


# Cases: name -> (layer, hidden, top_k, tau)


def ordinary():
    shapes = [
        # tokens, hidden size, features, top_k
        (1, 1, 1, 1),
        (2, 3, 65, 4),
        (3, 17, 63, 5),
        (4, 100, 257, 20),
        (5, 255, 130, 9),
        (7, 256, 64, 64),
        (16, 257, 1000, 50),
        (17, 576, 129, 20),
        (64, 513, 333, 33),
        (200, 77, 1030, 20),
        (3, 65537, 5, 3),  # too long for int8
    ]
    kinds = ("relu", "jumprelu", "topk")
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for number, (tokens, hidden_size, features, top_k) in enumerate(shapes):
        for place, rows in enumerate((gaussian, planted, heavy_tailed)):
            kind, dtype = kinds[(number + place) % 3], dtypes[(number + number // 3 + place) % 3]
            fields = {}
            if number % 4 == 1:
                fields["input_bias"] = normal(hidden_size, seed=7)
            if number % 4 == 2:
                fields |= {
                    "ln_weight": 1 + 0.3 * normal(hidden_size, seed=8),
                    "ln_bias": 0.3 * normal(hidden_size, seed=9),
                }
            layer = make_layer(features, hidden_size, seed=number, kind=kind, dtype=dtype, **fields)
            if rows is planted:
                layer["b_enc"] -= 2
            name = f"{rows.__name__} {tokens}x{hidden_size}x{features} {kind} {str(dtype)[6:]}"
            yield name, (layer, rows(tokens, layer, 50 + number).to(dtypes[number % 3]), top_k, 0.5)
    for kind in kinds:
        for dtype in dtypes:
            layer = make_layer(700, 300, kind=kind, dtype=dtype)
            layer["b_enc"] -= 2  # few are active
            yield f"{kind} with weights in {dtype}", (layer, planted(70, layer, 3), 20, 0.5)


def strong_and_weak():
    layer = make_layer(400, 200)
    layer["W_enc"] *= torch.logspace(-6, 6, 400)[:, None]
    layer["b_enc"] *= torch.logspace(-6, 6, 400)
    return layer


def patchy():
    """Panels where all features are active among panels where few are: the screen changes twice."""
    layer = make_layer(64 * 45 + 7, 130)
    layer["b_enc"] -= 3
    layer["b_enc"][64 * 3 : 64 * 4] = 50
    layer["b_enc"][64 * 30 : 64 * 32 + 9] = 50
    return layer


def quiet_weights(**fields):
    layer = make_layer(300, 96, **fields)
    layer["W_enc"][:, 0] = 0
    return layer


def element(value, tokens=20):
    hidden = normal(tokens, 96, seed=4)
    hidden[::3, 0] = value
    return hidden


def duplicates():
    layer = make_layer(700, 150)
    layer["W_enc"][1::3], layer["b_enc"][1::3] = (
        layer["W_enc"][0].clone(),
        layer["b_enc"][0].clone() + 1,
    )
    layer["W_enc"][2::9], layer["b_enc"][2::9] = (
        layer["W_enc"][5].clone(),
        layer["b_enc"][5].clone(),
    )
    return layer


def adverse():
    layer = make_layer(1000, 200)
    rows = normal(40, 200, seed=4)
    large = rows.clone()
    large[[0, 7, 39]] *= 1e4
    yield "some rows 1e4 times the others", (layer, large, 20, 1.0)
    yield "rows over sixteen decades", (layer, rows * torch.logspace(-8, 8, 40)[:, None], 20, 1.0)
    for value in (1e18, -1e18):
        yield f"element {value:g} that no feature sees", (quiet_weights(), element(value), 20, 0.5)
        yield f"element {value:g}", (make_layer(300, 96), element(value), 20, 0.5)
    yield (
        "norms whose square overflows",
        ({**layer, "W_enc": layer["W_enc"] * 1e-20}, rows * 1e20, 20, 0.5),
    )
    yield (
        "weights whose square overflows",
        ({**layer, "W_enc": layer["W_enc"] * 1e20}, rows * 1e-20, 20, 0.5),
    )
    yield "too large to screen", (layer, torch.cat([rows, 1e37 * rows[:3]]), 20, 0.5)
    yield "too large, and one hot", (layer, torch.cat([rows, 1e38 * torch.eye(200)[:3]]), 20, 0.5)
    # What lies in memory after the last feature would be the strongest of all.
    beyond = torch.cat([layer["W_enc"], 10 * rows[:1].sign().expand(64, 200)])
    ending = {"W_enc": beyond[:1000], "b_enc": torch.cat([layer["b_enc"], torch.zeros(64)])[:1000]}
    yield (
        "too large, the last panel is not whole",
        (ending, torch.cat([rows, 1e37 * rows[:1].expand(3, 200)]), 20, 0.5),
    )
    # So few features are active that int8 screens every panel. The last one is not whole.
    many = rows.repeat(3, 1)
    quiet = {"W_enc": beyond[:1000], "b_enc": torch.full((1064,), -3.0)[:1000]}
    for name, last in (
        ("too large, few active", 1e37 * rows[:1].expand(3, 200)),
        ("broken, few active", torch.full((3, 200), math.nan)),
    ):
        yield name, (quiet, torch.cat([many, last]), 20, 0.5)
    # No float32 holds the norm of the last rows, and their products are small.
    quiet = {"W_enc": (1e-30 * beyond)[:1000], "b_enc": torch.full((1064,), -1e8)[:1000]}
    yield (
        "rows whose norm overflows, few active",
        (quiet, torch.cat([many, 2e38 * rows[:3].sign()]), 20, 0.0),
    )
    # A part overflows and the whole does not, in any order.
    steps = torch.tensor([-1.5625, 1.171875, 1.171875]) * 1e36
    parts = torch.stack([steps.roll(i).repeat_interleave(256) for i in range(3)])
    flat = {"W_enc": torch.ones(70, 768), "b_enc": torch.zeros(70)}
    yield "too large, parts overflow", (flat, torch.cat([normal(20, 768, seed=4), parts]), 20, 0.5)
    bare = {**layer, "b_enc": torch.zeros(1000)}
    yield "denormal rows", (bare, 1e-40 * rows, 20, 0.0)
    yield "denormal weights", ({**bare, "W_enc": layer["W_enc"] * 1e-40}, rows, 20, 0.0)
    yield (
        "zero rows",
        (layer, torch.cat([torch.zeros(2, 200), rows, torch.zeros(1, 200)]), 20, 0.05),
    )
    yield "zero weights", ({**layer, "W_enc": torch.zeros(1000, 200)}, rows, 20, 0.05)
    some = layer["W_enc"].clone()
    some[::2] = 0
    yield "some weights zero", ({**layer, "W_enc": some}, rows, 20, 0.05)
    for scale in (1e-12, 1e-17, 1e-18, 1e-19, 1e-21):
        # Products too small for float32's normal numbers, and a threshold among them.
        small = {"W_enc": make_layer(100, 5)["W_enc"] * scale, "b_enc": torch.zeros(100)}
        hidden = scale * normal(30, 5, seed=6)
        yield f"both {scale:g}", (small, hidden, 20, 0.0)
        yield f"both {scale:g}, threshold there", (small, hidden, 20, 0.6 * scale**2)
        one = {"W_enc": scale * (0.5 + torch.arange(100)[:, None] / 80), "b_enc": torch.zeros(100)}
        yield (
            f"both {scale:g}, one input",
            (one, scale * torch.linspace(0.5, 1.5, 30)[:, None], 20, scale**2),
        )
    weak = {"W_enc": make_layer(300, 64)["W_enc"] * 1e-10, "b_enc": torch.zeros(300)}
    for scale in (1e31, 1e33, 1e35, 1e37):
        for share in (0.0, 1.0, 2.0):
            tau = share * scale * 1e-10
            yield (
                f"huge rows, weak features, {scale:g}, {share:g}",
                (weak, scale * normal(40, 64, seed=4), 20, tau),
            )
    yield "duplicate features", (duplicates(), rows[:, :150], 40, 0.0)
    yield "strong and weak features", (strong_and_weak(), rows, 20, 1.0)
    dense = {**layer, "b_enc": layer["b_enc"] + 3}
    yield "nearly all survive", (dense, rows, 20, 0.0)
    yield "nearly all survive, k 1", (dense, rows, 1, 0.0)
    yield "k is F", (layer, rows, 1000, 0.0)
    yield "k above F, dense", (dense, rows, 5000, 0.0)
    yield (
        "rising",
        ({**make_layer(3000, 40), "b_enc": torch.arange(3000) * 1e-2}, rows[:, :40], 3, 0.0),
    )
    yield (
        "falling",
        ({**make_layer(3000, 40), "b_enc": torch.arange(3000, 0, -1) * 1e-2}, rows[:, :40], 3, 0.0),
    )
    tied = {"W_enc": torch.full((2000, 64), 0.3), "b_enc": torch.full((2000,), 0.01)}
    yield "all features tie", (tied, normal(30, 64, seed=4).abs(), 7, 0.0)
    yield "all features tie, near the gate", (tied, torch.full((9, 64), 0.05), 7, 0.97)
    yield "patchy", (patchy(), planted(90, patchy(), 5), 30, 0.5)
    yield "patchy, few rows", (patchy(), planted(3, patchy(), 5), 30, 0.5)
    broken = rows.clone()
    broken[3, 5], broken[17, 0], broken[39, 199] = math.nan, math.inf, -math.inf
    yield "broken rows", (layer, broken, 20, 0.5)
    ramp = {
        "W_enc": (1 + 1e-5 * torch.arange(3000)[:, None]).repeat(1, 64) / 64,
        "b_enc": torch.zeros(3000),
    }
    yield "values apart by less than a margin", (ramp, torch.ones(30, 64), 50, 1.01)
    # The sum of a group times the weights' scale overflows, though the dot product does not.
    huge = {"W_enc": torch.full((3, 512), 3e34), "b_enc": torch.zeros(3)}
    hidden = torch.full((1, 512), -1e-20)
    hidden[0, 256:] = 0
    hidden[0, 256] = 1e-17
    yield "a part overflows, not the whole", (huge, hidden, 2, 1.0)
    # A residual between two subnormal numbers.
    subnormal = torch.full((1, 2), 2.0**-149)
    yield (
        "subnormal residual",
        ({"W_enc": torch.full((2, 2), 2.1e38), "b_enc": torch.zeros(2)}, subnormal, 2, 5e-7),
    )
    beside = {"W_enc": normal(2048, 64), "b_enc": torch.zeros(2048)}
    beside["W_enc"][:, 0] = 1
    hidden = normal(800, 64, seed=3)
    hidden[:, 0] = torch.where(torch.arange(800) < 250, 20.0, -16.0)
    yield "dense rows before others", (beside, hidden, 20, 1.0)
    yield "dense rows after others", (beside, hidden.flip(0), 20, 1.0)
    for tokens in (3, 40):
        aligned, hidden = worst(tokens)
        yield f"largest quantisation error, {tokens} rows", (aligned, hidden, 20, 1.0)


def rotation(hidden_size, mixed):
    """The int8 screen's rotation [hidden_size, hidden_size], from its definition.

    Signs, then Hadamard's matrix of `mixed` rows over inputs hidden_size / mixed apart. Its inverse
    is its transpose / mixed.
    """
    number = torch.arange(hidden_size, dtype=torch.int64)
    bits = number * 0x9E3779B1 % 2**32
    bits = (bits ^ bits >> 15) * 0x85EBCA77 % 2**32
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < mixed:
        hadamard = torch.kron(
            torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), hadamard
        )
    return torch.kron(hadamard, torch.eye(hidden_size // mixed, dtype=torch.float64)) * (
        1 - 2 * (bits >> 31)
    )


def worst(tokens):
    """Every feature is just over its gate: a screen with too small a margin loses it.

    Rotated inputs lie half-way between two int8 numbers, on the side that each weight rewards, and
    weights likewise. Biases put the features over their gates.
    """
    hidden_size, features, mixed = 256, 200, 64
    signs = torch.sign(normal(2, hidden_size, seed=1)).double()
    x = 63 * signs[0] + 0.499 * signs[1]
    w = 63 * signs[1] + 0.499 * signs[0]
    x[0], w[0] = 127, 127
    x, w = (torch.stack([x, w]) @ rotation(hidden_size, mixed)) / mixed
    W = (torch.where(torch.arange(features)[:, None] % 2 == 0, w, w * 0.37) / 127).float()
    layer = {"W_enc": W, "b_enc": torch.zeros(features)}
    hidden = (torch.linspace(0.5, 1.5, tokens)[:, None] * x / 127).float()
    middle = pre_activations(hidden, layer)[tokens // 2]
    return {**layer, "b_enc": (1.0001 - middle).float()}, hidden


CASES = dict([*ordinary(), *adverse()])


def encoder(layer, top_k, tau, **options):
    return SparseTranscoderEncoder({0: TranscoderWeights(**layer)}, top_k, tau, **options)


def variants(layer, hidden, top_k, tau, screening):
    """The same rows asked for in other ways: name -> result, all to be the same bits."""
    beside = {0: TranscoderWeights(**layer), 1: TranscoderWeights(**make_layer(130, 24), layer=1)}
    whole = encoder(layer, top_k, tau, screening=screening)
    yield "again", whole.encode_layer(0, hidden)
    for chunk_size in (1, 3, 33):
        yield (
            f"chunks of {chunk_size}",
            encoder(layer, top_k, tau, chunk_size=chunk_size, screening=screening).encode_layer(
                0, hidden
            ),
        )
    parts = [whole.encode_layer(0, part) for part in hidden.split([1, 2, hidden.shape[0] - 3])]
    yield "in parts", {name: torch.cat([part[name] for part in parts]) for name in RESULTS}
    among = SparseTranscoderEncoder(beside, top_k, tau, screening=screening)
    yield "beside another layer", among.encode_all_layers({1: normal(9, 24), 0: hidden})[0]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        yield (
            f"{threads} threads",
            encoder(layer, top_k, tau, screening=screening).encode_layer(0, hidden),
        )
    torch.set_num_threads(2)


VARIED = (
    "planted 64x513x333 relu float16",
    "relu with weights in torch.float32",
    "jumprelu with weights in torch.bfloat16",
    "topk with weights in torch.float16",
    "patchy",
    "nearly all survive",
    "duplicate features",
    "too large to screen",
)


def record(path):
    """Encodes everything with this process's instruction set."""
    torch.set_num_threads(2)
    results = {}
    for name, (layer, hidden, top_k, tau) in CASES.items():
        for screening in SCREENINGS:
            engine = encoder(layer, top_k, tau, screening=screening, chunk_size=1024)
            got = engine.encode_layer(0, hidden)
            sparse = engine.encode_sparse(0, hidden)
            results[name, screening] = {
                **{part: got[part] for part in RESULTS},
                "row_begin": sparse.crow_indices(),
                "features": sparse.col_indices(),
                "values": sparse.values(),
                "explained": engine.explain(0, hidden),
                "memory": engine.memory(),
            }
            if name in VARIED:
                results[name, screening]["varied"] = {
                    variant: same_bits(
                        {part: other[part] for part in RESULTS},
                        {part: got[part] for part in RESULTS},
                    )
                    for variant, other in variants(layer, hidden, top_k, tau, screening)
                }
    torch.save(results, path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder, made = tmp_path_factory.mktemp("screening"), {}

    def get(cpu):
        if cpu not in made:
            if refusal(cpu):
                pytest.skip(f"{cpu}: {refusal(cpu)}")
            path = folder / f"{cpu}.pt"
            done = python(f"import test_screening; test_screening.record({str(path)!r})", cpu)
            assert done.returncode == 0, done.stderr
            made[cpu] = torch.load(path)
        return made[cpu]

    return get


def parts(result, names):
    return {name: result[name] for name in names}


def check_sparse(result, hidden, layer, tau):
    pre = pre_activations(hidden, layer)
    broken = ~hidden.isfinite().all(-1)
    slack = tolerances(hidden, layer, pre, unit=False)
    begin, ids, values = result["row_begin"], result["features"], result["values"]
    rows = torch.repeat_interleave(torch.arange(hidden.shape[0]), begin.diff())
    of_broken = broken[rows]
    assert (
        (begin.diff()[broken] == 1).all()
        and (ids[of_broken] == 0).all()
        and values[of_broken].isnan().all()
    )
    rows, ids, values = rows[~of_broken], ids[~of_broken], values[~of_broken]
    assert ((rows.diff() > 0) | ((rows.diff() == 0) & (ids.diff() > 0))).all(), (
        "features do not ascend"
    )
    finite = values.isfinite()
    assert ((values.double() - pre[rows, ids]).abs() <= slack[rows, ids])[finite].all()
    assert (pre[rows, ids][~finite] > 3e38).all() and (values > 0).all()
    present = torch.zeros_like(pre, dtype=torch.bool)
    present[rows, ids] = True
    surely, possibly = gates(pre, slack, layer, tau)
    surely[broken], present[broken], possibly[broken] = False, False, False
    assert not (surely & ~present).any(), f"missing at {(surely & ~present).nonzero()[0].tolist()}"
    assert not (present & ~possibly).any(), "a feature below its gate"


@pytest.mark.parametrize("name", CASES)
def test_against_float64(recorded, name):
    layer, hidden, top_k, tau = CASES[name]
    for cpu in filter(lambda cpu: not refusal(cpu), CPUS):
        for screening in SCREENINGS:
            got, first = recorded(cpu)[name, screening], recorded("portable")[name, "off"]
            if got is not first and same_bits(
                parts(got, first.keys() - CALL), parts(first, first.keys() - CALL)
            ):
                continue
            check(got, hidden, layer, top_k, tau, unit=False)
            check_sparse(got, hidden, layer, tau)


CALL = {"explained", "memory", "varied"}  # how a result came about, not what it is


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("screening", SCREENINGS)
def test_same_bits_everywhere(recorded, cpu, screening):
    for name in CASES:
        got, first = recorded(cpu)[name, screening], recorded("portable")[name, "off"]
        for part in first.keys() - CALL:
            assert same_bits(got[part], first[part]), f"{name}: {part}"


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("screening", SCREENINGS)
@pytest.mark.parametrize("name", VARIED)
def test_same_bits_however_it_is_asked(recorded, cpu, screening, name):
    varied = recorded(cpu)[name, screening]["varied"]
    assert len(varied) == 9 and all(varied.values()), [
        variant for variant, same in varied.items() if not same
    ]


# What explain() tells


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("screening", SCREENINGS)
def test_explained(recorded, cpu, screening):
    for name, (layer, hidden, _, _) in CASES.items():
        result = recorded(cpu)[name, screening]
        told, memory = result["explained"], result["memory"]
        features, rows = layer["W_enc"].shape[0], hidden.shape[0]
        assert told["instruction_set"] == cpu, name
        assert (told["rows"], told["features"]) == (rows, features), name
        assert (
            told["pairs_int8"] + told["pairs_int16"] + told["pairs_float32"] == rows * features
        ), name
        assert told["survivors"] <= told["pairs_int8"], name
        assert told["ambiguous"] <= told["computed"] <= rows * features, name
        returned = int((result["activations"] > 0).sum())
        assert returned <= told["computed"], f"{name}: a value is returned that was not computed"
        assert all(
            told[f"{phase}_ms"] >= 0
            for phase in ("prepare", "screen", "rescreen", "compute", "finish")
        )
        if screening == "off":
            assert told["pairs_float32"] == rows * features and memory["screening_bytes"] == 0
        if screening == "int16":
            assert told["pairs_int16"] == rows * features
        if name.startswith("too large"):
            assert told["fallback_rows"] == 3
            assert told["computed"] >= 3 * features, name
        else:
            assert told["fallback_rows"] == 0, name
        if name in ("too large, few active", "broken, few active"):
            assert told["computed"] < (told["fallback_rows"] + 1) * features, name
        if name.endswith("few active") and screening in ("auto", "int8"):
            in_int8 = 0 if cpu in ("portable", "neon") else rows * features
            assert told["pairs_int8"] == in_int8, name


def test_the_screens_are_used(recorded):
    """On a machine that has them; and what int8 and int16 rule out is not computed."""
    best = recorded([cpu for cpu in CPUS if not refusal(cpu)][-1])
    told = {
        screening: best["relu with weights in torch.float32", screening]["explained"]
        for screening in SCREENINGS
    }
    if not told["int8"]["pairs_int8"]:
        pytest.skip("this machine has no fast int8 product")
    pairs = 70 * 700
    assert told["int8"]["pairs_int8"] == told["auto"]["pairs_int8"] == pairs
    assert told["auto"]["computed"] < told["auto"]["survivors"] < pairs // 10
    assert told["off"]["survivors"] == told["int16"]["survivors"] == 0
    for screening in SCREENINGS:
        told = best["patchy", screening]["explained"]
        if screening in ("auto", "int8"):
            assert 0 < told["pairs_int8"] < told["rows"] * told["features"], (
                "the dense screen took its panels"
            )
            assert (told["pairs_int16"] > 0) == (screening == "auto")


@pytest.mark.parametrize("cpu", CPUS)
def test_no_copy_is_made_for_nothing(recorded, cpu):
    """Where an int8 copy takes memory, calls of few rows at least are screened with it."""
    for screening in ("auto", "int8"):
        result = recorded(cpu)["patchy, few rows", screening]
        assert result["memory"]["screening_bytes"] > 0 and result["explained"]["pairs_int8"] > 0


@pytest.mark.parametrize("name", ["avx1024", "AVX2", "avx2 "])
def test_an_unknown_instruction_set(name):
    for code in (
        "import sparse_transcoder as s; s.cpu_instruction_set()",
        "import test_screening as t; t.encoder(t.make_layer(130, 24), 10, 0.5)",
    ):
        done = python(code, name)
        error = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and error.startswith(
            "ValueError: SPARSE_TRANSCODER_CPU must be"
        ), done.stderr
        assert error.endswith(f"got {name}") and "portable" in error


def test_the_instruction_set_that_is_named_is_used():
    """And an empty name is none."""
    for cpu in filter(lambda cpu: not refusal(cpu), CPUS):
        assert (
            python(
                "import sparse_transcoder as s; print(s.cpu_instruction_set())", cpu
            ).stdout.strip()
            == cpu
        )
    assert (
        python("import sparse_transcoder as s; print(s.cpu_instruction_set())", "").stdout.strip()
        == cpu
    ), "the best"


@pytest.mark.parametrize("setting", ["int8_rows", "int8_rows=x", "rows=3", "max_share_int16=0.1x"])
def test_unknown_crossovers(monkeypatch, setting):
    monkeypatch.setenv("SPARSE_TRANSCODER_CROSSOVERS", setting)
    with pytest.raises(ValueError, match="SPARSE_TRANSCODER_CROSSOVERS must hold name=value"):
        encoder(make_layer(130, 24), 10, 0.5)


def test_crossovers_force_a_screen(monkeypatch):
    layer = make_layer(130, 24)
    hidden = normal(50, 24)
    for setting, used in (
        ("int8_rows=50 max_share_float32=2", "pairs_int8"),
        ("int8_rows=49", "pairs_float32"),
    ):
        monkeypatch.setenv("SPARSE_TRANSCODER_CROSSOVERS", setting)
        told = encoder(layer, 10, 0.5, screening="int8").explain(0, hidden)
        assert told[used] == 50 * 130, (setting, told)


def test_explain_of_no_rows_and_of_wrong_arguments():
    engine = encoder(make_layer(130, 24), 10, 0.5)
    told = engine.explain(0, torch.empty(0, 24))
    assert (told["rows"], told["features"], told["computed"]) == (0, 130, 0)
    assert engine.explain(0, normal(2, 3, 24))["rows"] == 6
    with pytest.raises(KeyError, match="layer 5"):
        engine.explain(5, normal(3, 24))
    with pytest.raises(ValueError, match="layer 0: hidden must be"):
        engine.explain(0, normal(3, 25))
    with pytest.raises(TypeError, match="hidden must be"):
        engine.explain(0, [1.0])


# Copies


@pytest.mark.parametrize(
    "hidden_size, features", [(1, 1), (64, 64), (255, 100), (256, 130), (257, 129), (2048, 65)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_of_the_copies(hidden_size, features, dtype):
    layer = make_layer(features, hidden_size, dtype=dtype)
    memory = {
        s: encoder(layer, 5, 1.0, screening=s).memory()["screening_bytes"] for s in SCREENINGS
    }
    whole = (features + 63) // 64 * 64
    inputs = (hidden_size + 63) // 64 * 64
    assert memory["off"] == 0
    assert 2 * features * hidden_size <= memory["int16"] <= features * (2 * (hidden_size + 96) + 8)
    assert memory["int8"] == whole * (inputs + 12)
    assert memory["auto"] in (0, memory["int8"], memory["int8"] + memory["int16"])


def test_rows_too_long_for_int8():
    layer = make_layer(3, (1 << 16) + 1)
    memory = {
        s: encoder(layer, 2, 1.0, screening=s).memory()["screening_bytes"] for s in SCREENINGS
    }
    assert memory["int8"] == 0 and memory["auto"] in (0, memory["int16"])
    assert encoder(make_layer(3, 1 << 16), 2, 1.0, screening="int8").memory()["screening_bytes"] > 0


def test_copies_are_made_alike_on_any_number_of_threads():
    layer = make_layer(1000, 100)
    hidden = planted(40, layer, 3)
    before, told = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            engines = [encoder(layer, 20, 0.5, screening=screening) for screening in SCREENINGS]
            torch.set_num_threads(1)  # the same work, so the same counts
            counts = [engine.explain(0, hidden) for engine in engines]
            told.append(
                [
                    {name: count for name, count in one.items() if not name.endswith("_ms")}
                    for one in counts
                ]
            )
    finally:
        torch.set_num_threads(before)
    assert told[0] == told[1]


def test_weights_are_not_needed_twice():
    """Copies are made when the encoder is built. Exact values come from the stored weights."""
    layer = make_layer(300, 64)
    hidden = normal(20, 64)
    for screening in SCREENINGS:
        check(
            encoder(layer, 20, 0.5, screening=screening).encode_layer(0, hidden),
            hidden,
            layer,
            20,
            0.5,
        )
    assert wide(layer["W_enc"]).equal(wide(make_layer(300, 64)["W_enc"]))
