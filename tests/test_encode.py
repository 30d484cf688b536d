"""Results against the float64 oracle: sizes on the edges, dtypes, gates, ties, scales, layouts."""

import math

import pytest
import torch
from oracle import (
    FLOATS,
    SCREENINGS,
    check,
    expected,
    integers,
    make_layer,
    normal,
    on,
    pre_activations,
    same_bits,
)
from sparse_transcoder import (
    SparseTranscoderEncoder,
    TranscoderWeights,
    encode_single_layer,
    reference,
)

EDGES = (1, 31, 32, 33, 63, 64, 65, 100)


def encode(hidden, layer, top_k, tau, **options):
    weights = TranscoderWeights(**on(layer, hidden.device))
    return SparseTranscoderEncoder({0: weights}, top_k, tau, **options).encode_layer(0, hidden)


def exact(hidden, layer, top_k, tau, **options):
    """For whole-number data: the stable sort itself, bit for bit."""
    got = encode(hidden, layer, top_k, tau, **options)
    for name, want in zip(
        ("activations", "indices", "sparsity"), expected(hidden, layer, top_k, tau), strict=True
    ):
        assert same_bits(got[name].cpu(), want), name


# Sizes


@pytest.mark.parametrize("hidden_size", EDGES)
@pytest.mark.parametrize("features", EDGES)
def test_sizes(device, features, hidden_size):
    layer = make_layer(features, hidden_size)
    for top_k in {1, 31, 32, 33, features, features + 7}:
        weights = TranscoderWeights(**on(layer, device))
        encoder = SparseTranscoderEncoder({0: weights}, top_k, 0.5, chunk_size=50)
        for tokens in (1, 32, 65):
            hidden = normal(tokens, hidden_size, seed=tokens).to(device)
            check(encoder.encode_layer(0, hidden), hidden, layer, top_k, 0.5)


@pytest.mark.parametrize(
    "tokens, hidden_size, features, top_k",
    [
        (3, 64, 4097, 33),
        (130, 33, 8191, 64),
        (5, 1, 9001, 50),
        (1, 16, 70000, 50),
        (1030, 65, 2049, 20),
        (2, 7, 20001, 20001),
        (3, 24, 12000, 9000),
        (2, 3000, 130, 20),
        (17, 1025, 1027, 31),
    ],
)
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_larger_than_a_tile(device, tokens, hidden_size, features, top_k, tau):
    layer = make_layer(features, hidden_size)
    hidden = normal(tokens, hidden_size, seed=9).to(device)
    check(encode(hidden, layer, top_k, tau), hidden, layer, top_k, tau)


# Dtypes


