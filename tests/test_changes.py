"""Weights and hidden states that change under an encoder's feet: an error, or the right result."""

import threading

import pytest
import torch
from oracle import check, make_layer, normal
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights
from test_capture import H as MODEL_H
from test_capture import llama, made, prompts
from torch import nn

F, H = 300, 24


def built(device="cpu", **options):
    layer = {
        name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in fields().items()
    }
    weights = TranscoderWeights(**layer)
    return SparseTranscoderEncoder({3: weights}, 8, 0.1, **options), weights


def fields():
    return make_layer(F, H, kind="jumprelu") | {
        "W_skip": normal(H, H, seed=30),
        "input_bias": normal(H, seed=31),
        "ln_weight": 1 + 0.1 * normal(H, seed=32),
        "ln_bias": normal(H, seed=33),
    }


TENSORS = [name for name, value in fields().items() if isinstance(value, torch.Tensor)]


def calls(encoder, hidden):
    features = encoder.encode_layer(3, hidden)
    sparse = encoder.encode_sparse(3, hidden)
    return {
        "encode_layer": lambda: encoder.encode_layer(3, hidden),
        "encode_chunked": lambda: encoder.encode_chunked(3, hidden),
        "encode_all_layers": lambda: encoder.encode_all_layers({3: hidden}),
        "encode_sparse": lambda: encoder.encode_sparse(3, hidden),
        "decode": lambda: encoder.decode(3, features, hidden),
        "decode sparse": lambda: encoder.decode(3, sparse, hidden),
        "attribution": lambda: encoder.extract_attribution_features({3: hidden}),
        "feature_vector": lambda: encoder.feature_vector(3, 5),
        "steer": lambda: encoder.steer(3, {5: 1.0}),
    }


def in_place(weights, name):
    getattr(weights, name).mul_(2)


def one_element(weights, name):
    getattr(weights, name).view(-1)[1:2].add_(1)


def replaced(weights, name):
    setattr(weights, name, getattr(weights, name).clone())


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("change", [in_place, one_element, replaced])
def test_changed_weights_are_refused(device, name, change):
    encoder, weights = built(device)
    hidden = normal(5, H, seed=1).to(device)
    every = calls(encoder, hidden)
    change(weights, name)
    for call in every.values():
        with pytest.raises(ValueError, match=rf"layer 3: {name} must stay as it was .*new encoder"):
            call()
    # A new one has the new weights.
    new = SparseTranscoderEncoder({3: weights}, 8, 0.1)
    layer = {field: getattr(weights, field) for field in fields()}
    check(new.encode_layer(3, hidden), hidden, layer, 8, 0.1)


def through_data(tensor):
    tensor.data.mul_(2)


def through_numpy(tensor):
    tensor.detach().numpy()[...] += 1


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("change", [through_data, through_numpy])
def test_changes_that_no_version_counter_sees(name, change):
    encoder, weights = built()
    every = calls(encoder, normal(5, H, seed=1))
    change(getattr(weights, name))
    for call in every.values():
        with pytest.raises(ValueError, match=f"layer 3: {name} must stay as it was"):
            call()


def test_inference_tensors():
    """They count no versions, and can be changed in inference mode alone."""
    with torch.inference_mode():
        encoder, weights = built()
        hidden = normal(5, H, seed=1)
        check(encoder.encode_layer(3, hidden), hidden, fields(), 8, 0.1)
    hidden = normal(5, H, seed=2)
    check(encoder.encode_layer(3, hidden), hidden, fields(), 8, 0.1)
    with torch.inference_mode():
        weights.b_enc.add_(1)
    with pytest.raises(ValueError, match="layer 3: b_enc must stay as it was"):
        encoder.encode_layer(3, hidden)


@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.half(),
        lambda m: m.load_state_dict({name: t + 1 for name, t in m.state_dict().items()}),
    ],
)
def test_parameters_of_a_module(move):
    linear = nn.Linear(H, F)
    encoder = SparseTranscoderEncoder({0: TranscoderWeights(linear.weight, linear.bias)}, 8, 0.1)
    hidden = normal(5, H, seed=1)
    encoder.encode_layer(0, hidden)
    move(linear)
    with pytest.raises(ValueError, match="layer 0: W_enc must stay as it was"):
        encoder.encode_layer(0, hidden)


