"""encode_sparse and decode against float64: every kept feature, and what the decoder makes."""

import math

import pytest
import torch
from oracle import (
    FLOATS,
    broken_rows,
    gates,
    make_layer,
    normal,
    on,
    pre_activations,
    same_bits,
    tolerances,
    wide,
)
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights

F, H = 300, 48
VARIANTS = {
    "plain": {},
    "input bias": {"input_bias": normal(H, seed=20)},
    "LayerNorm": {"ln_weight": 1 + 0.1 * normal(H, seed=21), "ln_bias": 0.1 * normal(H, seed=22)},
}


def encoder_of(layer, device="cpu", top_k=20, tau=0.5, **options):
    return SparseTranscoderEncoder(
        {0: TranscoderWeights(**on(layer, device))}, top_k, tau, **options
    )


def check_sparse(found, hidden, layer, tau):
    """Assert the form, every value, and that just the kept features are there; return it dense."""
    features = layer["W_enc"].shape[0]
    rows = hidden.shape[:-1].numel()
    assert (found.layout, found.dtype, found.shape) == (
        torch.sparse_csr,
        torch.float32,
        (rows, features),
    )
    assert found.device == hidden.device and not found.requires_grad
    begins, ids, values = (
        found.crow_indices().cpu(),
        found.col_indices().cpu(),
        found.values().cpu(),
    )
    assert begins.dtype == ids.dtype == torch.int64
    assert begins[0] == 0 and begins[-1] == len(ids) == len(values)
    row_of = torch.arange(rows).repeat_interleave(begins.diff())
    same_row = row_of[1:] == row_of[:-1]
    assert (ids[1:] > ids[:-1])[same_row].all(), "features do not ascend in a row"

    broken = broken_rows(hidden)
    assert torch.equal(row_of[broken[row_of]], broken.nonzero().flatten()), (
        "a broken row must have one entry"
    )
    assert values[broken[row_of]].isnan().all() and (ids[broken[row_of]] == 0).all()
    dense = torch.zeros(rows, features)
    dense[row_of, ids] = values
    sound = dense[~broken]
    x = hidden.detach().cpu().reshape(rows, -1)[~broken]
    pre = pre_activations(x, layer)
    slack = tolerances(x, layer, pre, unit=True)
    surely, possibly = gates(pre, slack, layer, tau)
    there = sound > 0
    assert len(values) == there.sum() + broken.sum(), "a stored value is not positive"
    assert (there | ~surely).all(), "a kept feature is missing"
    assert (possibly | ~there).all(), "a feature below its gate is stored"
    assert ((sound - pre).abs() <= slack)[there].all()
    return dense


def check_decoded(got, dense, layer, hidden, dtype=torch.float32):
    """got [N, d_out] is W_dec @ dense + b_dec + W_skip @ x, within 1e-5 of its partial sums."""
    acts, W_dec = wide(dense), wide(layer["W_dec"])
    want, size = acts @ W_dec.T, acts.abs() @ W_dec.abs().T
    if layer.get("b_dec") is not None:
        bias = wide(layer["b_dec"])
        want[:, : len(bias)] += bias
        size[:, : len(bias)] += bias.abs()
    if layer.get("W_skip") is not None:
        x = wide(hidden).reshape(-1, hidden.shape[-1])
        want[:, : len(layer["W_skip"])] += x @ wide(layer["W_skip"]).T
        size[:, : len(layer["W_skip"])] += x.abs() @ wide(layer["W_skip"]).abs().T
    assert got.dtype == torch.float32 and got.shape == want.shape
    sound = ~dense.isnan().any(1)
    assert ((got.cpu().double() - want).abs() <= 1e-5 * size + 1e-30)[sound].all()
    assert got.cpu()[~sound].isnan().all()


# encode_sparse


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tau", [0.0, 0.5, 100.0])
def test_every_kept_feature(device, kind, variant, tau):
    layer = make_layer(F, H, kind=kind, **VARIANTS[variant])
    for tokens in (1, 70):
        hidden = normal(tokens, H, seed=5).to(device)
        dense = check_sparse(
            encoder_of(layer, device, 20, tau).encode_sparse(0, hidden), hidden, layer, tau
        )
        assert (dense > 0).any() == (tau < 100)


