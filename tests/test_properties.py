"""Random layers, rows and options against the float64 oracle."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import FLOATS, SCREENINGS, check, expected, integers, make_layer, normal, same_bits
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights

KINDS = st.sampled_from(["relu", "jumprelu", "topk"])
OPTIONS = st.fixed_dictionaries(
    {
        "chunk_size": st.sampled_from([1, 2, 13, 64, 512]),
        "screening": st.sampled_from(SCREENINGS),
        "use_compile": st.booleans(),
    }
)
SIZES = st.integers(1, 150)


def bounded(examples):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@bounded(100)
@given(
    tokens=st.integers(1, 70),
    hidden_size=SIZES,
    features=st.one_of(SIZES, st.integers(1, 3000)),
    top_k=st.integers(1, 200),
    tau=st.sampled_from([-1.0, 0.0, 0.3, 1.0, 2.5]),
    kind=KINDS,
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    decades=st.tuples(st.integers(-3, 3), st.integers(-3, 3)),
    options=OPTIONS,
    seed=st.integers(0, 10_000),
)
def test_any_layer(tokens, hidden_size, features, top_k, tau, kind, dtypes, decades, options, seed):
    layer = make_layer(features, hidden_size, seed=seed, kind=kind, dtype=dtypes[0])
    # Rows and features whose strengths lie decades apart; a quarter of each stays as it is.
    layer["W_enc"][features // 4 :] *= 10.0 ** decades[0]
    hidden = normal(tokens, hidden_size, seed=seed + 9)
    hidden[tokens // 4 :] *= 10.0 ** decades[1]
    hidden = hidden.to(dtypes[1])
    encoder = SparseTranscoderEncoder({0: TranscoderWeights(**layer)}, top_k, tau, **options)
    check(encoder.encode_layer(0, hidden), hidden, layer, top_k, tau, unit=False)


@bounded(120)
@given(
    tokens=st.one_of(st.integers(1, 8), st.integers(9, 90)),
    hidden_size=st.one_of(st.integers(1, 20), st.integers(1, 600)),
    features=st.one_of(SIZES, st.integers(1, 1500)),
    top_k=st.one_of(st.integers(1, 60), st.just(1500)),
    kind=KINDS,
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    scales=st.tuples(st.floats(-20, 15), st.floats(-20, 15)),
    spread=st.tuples(st.sampled_from([0, 0, 1, 2.5]), st.sampled_from([0, 0, 1, 2.5])),
    strength=st.sampled_from([0.0, 0.0, 0.5, 1.0, 2.0]),
    bias=st.sampled_from([-2.0, 0.0, 1.0, 4.0]),
    options=OPTIONS,
    seed=st.integers(0, 10_000),
)
def test_any_scale(
    tokens,
    hidden_size,
    features,
    top_k,
    kind,
    dtypes,
    scales,
    spread,
    strength,
    bias,
    options,
    seed,
):
    """Weights and rows of any size, heavy tails, thresholds and biases among the activations."""
    layer = make_layer(features, hidden_size, seed=seed, kind=kind, dtype=torch.float32)
    layer["W_enc"] *= (
        torch.exp(spread[0] * normal(features, hidden_size, seed=seed + 5)) * 10.0 ** scales[0]
    )
    layer["W_enc"] = (
        layer["W_enc"].clamp(-65000, 65000) if dtypes[0] == torch.float16 else layer["W_enc"]
    )
    layer["W_enc"] = layer["W_enc"].to(dtypes[0])
    hidden = normal(tokens, hidden_size, seed=seed + 9)
    hidden *= torch.exp(spread[1] * normal(tokens, hidden_size, seed=seed + 6)) * 10.0 ** scales[1]
    hidden = (hidden.clamp(-65000, 65000) if dtypes[1] == torch.float16 else hidden).to(dtypes[1])
    unit = float((hidden.double() @ layer["W_enc"].double().T).square().mean().sqrt())
    layer["b_enc"] = ((layer["b_enc"] + bias) * unit).float()
    if "threshold" in layer:
        layer["threshold"] = (layer["threshold"] * unit).float()
    tau = strength * unit
    encoder = SparseTranscoderEncoder({0: TranscoderWeights(**layer)}, top_k, tau, **options)
    check(encoder.encode_layer(0, hidden), hidden, layer, top_k, tau, unit=False)


@bounded(150)
@given(
    tokens=st.integers(1, 40),
    hidden_size=st.integers(1, 40),
    features=st.integers(1, 400),
    spread=st.integers(1, 4),
    top_k=st.integers(1, 450),
    tau=st.integers(-3, 12),
    k=st.one_of(st.none(), st.integers(1, 450)),
    strict=st.booleans(),
    options=OPTIONS,
    seed=st.integers(0, 10_000),
)
def test_whole_numbers_to_the_bit(
    tokens, hidden_size, features, spread, top_k, tau, k, strict, options, seed
):
    layer = {
        "W_enc": integers(features, hidden_size, low=-spread, high=spread + 1, seed=seed),
        "b_enc": integers(features, seed=seed + 1),
    }
    if k:
        layer["k"] = k
    elif strict:
        layer["threshold"] = integers(features, low=-3, high=12, seed=seed + 2)
    hidden = integers(tokens, hidden_size, seed=seed + 3)
    encoder = SparseTranscoderEncoder({0: TranscoderWeights(**layer)}, top_k, float(tau), **options)
    got = encoder.encode_layer(0, hidden)
    values, ids, sparsity = expected(hidden, layer, top_k, float(tau))
    assert same_bits(got["activations"], values)
    assert torch.equal(got["indices"], ids)
    assert torch.equal(got["sparsity"], sparsity)


@bounded(60)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=70),
    st.integers(1, 80),
    st.data(),
)
def test_any_values_and_any_threshold(values, top_k, data):
    """Zero weights: the biases are the pre-activations, any float32, each next to its own gate."""
    tau = data.draw(st.one_of(st.sampled_from(values), st.just(0.0)))
    layer = {"W_enc": torch.zeros(len(values), 3), "b_enc": torch.tensor(values)}
    if data.draw(st.booleans()):
        layer["threshold"] = torch.tensor(data.draw(st.permutations(values)))
    hidden = normal(3, 3)
    got = SparseTranscoderEncoder({0: TranscoderWeights(**layer)}, top_k, tau).encode_layer(
        0, hidden
    )
    wanted = expected(hidden, layer, top_k, tau)
    for name, want in zip(("activations", "indices", "sparsity"), wanted, strict=True):
        assert same_bits(got[name], want)