def test_an_optimizer_step():
    linear = nn.Linear(H, F)
    encoder = SparseTranscoderEncoder({0: TranscoderWeights(linear.weight, linear.bias)}, 8, 0.1)
    hidden = normal(5, H, seed=1)
    optimizer = torch.optim.SGD(linear.parameters(), lr=1e-3)
    linear(hidden).sum().backward()
    encoder.encode_layer(0, hidden)  # gradients are no change
    optimizer.step()
    with pytest.raises(ValueError, match="layer 0: W_enc must stay as it was"):
        encoder.encode_layer(0, hidden)


def test_models():
    """What reads and writes a model begins with the same check."""
    model, (tokens,) = made(llama), prompts(7)
    weights = TranscoderWeights(
        torch.randn(F, MODEL_H), torch.randn(F), torch.randn(MODEL_H, F), torch.randn(MODEL_H)
    )
    encoder = SparseTranscoderEncoder({0: weights}, 8, 0.1)
    hook = {"hook": "mlp.hook_in"}
    encoder.encode_model(model, tokens, **hook)
    with encoder.attach(model, **hook) as monitor:
        weights.W_enc.mul_(2)
        with pytest.raises(ValueError, match="layer 0: W_enc must stay as it was"):
            model(tokens[None])
    assert not monitor.steps
    for call in (
        lambda: encoder.encode_model(model, tokens, **hook),
        lambda: encoder.attach(model, **hook),
        lambda: encoder.intervene(model, {0: {3: 1.0}}, hook="mlp.hook_out"),
    ):
        with pytest.raises(ValueError, match="layer 0: W_enc must stay as it was"):
            call()


def test_memory_that_is_gone():
    encoder, weights = built()
    hidden = normal(5, H, seed=1)
    weights.W_enc.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="layer 3: W_enc must stay as it was"):
        encoder.encode_layer(3, hidden)


def test_hidden_states_that_change_all_the_time():
    """Another thread writes them: the entries are those of rows that were read, or it is told."""
    layer = make_layer(F, H)
    encoder = SparseTranscoderEncoder({3: TranscoderWeights(**layer)}, 8, 0.1)
    states = [normal(64, H, seed=seed) for seed in (1, 2)]
    hidden = states[0].clone()
    done = threading.Event()

    def write():
        while not done.is_set():
            for state in states:
                hidden.copy_(state)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        refused = 0
        for _ in range(100):
            try:
                found = encoder.encode_sparse(3, hidden)
            except ValueError as error:
                refused += 1
                assert str(error).startswith("layer 3: weights must stay") and "\n" not in str(
                    error
                )
                continue
            columns, values = found.col_indices(), found.values()
            assert ((columns >= 0) & (columns < F)).all() and (values >= 0.1).all()
            assert (values < 100).all()
    finally:
        done.set()
        writer.join()
    found = encoder.encode_sparse(3, states[0])
    assert found.values().isfinite().all()


def test_lazy_hidden_states():
    """A negation that is not done yet; memory that is not there."""
    layer = make_layer(F, H)
    encoder = SparseTranscoderEncoder({3: TranscoderWeights(**layer)}, 8, 0.1)
    for shape in ((5, H), (2, 5, H)):
        hidden = normal(*shape, seed=1)
        check(encoder.encode_layer(3, torch._neg_view(-hidden)), hidden, layer, 8, 0.1)
        found = encoder.encode_sparse(3, torch._neg_view(-hidden))
        assert torch.equal(found.to_dense(), encoder.encode_sparse(3, hidden).to_dense())
        freed, less = hidden.clone(), hidden.clone()
        freed.untyped_storage().resize_(0)
        less.untyped_storage().resize_(64)
        for none in (freed, less, torch._efficientzerotensor(shape)):
            for call in (encoder.encode_layer, encoder.encode_sparse):
                with pytest.raises(ValueError, match="layer 3: hidden must be in memory, got a"):
                    call(3, none)


@pytest.mark.parametrize("name", TENSORS)
def test_lazy_weights(name):
    for lazy in (torch._neg_view, lambda t: torch._efficientzerotensor(t.shape)):
        layer = fields()
        layer[name] = lazy(layer[name])
        with pytest.raises(ValueError, match=f"layer 3: {name} must be in memory as it is"):
            SparseTranscoderEncoder({3: TranscoderWeights(**layer)}, 8, 0.1)
