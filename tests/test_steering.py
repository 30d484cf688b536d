"""Decoder directions and steering deltas."""

import pytest
import torch
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights

H, F = 8, 48


@pytest.fixture
def weights():
    torch.manual_seed(0)
    W_dec = torch.randn(H, F)
    return {
        2: TranscoderWeights(torch.randn(F, H), torch.randn(F), W_dec),
        5: TranscoderWeights(torch.randn(F, H), torch.randn(F), torch.randn(H, F).bfloat16()),
        7: TranscoderWeights(torch.randn(F, H), torch.randn(F)),
    }


@pytest.fixture
def encoder(weights):
    return SparseTranscoderEncoder(weights)


@pytest.mark.parametrize("layer", [2, 5])
@pytest.mark.parametrize("feature", [0, 17, F - 1])
def test_feature_vector_is_the_decoder_column(encoder, weights, layer, feature):
    vector = encoder.feature_vector(layer, feature)
    assert vector.shape == (H,) and vector.dtype == torch.float32 and vector.is_contiguous()
    assert torch.equal(vector, weights[layer].W_dec[:, feature].float())


def test_feature_vector_is_the_callers_own(encoder, weights):
    before = weights[2].W_dec.clone()
    encoder.feature_vector(2, 3).fill_(9)
    assert torch.equal(weights[2].W_dec, before)


def test_square_decoder():
    W_dec = torch.arange(H * H).reshape(H, H).float()
    encoder = SparseTranscoderEncoder(
        {0: TranscoderWeights(torch.randn(H, H), torch.zeros(H), W_dec)}
    )
    assert torch.equal(encoder.feature_vector(0, 1), W_dec[:, 1])


def test_no_gradient():
    W_dec = torch.randn(H, F, requires_grad=True)
    encoder = SparseTranscoderEncoder(
        {0: TranscoderWeights(torch.randn(F, H), torch.zeros(F), W_dec)}
    )
    assert not encoder.feature_vector(0, 1).requires_grad
    assert not encoder.steer(0, {1: 2.0}).requires_grad


@pytest.mark.parametrize("layer", [2, 5])
def test_steer_sums_strength_times_direction(encoder, weights, layer):
    strengths = {4: 2.5, 0: -1.0, F - 1: 7}
    delta = encoder.steer(layer, strengths)
    expected = sum(
        strength * weights[layer].W_dec[:, feature].double()
        for feature, strength in strengths.items()
    )
    assert delta.shape == (H,) and delta.dtype == torch.float32
    torch.testing.assert_close(delta.double(), expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(encoder.steer(layer, {4: 1.0}), encoder.feature_vector(layer, 4))


def test_steer_nothing(encoder):
    assert torch.equal(encoder.steer(2, {}), torch.zeros(H))


def test_decoder_that_writes_to_many_layers():
    W_dec = torch.randn(3 * H, F)
    encoder = SparseTranscoderEncoder(
        {4: TranscoderWeights(torch.randn(F, H), torch.zeros(F), W_dec, write_layers=3)}
    )
    vectors, deltas = encoder.feature_vector(4, 7), encoder.steer(4, {7: 2.0})
    assert list(vectors) == list(deltas) == [4, 5, 6]
    for i, layer in enumerate(vectors):
        assert torch.equal(vectors[layer], W_dec[i * H : (i + 1) * H, 7])
        assert torch.equal(deltas[layer], 2 * vectors[layer])


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (
            lambda e: e.feature_vector(3, 0),
            KeyError,
            "layer 3: there is no transcoder for it, only for layers 2, 5, 7",
        ),
        (lambda e: e.steer(3, {0: 1.0}), KeyError, "layer 3: there is no transcoder"),
        (lambda e: e.feature_vector(7, 0), ValueError, "layer 7: the weights have no W_dec"),
        (lambda e: e.steer(7, {}), ValueError, "layer 7: the weights have no W_dec"),
        (lambda e: e.feature_vector(2, F), ValueError, "layer 2: feature must be 0 to 47, got 48"),
        (lambda e: e.feature_vector(2, -1), ValueError, "layer 2: feature must be 0 to 47, got -1"),
        (
            lambda e: e.steer(2, {0: 1.0, F: 1.0}),
            ValueError,
            "layer 2: feature must be 0 to 47, got 48",
        ),
        (lambda e: e.steer(2, {0: float("nan")}), ValueError, "strength must be a number, got NaN"),
        (
            lambda e: e.steer(2, {0: float("inf")}),
            ValueError,
            "strength of feature 0 must be finite, got inf",
        ),
        (
            lambda e: e.steer(2, [1, 2]),
            TypeError,
            "strengths must map features to numbers, got list",
        ),
        (lambda e: e.steer(2, {1.5: 1.0}), TypeError, "feature must be an integer, got float"),
        (lambda e: e.steer(2, {1: None}), TypeError, "strength must be a number, got NoneType"),
        (lambda e: e.feature_vector("a", 0), TypeError, "layer must be an integer, got str"),
    ],
)
def test_errors(encoder, call, kind, message):
    with pytest.raises(kind, match=message) as error:
        call(encoder)
    assert "\n" not in str(error.value)


def test_autocast_rounds_no_direction():
    weights = TranscoderWeights(torch.randn(30, 8), torch.randn(30), torch.randn(8, 30))
    encoder = SparseTranscoderEncoder({0: weights}, 4, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.feature_vector(0, 7), weights.W_dec[:, 7])
        assert encoder.steer(0, {7: 2.0}).dtype == torch.float32
