"""extract_attribution_features against a slow collection of all kept features."""

import math

import pytest
import torch
from oracle import integers, make_layer, normal, on
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights

TYPES = {
    "node_id": str,
    "feature": int,
    "layer": str,
    "batch_idx": int,
    "ctx_idx": int,
    "feature_type": str,
    "influence": float,
    "activation": float,
}


def build(layers, device, top_k=5, tau=0.5):
    return SparseTranscoderEncoder(
        {i: TranscoderWeights(**on(w, device), layer=i) for i, w in layers.items()}, top_k, tau
    )


def strongest(encoder, hidden_states, top_k_global):
    """[(layer, batch, position, feature, activation)], strongest first, else in this order."""
    found = []
    for layer, hidden in hidden_states.items():
        result = encoder.encode_layer(layer, hidden if hidden.dim() == 3 else hidden[None])
        for batch, rows in enumerate(result["activations"].tolist()):
            for position, values in enumerate(rows):
                for rank, value in enumerate(values):
                    if value > 0:
                        index = int(result["indices"][batch, position, rank])
                        found.append((layer, batch, position, index, value))
    found.sort(key=lambda f: (-f[4], f[0], f[1], f[2], f[3]))
    return found[:top_k_global]


def check(encoder, hidden_states, top_k_global):
    got = encoder.extract_attribution_features(hidden_states, top_k_global=top_k_global)
    want = strongest(encoder, hidden_states, top_k_global)
    assert [
        (int(f["layer"]), f["batch_idx"], f["ctx_idx"], f["feature"], f["activation"]) for f in got
    ] == want
    several = any(hidden.dim() == 3 and hidden.shape[0] > 1 for hidden in hidden_states.values())
    for f in got:
        assert {name: type(value) for name, value in f.items()} == TYPES
        place = (
            [f["layer"], f["batch_idx"], f["feature"], f["ctx_idx"]]
            if several
            else [f["layer"], f["feature"], f["ctx_idx"]]
        )
        assert f["node_id"] == "_".join(map(str, place))
        assert f["feature_type"] == "cross layer transcoder"
        assert math.isfinite(f["influence"])
    return got


@pytest.mark.parametrize("lead", [(7,), (1, 7), (3, 7), (2, 1), (1, 1), (4, 0)])
@pytest.mark.parametrize("top_k_global", [1, 10, 100, 100_000])
def test_strongest_first(device, lead, top_k_global):
    layers = {
        0: make_layer(60, 12),
        12: make_layer(200, 20, kind="jumprelu"),
        3: make_layer(33, 12, dtype=torch.bfloat16),
    }
    hidden = {i: normal(*lead, w["W_enc"].shape[1], seed=i).to(device) for i, w in layers.items()}
    check(build(layers, device), hidden, top_k_global)


@pytest.mark.parametrize("top_k_global", [1, 7, 40, 200, 5000])
def test_ties(device, top_k_global):
    """Whole numbers: most strengths occur many times, everywhere. Layer 10 comes after 9."""
    layers = {
        i: {"W_enc": integers(50, 6, seed=i), "b_enc": integers(50, seed=i + 1)} for i in (10, 2, 9)
    }
    hidden = {i: integers(3, 8, 6, seed=20) for i in layers}
    got = check(
        build(layers, device, 12, 1.0),
        {i: rows.to(device) for i, rows in hidden.items()},
        top_k_global,
    )
    assert len(got) == min(top_k_global, len(got)) and got


def test_only_each_positions_top_k(device):
    layers = {0: {"W_enc": torch.ones(30, 4), "b_enc": torch.zeros(30)}}
    got = check(
        build(layers, device, 3), {0: torch.tensor([[1.0] * 4, [9.0] * 4], device=device)}, 100
    )
    assert [(f["ctx_idx"], f["feature"]) for f in got] == [
        (1, 0),
        (1, 1),
        (1, 2),
        (0, 0),
        (0, 1),
        (0, 2),
    ]


def test_silence_and_bad_rows_are_no_features(device):
    layers = {0: make_layer(60, 12)}
    hidden = normal(2, 5, 12)
    hidden[0] = 0.0
    hidden[1, 2, 3] = math.nan
    got = check(build(layers, device, 5, 0.7), {0: hidden.to(device)}, 1000)
    assert {(f["batch_idx"], f["ctx_idx"]) for f in got} == {(1, 0), (1, 1), (1, 3), (1, 4)}
    assert (
        build(layers, device, 5, 1e9).extract_attribution_features({0: hidden[1:, :2].to(device)})
        == []
    )


def test_default_is_a_hundred(device):
    layers = {0: make_layer(60, 12)}
    hidden = {0: normal(2, 50, 12).to(device)}
    encoder = build(layers, device)
    assert encoder.extract_attribution_features(hidden) == check(encoder, hidden, 100)


def test_layers_of_different_prompts_are_refused():
    weights = TranscoderWeights(torch.randn(30, 8), torch.randn(30))
    encoder = SparseTranscoderEncoder({0: weights, 1: weights}, 4, 0.1)
    one = torch.randn(1, 5, 8)
    assert encoder.extract_attribution_features({0: one, 1: one[0]})
    for other in (torch.randn(2, 5, 8), torch.randn(1, 4, 8)):
        with pytest.raises(ValueError, match="hidden_states must be of the same prompts, got 0: "):
            encoder.extract_attribution_features({0: one, 1: other})