@pytest.mark.parametrize("hidden_dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_dtypes(device, hidden_dtype, weight_dtype, kind):
    layer = make_layer(F, H, kind=kind, dtype=weight_dtype)
    hidden = normal(40, H, seed=5).to(device, hidden_dtype)
    check_sparse(encoder_of(layer, device).encode_sparse(0, hidden), hidden, layer, 0.5)


@pytest.mark.parametrize("features, hidden_size", [(1, 1), (31, 7), (4097, 33), (20001, 5)])
def test_sizes(device, features, hidden_size):
    layer = make_layer(features, hidden_size)
    hidden = normal(3, 5, hidden_size, seed=5).to(device)
    check_sparse(encoder_of(layer, device).encode_sparse(0, hidden), hidden, layer, 0.5)


@pytest.mark.parametrize("kind", ["relu", "topk"])
@pytest.mark.parametrize("tau", [0.0, 0.5])
def test_it_is_masked_bit_for_bit(device, kind, tau):
    """The same matrix as a top-k result of all features, scattered."""
    layer = make_layer(F, H, kind=kind)
    hidden = normal(70, H, seed=6).to(device)
    encoder = encoder_of(layer, device, F, tau)
    result = encoder.encode_layer(0, hidden)
    masked = torch.zeros(70, F, device=device).scatter(1, result["indices"], result["activations"])
    found = encoder.encode_sparse(0, hidden)
    assert same_bits(found.to_dense(), masked)
    kept = found.crow_indices().diff()
    assert same_bits((kept.double() / F).float(), result["sparsity"])
    assert (kept.max() > 20 and kept.min() < kept.max()) or kind == "topk"


def test_chunks_batches_and_neighbours_do_not_matter(device):
    layer = make_layer(F, H)
    hidden = normal(2, 150, H, seed=7).to(device)
    want = encoder_of(layer, device, chunk_size=1000).encode_sparse(0, hidden)
    check_sparse(want, hidden, layer, 0.5)
    for chunk_size in (1, 7, 64, 299):
        got = encoder_of(layer, device, chunk_size=chunk_size).encode_sparse(0, hidden)
        for part in ("crow_indices", "col_indices", "values"):
            assert same_bits(getattr(got, part)(), getattr(want, part)()), part
    encoder = encoder_of(layer, device)
    alone = torch.cat(
        [encoder.encode_sparse(0, row[None]).to_dense() for row in hidden.reshape(-1, H)]
    )
    assert same_bits(alone, want.to_dense())


@pytest.mark.parametrize(
    "strided",
    [
        lambda x: x.repeat_interleave(2, -1)[..., ::2],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
        lambda x: x[:1].expand(4, -1, -1),
    ],
)
def test_strides_and_gradients(device, strided):
    layer = make_layer(F, H)
    hidden = strided(normal(3, 11, H, seed=8).to(device)).requires_grad_()
    found = encoder_of(layer, device).encode_sparse(0, hidden)
    check_sparse(found, hidden, layer, 0.5)
    assert same_bits(
        found.to_dense(),
        encoder_of(layer, device).encode_sparse(0, hidden.detach().clone()).to_dense(),
    )


@pytest.mark.parametrize("kind", ["relu", "topk"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_rows(device, kind, value):
    layer = make_layer(F, H, kind=kind)
    hidden = normal(30, H, seed=9)
    hidden[[0, 17, 29], [3, 0, 47]] = value
    encoder = encoder_of(layer, device, chunk_size=8)
    found = encoder.encode_sparse(0, hidden.to(device))
    dense = check_sparse(found, hidden.to(device), layer, 0.5)
    sound = hidden.isfinite().all(1)
    assert same_bits(
        dense[sound], encoder.encode_sparse(0, hidden[sound].to(device)).to_dense().cpu()
    )


@pytest.mark.parametrize("shape", [(0, H), (2, 0, H), (0, 3, H)])
def test_no_rows(device, shape):
    layer = make_layer(F, H, W_dec=normal(H, F))
    encoder = encoder_of(layer, device)
    found = encoder.encode_sparse(0, torch.zeros(shape, device=device))
    assert found.shape == (0, F) and found.values().numel() == 0
    assert encoder.decode(0, found).shape == (0, H)
    assert (
        encoder.decode(0, encoder.encode_layer(0, torch.zeros(shape, device=device))).shape == shape
    )


def test_rows_without_features(device):
    layer = make_layer(
        F, H, b_enc=torch.full((F,), -1e6), W_dec=normal(H, F), b_dec=normal(H, seed=3)
    )
    encoder = encoder_of(layer, device)
    found = encoder.encode_sparse(0, normal(5, H).to(device))
    assert found.crow_indices().tolist() == [0] * 6
    for features in (found, encoder.encode_layer(0, normal(5, H).to(device))):
        assert same_bits(encoder.decode(0, features).cpu(), layer["b_dec"].expand(5, H))


# decode


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("parts", [(), ("b_dec",), ("W_skip",), ("b_dec", "W_skip")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_decode(device, kind, parts, dtype):
    more = {"b_dec": normal(H, seed=11), "W_skip": normal(H, H, seed=12)}
    layer = make_layer(F, H, kind=kind, dtype=dtype, W_dec=normal(H, F, seed=10).to(dtype))
    layer |= {name: more[name].to(dtype) for name in parts}
    hidden = normal(3, 11, H, seed=13).to(device)
    encoder = encoder_of(layer, device)
    top, sparse = encoder.encode_layer(0, hidden), encoder.encode_sparse(0, hidden)
    x = hidden if "W_skip" in parts else None
    dense = torch.zeros(33, F).scatter(
        1, top["indices"].cpu().view(33, -1), top["activations"].cpu().view(33, -1)
    )
    got = encoder.decode(0, top, x)
    assert got.shape == hidden.shape and not got.requires_grad
    check_decoded(got.view(33, H), dense, layer, hidden)
    check_decoded(encoder.decode(0, sparse, x), sparse.to_dense().cpu(), layer, hidden)
    assert same_bits(
        encoder.decode(0, top, hidden), got
    )  # where there is no skip connection hidden plays no part


@pytest.mark.parametrize("bias", [H, 3 * H])
def test_decode_of_a_cross_layer_transcoder(device, bias):
    """[3 * H, F]: rows of layers 4, 5 and 6. A bias [H] and the skip belong to the layer itself."""
    layer = make_layer(
        F,
        H,
        W_dec=normal(3 * H, F, seed=10),
        b_dec=normal(bias, seed=11),
        W_skip=normal(H, H, seed=12),
    )
    weights = TranscoderWeights(**on(layer, device), layer=4, write_layers=3)
    encoder = SparseTranscoderEncoder({4: weights}, 20, 0.5)
    hidden = normal(2, 6, H, seed=13).to(device)
    sparse = encoder.encode_sparse(4, hidden)
    for features, shape in ((encoder.encode_layer(4, hidden), (2, 6, H)), (sparse, (12, H))):
        got = encoder.decode(4, features, hidden)
        assert {layer: part.shape for layer, part in got.items()} == {4: shape, 5: shape, 6: shape}
    check_decoded(torch.cat(list(got.values()), -1), sparse.to_dense().cpu(), layer, hidden)


@pytest.mark.parametrize("width", [1, 7, H // 2, 2 * H, 3 * H])
def test_decode_to_a_place_of_another_width(device, width):
    """[d_out, F] is one layer's output, also where d_out is a multiple of H."""
    layer = make_layer(
        F,
        H,
        W_dec=normal(width, F, seed=10),
        b_dec=normal(width, seed=11),
        W_skip=normal(width, H, seed=12),
    )
    encoder = SparseTranscoderEncoder({4: TranscoderWeights(**on(layer, device), layer=4)}, 20, 0.5)
    hidden = normal(2, 6, H, seed=13).to(device)
    sparse = encoder.encode_sparse(4, hidden)
    for features, shape in (
        (encoder.encode_layer(4, hidden), (2, 6, width)),
        (sparse, (12, width)),
    ):
        got = encoder.decode(4, features, hidden)
        assert got.shape == shape
    check_decoded(got, sparse.to_dense().cpu(), layer, hidden)
    assert encoder.steer(4, {0: 2.0}).shape == (width,)


@pytest.mark.parametrize(
    "more, words",
    [
        ({"write_layers": 2}, "W_dec must be \\[96, 300\\], got \\[144, 300\\]"),
        ({"write_layers": 0}, "write_layers must be at least 1, got 0"),
        ({"W_dec": None, "write_layers": 2}, "W_dec is needed with write_layers 2, got none"),
        ({"b_dec": normal(H)}, "b_dec must be \\[144\\], got \\[48\\]"),
        ({"W_skip": normal(H, H)}, "W_skip must be \\[144, 48\\], got \\[48, 48\\]"),
    ],
)
def test_how_many_layers_are_written_to_is_never_guessed(more, words):
    layer = make_layer(F, H, W_dec=normal(3 * H, F, seed=10)) | more
    with pytest.raises(ValueError, match=words):
        SparseTranscoderEncoder({4: TranscoderWeights(**layer, layer=4)}, 20, 0.5)


def test_decode_does_not_depend_on_the_batch(device):
    """Also where the features of one row are more than are gathered at a time."""
    layer = make_layer(9001, 1025, W_dec=normal(1025, 9001, seed=10))
    hidden = normal(9, 1025, seed=13).to(device)
    encoder = encoder_of(layer, device, tau=0.0)
    found = encoder.encode_sparse(0, hidden)
    got = encoder.decode(0, found)
    check_decoded(got, found.to_dense().cpu(), layer, hidden)
    for row in (0, 8):
        assert same_bits(
            encoder.decode(0, encoder.encode_sparse(0, hidden[row : row + 1]))[0], got[row]
        )


def test_decode_of_broken_rows(device):
    layer = make_layer(F, H, W_dec=normal(H, F, seed=10), b_dec=normal(H, seed=11))
    hidden = normal(6, H, seed=13).to(device)
    hidden[2, 0] = math.nan
    encoder = encoder_of(layer, device)
    found = encoder.encode_sparse(0, hidden)
    check_decoded(encoder.decode(0, found), found.to_dense().cpu(), layer, hidden)
    assert (
        encoder.decode(0, encoder.encode_layer(0, hidden)).isnan().any(1).tolist()
        == [False] * 2 + [True] + [False] * 3
    )


def csr(begins, ids, values, shape):
    return torch.sparse_csr_tensor(begins, ids, values, shape, check_invariants=False)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            lambda f, x: (f, None),
            ValueError,
            "layer 0: the skip connection needs the hidden states, got none",
        ),
        (
            lambda f, x: (f, x[:2]),
            ValueError,
            "layer 0: hidden must have the features' 3 rows, got [2, 48]",
        ),
        (lambda f, x: (f, x[:, :5]), ValueError, "layer 0: hidden must be [.., 48], got [3, 5]"),
        (
            lambda f, x: (f.to_dense(), x),
            TypeError,
            "features must be an encode result or sparse CSR, got torch.strided",
        ),
        (
            lambda f, x: (3, x),
            TypeError,
            "features must be an encode result or sparse CSR, got int",
        ),
        (
            lambda f, x: (csr([0, 1, 1, 1], [300], [1.0], (3, F)), x),
            ValueError,
            "features must be in [0, 300), got 300",
        ),
        (
            lambda f, x: (csr([0, 1, 1, 1], [-1], [1.0], (3, F)), x),
            ValueError,
            "features must be in [0, 300), got -1",
        ),
        (
            lambda f, x: (csr([0, 2, 1, 1], [1], [1.0], (3, F)), x),
            ValueError,
            "row_begin must ascend from 0",
        ),
        (lambda f, x: (f.double(), x), TypeError, "activations must be float32, got float64"),
    ],
)
def test_decode_errors(change, error, message):
    layer = make_layer(F, H, W_dec=normal(H, F, seed=10), W_skip=normal(H, H, seed=12))
    hidden = normal(3, H, seed=13)
    encoder = encoder_of(layer)
    features, x = change(encoder.encode_sparse(0, hidden), hidden)
    with pytest.raises(error) as raised:
        encoder.decode(0, features, x)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_no_decoder():
    encoder = encoder_of(make_layer(F, H))
    with pytest.raises(ValueError, match="layer 0: decode needs W_dec"):
        encoder.decode(0, encoder.encode_sparse(0, normal(3, H)))
    with pytest.raises(KeyError, match="layer 7: there is no transcoder for it"):
        encoder.encode_sparse(7, normal(3, H))


def test_features_of_another_layer_are_refused():
    layer = make_layer(F, H)
    weights = TranscoderWeights(**layer)
    encoder = SparseTranscoderEncoder({0: weights, 1: weights}, 5, 0.5)
    hidden = normal(4, H, seed=5)
    with pytest.raises(
        ValueError, match=r"layer 1: features must be of this layer, got .* layer 0"
    ):
        encoder.decode(1, encoder.encode_layer(0, hidden))
    other = encoder_of(make_layer(F // 2, H)).encode_sparse(0, hidden)
    with pytest.raises(ValueError, match=r"layer 1: features must be \[N, 300\], got \[4, 150\]"):
        encoder.decode(1, other)