@pytest.mark.parametrize("hidden_dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_dtypes(device, hidden_dtype, weight_dtype, kind):
    layer = make_layer(300, 96, kind=kind, dtype=weight_dtype)
    for tokens in (1, 40):
        hidden = normal(tokens, 96, seed=5).to(device, hidden_dtype)
        for screening in SCREENINGS:
            check(encode(hidden, layer, 20, 0.5, screening=screening), hidden, layer, 20, 0.5)


@pytest.mark.parametrize("other", ["b_enc", "threshold"])
def test_dtypes_inside_a_layer_may_differ(device, other):
    layer = make_layer(200, 40, kind="jumprelu", dtype=torch.bfloat16)
    layer[other] = (layer[other].float() + 1e-3).float()
    hidden = normal(30, 40, seed=5).to(device)
    check(encode(hidden, layer, 20, 0.5), hidden, layer, 20, 0.5)


# Gates


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("tau", [0.0, -1.0, 0.7, 1.0, 3.0, 1e30, math.inf, -math.inf])
@pytest.mark.parametrize("top_k", [1, 20, 257, 400])
def test_gates(device, kind, tau, top_k):
    layer = make_layer(257, 64, kind=kind)
    hidden = normal(50, 64, seed=6).to(device)
    check(encode(hidden, layer, top_k, tau), hidden, layer, top_k, tau)


def fixed(values, **fields):
    """Zero weights: every row's pre-activations are these values, exactly."""
    return {"W_enc": torch.zeros(len(values), 8), "b_enc": torch.tensor(values), **fields}


def next_up(value):
    return torch.nextafter(torch.tensor(value), torch.tensor(math.inf)).item()


def next_down(value):
    return torch.nextafter(torch.tensor(value), torch.tensor(-math.inf)).item()


@pytest.mark.parametrize(
    "values, fields, top_k, tau, ids, kept",
    [
        # the scalar threshold is inclusive
        ([next_down(1.0), 1.0, next_up(1.0)], {}, 3, 1.0, [2, 1, 0], 2),
        ([next_down(0.7), 0.7, next_up(0.7)], {}, 3, 0.7, [2, 1, 0], 2),
        # zero and below are never kept, whatever the threshold
        ([-1.0, -0.0, 0.0, 1e-45, 0.5], {}, 5, 0.0, [4, 3, 0, 1, 2], 2),
        ([-1.0, -0.0, 0.0, 1e-45, 0.5], {}, 5, -2.0, [4, 3, 0, 1, 2], 2),
        # JumpReLU is strict, per feature
        (
            [0.5, 0.5, 0.5, 2.0],
            {"threshold": [0.5, next_down(0.5), next_up(0.5), 2.0]},
            4,
            0.0,
            [1, 0, 2, 3],
            1,
        ),
        ([1.0, 1.0, next_up(1.0)], {"threshold": [1.0, 0.5, 1.0]}, 3, 1.0, [2, 1, 0], 2),
        ([0.5, 1.0, 2.0], {"threshold": [0.1, 0.1, 0.1]}, 3, 1.0, [2, 1, 0], 2),
        # ... and never negative, nor zero
        (
            [-0.5, 0.0, 0.25, -0.0],
            {"threshold": [-1.0, -1.0, -1.0, -1.0]},
            4,
            -5.0,
            [2, 0, 1, 3],
            1,
        ),
        # the checkpoint's k below, at and above top_k; ties at its cut go to the lower id
        ([1.0, 3.0, 2.0, 4.0], {"k": 2}, 4, 0.0, [3, 1, 0, 2], 2),
        ([1.0, 3.0, 2.0, 4.0], {"k": 3}, 2, 0.0, [3, 1], 3),
        ([1.0, 3.0, 2.0, 4.0], {"k": 9}, 3, 0.0, [3, 1, 2], 4),
        ([2.0, 3.0, 2.0, 2.0], {"k": 2}, 4, 0.0, [1, 0, 2, 3], 2),
        ([2.0, 2.0, 2.0, 2.0], {"k": 3}, 2, 0.0, [0, 1], 3),
        # the cut and the gate both apply
        ([1.0, 3.0, 2.0, 4.0], {"k": 3}, 4, 2.5, [3, 1, 0, 2], 2),
        ([-1.0, 3.0, -2.0, -4.0], {"k": 2}, 4, 0.0, [1, 0, 2, 3], 1),
        ([-1.0, -3.0, -2.0], {"k": 2}, 3, -9.0, [0, 1, 2], 0),
        # nothing kept; all kept; ties
        ([0.25, 0.5, 0.75], {}, 2, 1.0, [0, 1], 0),
        ([2.0, 2.0, 2.0, 2.0, 2.0], {}, 3, 1.0, [0, 1, 2], 5),
        ([1.0, 2.0, 1.0, 2.0, 1.0], {}, 4, 1.0, [1, 3, 0, 2], 5),
        # fillers: the lowest ids not kept, in order
        ([0.0, 5.0, 0.0, 4.0, 0.0, 3.0], {}, 5, 1.0, [1, 3, 5, 0, 2], 3),
        ([9.0, 0.0, 7.0, 0.0, 8.0], {}, 9, 1.0, [0, 4, 2, 1, 3], 3),
    ],
)
@pytest.mark.parametrize("tokens", [1, 70])
def test_rules_by_hand(device, values, fields, top_k, tau, ids, kept, tokens):
    fields = {name: torch.tensor(v) if isinstance(v, list) else v for name, v in fields.items()}
    hidden = normal(tokens, 8).to(device)
    for screening in SCREENINGS:
        got = encode(hidden, fixed(values, **fields), top_k, tau, screening=screening)
        strengths = [values[i] if rank < kept else 0.0 for rank, i in enumerate(ids)]
        for row in range(tokens):
            assert got["indices"][row].tolist() == ids
            assert got["activations"][row].tolist() == torch.tensor(strengths).tolist()
            assert got["sparsity"][row].item() == torch.tensor(kept / len(values)).item()


@pytest.mark.parametrize("top_k", [1, 5, 33, 400])
def test_every_feature_sits_on_its_gate(device, top_k):
    """Whole numbers with thresholds among them: a wrong strict compare changes most counts."""
    layer = {"W_enc": integers(321, 48, seed=1), "b_enc": integers(321, seed=2)}
    hidden = integers(60, 48, seed=3).to(device)
    for tau in (0.0, 1.0, 6.0):
        exact(hidden, layer, top_k, tau)
        exact(hidden, {**layer, "threshold": integers(321, low=0, high=12, seed=4)}, top_k, tau)
        for k in (1, 17, 160, 321):
            exact(hidden, {**layer, "k": k}, top_k, tau)


# Ties


def repeated(distinct, times, hidden_size=40):
    return {
        "W_enc": integers(distinct, hidden_size).repeat(times, 1),
        "b_enc": integers(distinct, seed=1).repeat(times),
    }


@pytest.mark.parametrize(
    "layer",
    [
        repeated(1, 500),
        repeated(7, 100),
        repeated(701, 2),
        repeated(3, 3000),
        repeated(4500, 2),
        {"W_enc": torch.zeros(300, 40), "b_enc": torch.ones(300)},
        {"W_enc": torch.zeros(300, 40), "b_enc": torch.zeros(300)},
    ],
    ids=["all equal", "7 x 100", "701 x 2", "3 x 3000", "4500 x 2", "zero weights", "all zero"],
)
@pytest.mark.parametrize("screening", SCREENINGS)
def test_ties(device, layer, screening):
    for tokens in (1, 66):
        hidden = integers(tokens, 40, seed=3).to(device)
        for top_k in (1, 32, 100, 450):
            exact(hidden, layer, top_k, 1.0, screening=screening)


@pytest.mark.parametrize("screening", SCREENINGS)
def test_duplicate_rows_tie_wherever_they_stand(device, screening):
    """A row has the same rounded sums at any place in a tile, beside any neighbour."""
    copies = [0, 1, 63, 64, 65, 500, 511, 512, 1023, 1024, 1025, 2047, 4095, 4096, 4097, 4998, 4999]
    layer = make_layer(5000, 77)
    layer["W_enc"][copies], layer["b_enc"][copies] = (
        layer["W_enc"][13].clone(),
        layer["b_enc"][13].clone(),
    )
    layer["b_enc"][[*copies, 13]] += 6.0
    for tokens in (1, 70):
        hidden = normal(tokens, 77, seed=4).to(device)
        got = encode(hidden, layer, 18, 0.0, screening=screening)
        rows = pre_activations(hidden, layer)[:, 13] > 5.0  # where the copies outdo all others
        assert (got["indices"].cpu()[rows] == torch.tensor(sorted([*copies, 13]))).all()
        assert (got["activations"][rows.to(device)].cpu().diff(dim=-1) == 0).all()
        check(got, hidden, layer, 18, 0.0)


# Hard rows: what a running top-k or a cheap screen gets wrong


def ramp(features, step):
    """Pre-activations that rise or fall by one step per feature, for hidden states of ones."""
    return {
        "W_enc": (1 + step * torch.arange(features)[:, None] / 64).repeat(1, 64) / 64,
        "b_enc": torch.zeros(features),
    }


def spiky_weights():
    layer = make_layer(3000, 64)
    layer["W_enc"][torch.arange(3000), torch.arange(3000) % 64] *= 100
    return layer


def near_the_gate():
    layer = make_layer(3000, 64)
    layer["W_enc"] *= 1e-3
    layer["b_enc"] = 1 + 1e-3 * layer["b_enc"]
    return layer


def mostly_silent():
    layer = make_layer(6000, 64)
    layer["b_enc"] -= 4.0
    return layer


@pytest.mark.parametrize(
    "layer, hidden",
    [
        (ramp(6000, 1e-2), torch.ones(40, 64)),
        (ramp(6000, -1e-2), torch.ones(40, 64)),
        (ramp(3000, 1e-3), torch.ones(40, 64) + 0.01 * normal(40, 64)),
        (near_the_gate(), normal(40, 64)),
        (mostly_silent(), normal(400, 64)),
        (spiky_weights(), normal(40, 64)),
        (make_layer(6000, 64), normal(40, 64) * torch.where(torch.arange(64) == 5, 1000.0, 1.0)),
        (make_layer(6000, 64, kind="jumprelu"), 30 * normal(300, 64)),
        (make_layer(6000, 64), torch.cat([torch.zeros(1, 64), normal(3, 64), torch.zeros(2, 64)])),
    ],
    ids=[
        "rising",
        "falling",
        "near ties",
        "near gate",
        "silent",
        "spiky",
        "outlier input",
        "dense",
        "zero rows",
    ],
)
@pytest.mark.parametrize("screening", SCREENINGS)
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_hard_rows(device, layer, hidden, screening, tau):
    hidden = hidden.to(device)
    encoder = SparseTranscoderEncoder(
        {0: TranscoderWeights(**on(layer, device))}, 50, tau, screening=screening
    )
    check(encoder.encode_layer(0, hidden), hidden, layer, 50, tau, unit=False)
    check(encoder.encode_layer(0, hidden[:1]), hidden[:1], layer, 50, tau, unit=False)


# Scales


def scaled(weights=1.0, **factors):
    layer = make_layer(400, 48)
    return {
        **layer,
        "W_enc": layer["W_enc"] * weights,
        "b_enc": layer["b_enc"] * factors.get("bias", weights),
    }


def strong_features():
    layer = scaled()
    layer["W_enc"][::50] *= 1e4
    return layer


def blind_to_input_0():
    layer = scaled()
    layer["W_enc"][::2, 0] = 0.0
    return layer


def with_element(value):
    hidden = normal(20, 48)
    hidden[::3, 0] = value
    return hidden


@pytest.mark.parametrize(
    "layer, hidden, tau",
    [
        (strong_features(), normal(20, 48), 1.0),
        (scaled(), normal(20, 48) * torch.logspace(-4, 4, 20)[:, None], 1.0),
        (blind_to_input_0(), with_element(1e18), 1.0),
        (blind_to_input_0(), with_element(-1e18), 0.0),
        (scaled(), 1e25 * normal(20, 48), 1.0),
        (scaled(1e25), normal(20, 48), 1.0),
        (scaled(1e-20, bias=0.0), 1e20 * normal(20, 48), 0.5),
        (scaled(1e20, bias=0.0), 1e-20 * normal(20, 48), 0.5),
        (scaled(1e-25), normal(20, 48), 0.0),
        (scaled(bias=0.0), 1e-25 * normal(20, 48), 0.0),
        (scaled(1e-12, bias=0.0), 1e-12 * normal(20, 48), 0.0),
        (scaled(bias=0.0), 1e-40 * normal(20, 48), 0.0),
        (scaled(1e-40), normal(20, 48), 0.0),
        (scaled(bias=1e6), normal(20, 48), 1.0),
    ],
    ids=[
        "some features 1e4",
        "rows over eight decades",
        "element 1e18",
        "element -1e18",
        "hidden 1e25",
        "weights 1e25",
        "hidden 1e20, weights 1e-20",
        "hidden 1e-20, weights 1e20",
        "weights 1e-25",
        "hidden 1e-25",
        "both 1e-12",
        "denormal hidden",
        "denormal weights",
        "bias 1e6",
    ],
)
@pytest.mark.parametrize("screening", SCREENINGS)
def test_scales(device, layer, hidden, tau, screening):
    hidden = hidden.to(device)
    for top_k in (20, 400):
        check(
            encode(hidden, layer, top_k, tau, screening=screening),
            hidden,
            layer,
            top_k,
            tau,
            unit=False,
        )


@pytest.mark.parametrize("screening", SCREENINGS)
def test_overflow_to_infinity_is_a_value_like_others(device, screening):
    layer = fixed([1.0, 1.0, 2.0], W_enc=torch.tensor([[3e38], [-3e38], [1.0]]))
    got = encode(torch.tensor([[100.0], [1.0]], device=device), layer, 3, 1.0, screening=screening)
    assert got["activations"].tolist() == [
        [math.inf, 102.0, 0.0],
        [torch.tensor(3e38).item(), 3.0, 0.0],
    ]
    assert got["indices"].tolist() == [[0, 2, 1], [0, 2, 1]]
    assert got["sparsity"].tolist() == [torch.tensor(2 / 3).item()] * 2


def test_float16_reaches_its_ends(device):
    layer = make_layer(100, 16, dtype=torch.float16)
    hidden = torch.full((3, 16), 65504.0).half().to(device)
    hidden[1], hidden[2] = -65504.0, 6e-8
    check(encode(hidden, layer, 20, 0.0), hidden, layer, 20, 0.0, unit=False)


# Rows with NaN or Inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("screening", SCREENINGS)
def test_a_bad_row_spoils_itself_alone(device, bad, kind, screening):
    layer = make_layer(200, 50, kind=kind)
    hidden = normal(70, 50, seed=3)
    clean = encode(hidden.to(device), layer, 20, 0.5, screening=screening)
    spoiled = [0, 1, 33, 69]
    hidden[spoiled, [0, 17, 48, 49]] = bad
    hidden = hidden.to(device)
    got = encode(hidden, layer, 20, 0.5, screening=screening)
    check(got, hidden, layer, 20, 0.5)
    others = [row for row in range(70) if row not in spoiled]
    assert all(
        same_bits(got[name][others], clean[name][others])
        for name in ("activations", "indices", "sparsity")
    )


def test_a_bad_row_is_seen_even_by_zero_weights(device):
    hidden = torch.tensor([[math.inf] * 8, [0.0] * 8, [math.nan] * 8], device=device)
    got = encode(hidden, fixed([2.0, 3.0]), 5, 1.0)
    assert got["activations"].isnan().tolist() == [[True, True], [False, False], [True, True]]
    assert got["sparsity"].isnan().tolist() == [True, False, True]
    assert got["indices"].tolist() == [[0, 1], [1, 0], [0, 1]]


def test_only_bad_rows(device):
    hidden = torch.full((2, 3, 8), math.nan, device=device)
    check(encode(hidden, make_layer(50, 8), 7, 1.0), hidden, make_layer(50, 8), 7, 1.0)


def test_a_bad_row_with_layer_norm(device):
    layer = make_layer(90, 20, ln_weight=torch.ones(20), ln_bias=torch.zeros(20))
    hidden = normal(5, 20)
    hidden[2, 3] = math.inf
    hidden = hidden.to(device)
    check(encode(hidden, layer, 9, 0.5), hidden, layer, 9, 0.5)


# Shapes and layouts


@pytest.mark.parametrize("lead", [(1,), (5,), (1, 1), (1, 7), (3, 1), (2, 9), (4, 300)])
def test_shapes(device, lead):
    layer = make_layer(130, 24)
    hidden = normal(*lead, 24).to(device)
    check(encode(hidden, layer, 10, 0.5), hidden, layer, 10, 0.5)


@pytest.mark.parametrize("lead", [(0,), (0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("method", ["encode_layer", "encode_chunked", "encode_all_layers"])
def test_empty(device, lead, method):
    encoder = SparseTranscoderEncoder({3: TranscoderWeights(**on(make_layer(130, 24), device))}, 10)
    hidden = torch.empty(*lead, 24, device=device)
    got = (
        encoder.encode_all_layers({3: hidden})[3]
        if method == "encode_all_layers"
        else getattr(encoder, method)(3, hidden)
    )
    check(got, hidden, make_layer(130, 24), 10, 1.0)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, ::2, :24],
        lambda x: x[..., ::2],
        lambda x: x[..., 1:25],
        lambda x: x[1:, 3:, 24:],
        lambda x: x.transpose(0, 1)[..., :24],
        lambda x: x.permute(2, 0, 1)[:, :, :24],
        lambda x: x[:1, :, :24].expand(3, -1, -1),
        lambda x: x[:, :1, :24].expand(-1, 9, -1),
        lambda x: x[:, :, :1].expand(-1, -1, 24),
        lambda x: x[0, :, :24],
        lambda x: x[:, 0, 24:],
        lambda x: x[0, 0, :24].expand(6, 24),
        lambda x: x.flatten().as_strided((5, 24), (1, 1)),
    ],
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_any_strides(device, view, dtype):
    layer = make_layer(130, 24)
    base = normal(4, 24, 48, seed=8).to(device, dtype)
    hidden, before = view(base), base.clone()
    weights = TranscoderWeights(**on(layer, device))
    encoder = SparseTranscoderEncoder({0: weights}, 10, 0.5, chunk_size=11)
    got = encoder.encode_layer(0, hidden)
    check(got, hidden, layer, 10, 0.5)
    assert same_bits(got, encoder.encode_layer(0, hidden.contiguous()))
    assert torch.equal(base, before)


@pytest.mark.parametrize(
    "stored",
    [
        lambda w: w.T.contiguous().T,
        lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
        lambda w: torch.cat([w[:1], w])[1:],
        torch.nn.Parameter,
    ],
    ids=["transposed", "padded", "offset", "parameter"],
)
def test_weights_in_any_layout(device, stored):
    layer = make_layer(130, 24)
    layer["W_enc"] = stored(layer["W_enc"].to(device))
    hidden = normal(30, 24).to(device)
    check(encode(hidden, layer, 10, 0.5), hidden, layer, 10, 0.5)


def test_hidden_that_requires_grad(device):
    layer = make_layer(130, 24)
    weights = TranscoderWeights(**on(layer, device))
    encoder = SparseTranscoderEncoder({0: weights}, 10, 0.5)
    leaf = normal(30, 24).to(device).requires_grad_()
    check(encoder.encode_layer(0, leaf * 2), leaf * 2, layer, 10, 0.5)
    with torch.inference_mode():
        hidden = leaf.detach() * 2
        check(encoder.encode_layer(0, hidden), hidden, layer, 10, 0.5)
    with torch.no_grad():
        assert same_bits(
            encoder.encode_layer(0, leaf * 2), encoder.encode_layer(0, leaf.detach() * 2)
        )


def test_results_are_the_callers_own(device):
    """A later call leaves earlier results alone, and nothing given to the encoder is changed."""
    layer = on(make_layer(130, 24, kind="jumprelu"), device)
    given = {name: value.clone() for name, value in layer.items()}
    encoder = SparseTranscoderEncoder({0: TranscoderWeights(**layer)}, 10, 0.5)
    hidden = normal(30, 24).to(device)
    first = encoder.encode_layer(0, hidden)
    kept = {
        name: value.clone() if torch.is_tensor(value) else value for name, value in first.items()
    }
    encoder.encode_layer(0, normal(30, 24, seed=1).to(device))
    encoder.encode_all_layers({0: -hidden})
    assert same_bits(first, kept)
    assert torch.equal(hidden, normal(30, 24).to(device))
    assert all(torch.equal(layer[name], given[name]) for name in given)


# Input side


@pytest.mark.parametrize("dtype", FLOATS)
def test_input_bias_is_subtracted(device, dtype):
    layer = make_layer(130, 24, input_bias=2 * normal(24, seed=7))
    hidden = (layer["input_bias"] + normal(30, 24)).to(device, dtype)
    check(encode(hidden, layer, 10, 0.5), hidden, layer, 10, 0.5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("hidden_size", [1, 24, 65, 800])
def test_layer_norm(device, dtype, hidden_size):
    norm = {
        "ln_weight": 1 + 0.3 * normal(hidden_size, seed=7),
        "ln_bias": 0.3 * normal(hidden_size, seed=8),
    }
    layer = make_layer(130, hidden_size, **norm)
    hidden = (3 * normal(30, hidden_size) + 1).to(device, dtype)
    check(encode(hidden, layer, 10, 0.5), hidden, layer, 10, 0.5)


@pytest.mark.parametrize(
    "hidden",
    [
        normal(9, 64) + 50,
        1e-3 * normal(9, 64),
        torch.full((9, 64), 7.0),
        torch.zeros(9, 64),
        1e3 * normal(9, 64),
    ],
    ids=["far from zero", "eps matters", "constant", "zero", "large"],
)
def test_layer_norm_on_hard_rows(device, hidden):
    layer = make_layer(
        130, 64, ln_weight=1 + 0.3 * normal(64, seed=7), ln_bias=0.3 * normal(64, seed=8)
    )
    hidden = hidden.to(device)
    check(encode(hidden, layer, 10, 0.1), hidden, layer, 10, 0.1)


# The other ways in


@pytest.mark.parametrize("top_k", [25, 200, 300])
def test_scattering_a_result_gives_the_masked_matrix(device, top_k):
    layer = {"W_enc": integers(200, 16, seed=1), "b_enc": integers(200, seed=2) - 8}
    hidden = integers(50, 16, seed=3).to(device)
    got = encode(hidden, layer, top_k, 2.0)
    pre = pre_activations(hidden, layer).float()
    masked = torch.where(pre >= 2.0, pre, 0.0)
    whole = (masked > 0).sum(-1) <= top_k
    assert whole.any()
    dense = torch.zeros_like(masked).scatter(1, got["indices"].cpu(), got["activations"].cpu())
    assert torch.equal(dense[whole], masked[whole])


def test_top_k_none_takes_each_layers_own(device):
    layers = {1: make_layer(100, 24, kind="topk", k=7), 2: make_layer(60, 24, kind="topk", k=30)}
    encoder = SparseTranscoderEncoder(
        {i: TranscoderWeights(**on(w, device)) for i, w in layers.items()}, None, 0.0
    )
    hidden = normal(20, 24).to(device)
    for i, got in encoder.encode_all_layers({1: hidden, 2: hidden}).items():
        check(got, hidden, layers[i], layers[i]["k"], 0.0)
        assert same_bits(got, encoder.encode_layer(i, hidden))


def test_layers_of_different_kind_size_and_dtype(device):
    layers = {
        4: make_layer(100, 24),
        0: make_layer(333, 17, kind="jumprelu", dtype=torch.bfloat16),
        11: make_layer(64, 64, kind="topk", dtype=torch.float16),
        7: make_layer(5000, 8),
    }
    encoder = SparseTranscoderEncoder(
        {i: TranscoderWeights(**on(w, device), layer=i) for i, w in layers.items()}, 40, 0.5
    )
    hidden = {
        i: normal(2, 3 + i, w["W_enc"].shape[1], seed=i).to(device) for i, w in layers.items()
    }
    got = encoder.encode_all_layers(hidden)
    assert set(got) == set(layers)
    for i, layer in layers.items():
        assert type(got[i]["layer"]) is int and got[i]["layer"] == i
        assert set(got[i]) == {"layer", "activations", "indices", "sparsity"}
        check(got[i], hidden[i], layer, 40, 0.5)


@pytest.mark.parametrize(
    "single", [encode_single_layer, SparseTranscoderEncoder.encode_single_layer]
)
@pytest.mark.parametrize("lead", [(5,), (2, 9), (0, 3)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_encode_single_layer(device, single, lead, dtype):
    layer = make_layer(130, 24)
    hidden = normal(*lead, 24).to(device, dtype)
    weights = on(layer, device)
    got = single(hidden, weights["W_enc"], weights["b_enc"], 10, 0.5)
    named = dict(zip(("activations", "indices", "sparsity"), got, strict=True))
    check(named, hidden, layer, 10, 0.5)
    want = encode(hidden, layer, 10, 0.5)
    assert all(same_bits(named[name], want[name]) for name in named)


def test_defaults():
    layer = make_layer(130, 24)
    hidden = normal(30, 24)
    check(
        SparseTranscoderEncoder({0: TranscoderWeights(**layer)}).encode_layer(0, hidden),
        hidden,
        layer,
        20,
        1.0,
    )


# The package's own specification


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("top_k", [1, 20, 200])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_reference_agrees_with_the_oracle(kind, top_k, tau):
    layer = make_layer(
        130, 24, kind=kind, ln_weight=1 + 0.3 * normal(24, seed=7), ln_bias=0.3 * normal(24, seed=8)
    )
    hidden = normal(2, 15, 24)
    values, ids, sparsity = reference.encode(hidden, TranscoderWeights(**layer), top_k, tau)
    check(
        {"activations": values.float(), "indices": ids, "sparsity": sparsity.float()},
        hidden,
        layer,
        top_k,
        tau,
    )

    fields = {"threshold": integers(130, low=0, high=9, seed=4)} if kind == "jumprelu" else {}
    whole = {"W_enc": integers(130, 24, seed=1), "b_enc": integers(130, seed=2), **fields}
    whole |= {"k": 30} if kind == "topk" else {}
    hidden = integers(40, 24, seed=3)
    hidden[3, 4] = math.nan
    for dtype in (torch.float64, torch.float32):
        got = reference.encode(hidden, TranscoderWeights(**whole), top_k, tau, dtype=dtype)
        wanted = expected(hidden, whole, top_k, tau)
        assert all(same_bits(a.to(b.dtype), b) for a, b in zip(got, wanted, strict=True))
