"""Features while a model generates, and generation while features are changed, against hooks and
float64 sums of the tests' own."""

import itertools
import warnings

import families
import pytest
import torch
import transformers
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights, capture, reference
from sparse_transcoder.live import activations_of
from test_capture import (
    GROUPED,
    LAYERS,
    RESULTS,
    SHAPE,
    H,
    blocks,
    gemma2,
    gpt2,
    gpt_neox_parallel,
    llama,
    made,
    padded,
    prompts,
)

F = 96
GENERATE = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def granite():
    return transformers.GraniteForCausalLM(
        transformers.GraniteConfig(**GROUPED, residual_multiplier=0.22)
    )


def bloom():
    return transformers.BloomForCausalLM(
        transformers.BloomConfig(**SHAPE, hidden_size=H, n_layer=LAYERS, n_head=4)
    )


def transcoders(layers, hook_in="mlp.hook_in", hook_out="mlp.hook_out", kind="relu", **more):
    torch.manual_seed(5)
    kinds = {"relu": {}, "jumprelu": {"threshold": torch.rand(F) + 0.2}, "topk": {"k": 40}}
    return {
        layer: TranscoderWeights(
            torch.randn(F, H) / 4,
            torch.randn(F) / 4,
            torch.randn(H, F) / 4,
            torch.randn(H),
            layer,
            hook_in=hook_in,
            hook_out=hook_out,
            **kinds[kind],
            **more,
        )
        for layer in layers
    }


def hooks_on(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("family", [llama, gpt2, gemma2, bloom])
@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_attach_is_encoding_the_same_rows_afterwards(family, kind):
    model = made(family)
    encoder = SparseTranscoderEncoder(transcoders([0, 2], kind=kind), 7, 0.1)
    inputs = padded(prompts(5, 2, 9), "left")
    seen = {0: [], 2: []}
    handles = [
        blocks(model)[layer].mlp.register_forward_pre_hook(
            lambda _, args, layer=layer: seen[layer].append(args[0].clone())
        )
        for layer in seen
    ]
    plain = model.generate(**inputs, **GENERATE)
    for rows in seen.values():
        rows.clear()
    encoder.encode_model(model, prompts(3)[0])  # the proof of the places is no step
    for rows in seen.values():
        rows.clear()
    before = hooks_on(model)
    with encoder.attach(model) as monitor:
        generated = model.generate(**inputs, **GENERATE)
    assert hooks_on(model) == before
    for handle in handles:
        handle.remove()
    assert torch.equal(generated, plain)
    assert len(monitor.steps) == 6 and [len(rows) for rows in seen.values()] == [6, 6]
    whole = monitor.features()
    real = torch.cat([inputs["attention_mask"], torch.ones(3, 5, dtype=torch.int64)], 1).bool()
    for layer, rows in seen.items():
        rows = torch.cat(rows, 1)  # [3, T, H], each position as the step that read it gave it
        steps = [0, *range(inputs["input_ids"].shape[1], rows.shape[1] + 1)]
        wanted, places = [], []
        for start, end in itertools.pairwise(steps):
            wanted.append(rows[:, start:end][real[:, start:end]])
            places.append(real[:, start:end].nonzero() + torch.tensor([0, start]))
        places = torch.cat(places)
        encoded = encoder.encode_layer(layer, torch.cat(wanted))
        for key in RESULTS:
            assert torch.equal(whole[layer][key], encoded[key])
        assert torch.equal(whole[layer]["batch_idx"], places[:, 0])
        assert torch.equal(
            whole[layer]["ctx_idx"], (real.cumsum(1) - 1)[places[:, 0], places[:, 1]]
        )
        assert torch.equal(
            torch.cat([step.token_ids for step in monitor.steps]),
            generated[places[:, 0], places[:, 1]],
        )


@pytest.mark.parametrize(
    "kind",
    "bloom falcon_h1 falcon_mamba gemma3_text gpt_oss llama4_text mamba mamba2 mistral mpt opt "
    "phi3 qwen3_next recurrent_gemma rwkv".split(),
)
def test_positions_of_every_kind_of_cache(kind):
    model = families.made(kind)
    weights = {1: TranscoderWeights(torch.randn(F, H), torch.randn(F), hook_in="hook_resid_post")}
    encoder = SparseTranscoderEncoder(weights, 7, 0.1)
    for inputs, lengths in (
        (padded(prompts(5, 5), "left"), [5, 5]),
        (padded(prompts(5, 2), "left"), [5, 2]),
    ):
        if kind == "rwkv":  # it knows of no padding
            inputs, lengths = {"input_ids": prompts(5)[0][None]}, [5]
        with warnings.catch_warnings(), encoder.attach(model) as monitor:
            warnings.simplefilter("ignore")
            model.generate(**inputs, **GENERATE, use_cache=True)
        found = monitor.features()[1]
        for row, length in enumerate(lengths):
            positions = found["ctx_idx"][found["batch_idx"] == row].tolist()
            assert positions == list(range(length + 5))


def test_attach_streams_or_keeps_the_last():
    model = made(llama)
    encoder = SparseTranscoderEncoder(transcoders([1]), 7, 0.1)
    ids = prompts(4)[0][None]
    with encoder.attach(model) as monitor:
        model.generate(ids, attention_mask=torch.ones_like(ids), **GENERATE)
    came = []
    with encoder.attach(model, on_step=came.append) as streamed:
        model.generate(ids, attention_mask=torch.ones_like(ids), **GENERATE)
    assert not streamed.steps and len(came) == 6
    with encoder.attach(model, keep=2) as last:
        model.generate(ids, attention_mask=torch.ones_like(ids), **GENERATE)
    assert len(last.steps) == 2
    for mine, theirs in [
        *zip(came, monitor.steps, strict=True),
        *zip(last.steps, list(monitor.steps)[-2:], strict=True),
    ]:
        assert torch.equal(mine.features[1]["activations"], theirs.features[1]["activations"])
    kept = last.steps[0].features[1]
    assert all(
        value.untyped_storage().nbytes() <= 12 * 7
        for value in kept.values()
        if isinstance(value, torch.Tensor)
    )
    with pytest.raises(ValueError, match="at least one kept step"):
        streamed.features()


def test_attach_excludes_and_needs_no_mask():
    model = made(llama)
    encoder = SparseTranscoderEncoder(transcoders([1]), 7, 0.1)
    ids = torch.tensor([[1, 5, 6, 1]])
    with encoder.attach(model, exclude="special") as monitor:
        model(ids)
    assert monitor.features()[1]["ctx_idx"].tolist() == [1, 2]
    with (
        encoder.attach(model, hook="hook_resid_post", layers=[1]) as monitor,
        warnings.catch_warnings(),
    ):
        cached = model(ids, use_cache=True).past_key_values
        model(ids[:, :1], past_key_values=cached)
    assert monitor.features()[1]["ctx_idx"].tolist() == [0, 1, 2, 3, 4]


def test_attach_ends_on_errors():
    model = made(llama)
    encoder = SparseTranscoderEncoder(transcoders([1]), 7, 0.1)
    encoder.encode_model(model, prompts(3)[0])
    with pytest.raises(RuntimeError, match="mine"), encoder.attach(model):
        raise RuntimeError("mine")
    with pytest.raises(IndexError), encoder.attach(model):
        model(torch.tensor([[10**6]]))
    assert hooks_on(model) == 0


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"layers": [2]}, KeyError, "layer 2: there is no transcoder"),
        ({"layers": []}, ValueError, "layers must name at least one"),
        ({"hook": "ln9.hook"}, ValueError, "layer 1: hook must be one of"),
        ({"exclude": torch.ones(1, 2)}, TypeError, "while a model runs, got a mask"),
        ({"exclude": "bos"}, ValueError, "exclude must be"),
        ({"on_step": 3}, TypeError, "on_step must be callable, got int"),
        ({"keep": 0}, ValueError, "keep must be at least 1, got 0"),
    ],
)
def test_attach_errors(change, kind, message):
    encoder = SparseTranscoderEncoder(transcoders([1]), 7, 0.1)
    with pytest.raises(kind, match=message):
        encoder.attach(made(llama), **change)


def by_hand(model, ids, layer, module, side, change):
    """{resid_post of every layer} in float64, with ``change(tensor, seen)`` at one place; ``seen``
    holds the MLP's input."""
    model = made(model).double()
    seen = {}
    block = blocks(model)[layer]
    mlp = getattr(block, "mlp", None)
    handles = [mlp.register_forward_pre_hook(lambda _, args: seen.update(given=args[0].clone()))]
    place = dict(block.named_modules())[module]
    if side == "output":

        def after(_, args, output):
            changed = change(output[0] if isinstance(output, tuple) else output, seen)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles.append(place.register_forward_hook(after))
    else:
        handles.append(
            place.register_forward_pre_hook(lambda _, args: (change(args[0], seen), *args[1:]))
        )
    posts = capture_by_hand(model, ids)
    for handle in handles:
        handle.remove()
    return posts


def capture_by_hand(model, ids):
    posts = []
    handles = [
        block.register_forward_hook(
            lambda _, args, output: posts.append(
                (output[0] if isinstance(output, tuple) else output)[0]
            )
        )
        for block in blocks(model)
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return posts


def active(weights, rows, features):
    """The transcoder's own activations of some features in float64, [N, n]."""
    values, indices, _ = reference.encode(rows, weights, F, 0.0, dtype=torch.float64)
    return torch.zeros_like(values).scatter(-1, indices, values)[..., features]


PLACES = [
    (llama, "mlp.hook_out", "mlp", "output", 1.0),
    (gemma2, "hook_mlp_out", "post_feedforward_layernorm", "output", 1.0),
    (gemma2, "mlp.hook_out", "mlp", "output", 1.0),
    (granite, "hook_mlp_out", "mlp", "output", 1 / 0.22),
    (bloom, "hook_mlp_out", "mlp.dense_4h_to_h", "output", 1.0),
    (gpt2, "hook_mlp_out", "mlp", "output", 1.0),
    (gpt_neox_parallel, "hook_mlp_out", "mlp", "output", 1.0),
    (granite, "hook_resid_mid", "self_attn", "output", 1 / 0.22),
    (llama, "hook_resid_pre", "", "input", 1.0),
    (llama, "hook_resid_post", "", "output", 1.0),
]


# Where the stream is written before the MLP, the MLP's input is not known yet, so nothing can be
# set.
EARLY = ("hook_resid_mid", "hook_resid_pre")
CASES = [
    (*place, mode)
    for place in PLACES
    for mode in ("add", "set", "ablate")
    if mode == "add" or place[1] not in EARLY
]


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize(("family", "hook", "module", "side", "scale", "mode"), CASES)
def test_intervene_against_float64(family, hook, module, side, scale, kind, mode):
    model, ids = made(family), prompts(7)[0][None]
    weights = transcoders([1], hook_out=hook, kind=kind)
    encoder = SparseTranscoderEncoder(
        weights, 4, 1.5
    )  # a threshold that hides features which are active
    features, values = [3, 40, 41, 95], [2.0, -1.5, 0.5, 4.0]

    def change(tensor, seen):
        wanted = torch.tensor(values if mode != "ablate" else [0.0] * 4, dtype=torch.float64)
        if mode != "add":
            now = active(weights[1], seen["given"].flatten(0, 1), features).reshape(
                *tensor.shape[:-1], 4
            )
            assert (now > 0).any() and (now[now > 0] < 1.5).any()
            wanted = wanted - now
        return tensor + scale * (wanted @ weights[1].W_dec[:, features].double().T)

    wanted = by_hand(family, ids, 1, module, side, change)
    plain = capture_by_hand(model, ids)
    with encoder.intervene(model, {1: dict(zip(features, values, strict=True))}, mode=mode):
        got = capture_by_hand(model, ids)
    for layer, (mine, theirs, untouched) in enumerate(zip(got, wanted, plain, strict=True)):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)
        assert torch.equal(mine, untouched) == (layer < 1)
    assert hooks_on(model) == 0
    assert all(torch.equal(a, b) for a, b in zip(capture_by_hand(model, ids), plain, strict=True))


@pytest.mark.parametrize("mode", ["add", "set", "ablate"])
def test_generation_with_a_cache_is_generation_without(mode):
    model = made(llama)
    encoder = SparseTranscoderEncoder(transcoders([0, 1]), 4, 0.1)
    inputs = padded(prompts(5, 3), "left")
    plain = model.generate(**inputs, **GENERATE)
    with encoder.intervene(model, {0: {3: 30.0, 9: 10.0}, 1: {4: 25.0}}, mode=mode):
        cached, whole = (
            model.generate(**inputs, **GENERATE, use_cache=use) for use in (True, False)
        )
    assert torch.equal(cached, whole)
    assert torch.equal(cached, plain) == (mode == "ablate") or mode == "ablate"
    assert torch.equal(model.generate(**inputs, **GENERATE), plain)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_activations_that_are_set_are_those_that_the_encoder_finds(kind):
    encoder = SparseTranscoderEncoder(
        transcoders([1], kind=kind, input_bias=torch.randn(H)), F, 0.0
    )
    rows = torch.randn(50, H)
    found = encoder.encode_layer(1, rows)
    dense = torch.zeros(50, F).scatter(-1, found["indices"], found["activations"])
    features = [7, 0, 95, 33]
    assert torch.equal(activations_of(encoder, 1, features)(rows), dense[:, features])


def test_a_decoder_of_many_layers_writes_to_each():
    model, ids = made(llama), prompts(6)[0][None]
    torch.manual_seed(2)
    weights = TranscoderWeights(
        torch.randn(F, H),
        torch.randn(F),
        torch.randn(2 * H, F) / 4,
        layer=1,
        hook_in="mlp.hook_in",
        hook_out="hook_mlp_out",
        write_layers=2,
    )
    encoder = SparseTranscoderEncoder({1: weights}, 4, 0.1)
    outs = [capture(model, ids, [layer], "hook_mlp_out").hidden[layer] for layer in (1, 2)]
    with encoder.intervene(model, {1: {5: 3.0}}):
        changed = [capture(model, ids, [layer], "hook_mlp_out").hidden[layer] for layer in (1, 2)]
        again = model.model.layers[2].mlp(capture(model, ids, [2], "mlp.hook_in").hidden[2][None])[
            0
        ]
    torch.testing.assert_close(changed[0], outs[0] + 3 * weights.W_dec[:H, 5])
    torch.testing.assert_close(
        changed[1], again, rtol=1e-4, atol=1e-4
    )  # the module's own call is hooked as well


def test_an_autoencoder_is_read_before_it_is_written():
    model, ids = made(llama), prompts(6)[0][None]
    weights = transcoders([1], "hook_resid_post", "hook_resid_post")
    encoder = SparseTranscoderEncoder(weights, 4, 0.1)
    rows = capture(model, ids, [1], "hook_resid_post").hidden[1]
    with encoder.intervene(model, {1: [3, 8]}, mode="ablate"):
        changed = capture(model, ids, [1], "hook_resid_post").hidden[1]
    wanted = (
        rows.double()
        - active(weights[1], rows.double(), [3, 8]) @ weights[1].W_dec[:, [3, 8]].double().T
    )
    torch.testing.assert_close(changed.double(), wanted, rtol=1e-5, atol=1e-5)


def test_intervene_ends_on_errors():
    model = made(llama)
    encoder = SparseTranscoderEncoder(transcoders([1]), 4, 0.1)
    encoder.encode_model(model, prompts(3)[0])
    with pytest.raises(RuntimeError, match="mine"), encoder.intervene(model, {1: {3: 1.0}}):
        raise RuntimeError("mine")
    with pytest.raises(IndexError), encoder.intervene(model, {1: [3]}, mode="ablate"):
        model(torch.tensor([[10**6]]))
    assert hooks_on(model) == 0


def test_a_monitor_inside_sees_what_was_changed():
    model, ids = made(llama), prompts(6)[0][None]
    encoder = SparseTranscoderEncoder(transcoders([1, 2]), 4, 0.1)
    with encoder.attach(model, layers=[2]) as before:
        model(ids)
    with encoder.intervene(model, {1: {3: 20.0}}), encoder.attach(model, layers=[2]) as during:
        model(ids)
    assert not torch.equal(before.features()[2]["activations"], during.features()[2]["activations"])


@pytest.mark.parametrize(
    ("changes", "more", "kind", "message"),
    [
        ({0: {3: 1.0}}, {}, KeyError, "layer 0: there is no transcoder"),
        ({1: {F: 1.0}}, {}, ValueError, "layer 1: feature must be 0 to 95, got 96"),
        (
            {1: {3: float("inf")}},
            {},
            ValueError,
            "layer 1: the value of feature 3 must be finite, got inf",
        ),
        ({1: [3]}, {}, TypeError, "layer 1: changes must map features to numbers, got list"),
        ({1: {}}, {}, ValueError, "layer 1: changes must name at least one feature"),
        ({}, {}, ValueError, "changes must name at least one layer"),
        ([1], {}, TypeError, "changes must map layers to features, got list"),
        (
            {1: {3: 1.0}},
            {"mode": "scale"},
            ValueError,
            "mode must be add, set or ablate, got 'scale'",
        ),
        (
            {1: {3: 1.0}},
            {"hook": "ln2.hook_normalized"},
            ValueError,
            "layer 1: .* can be read, not written",
        ),
        (
            {1: {3: 1.0}},
            {"hook": "hook_resid_pre", "mode": "set"},
            ValueError,
            "layer 1 must be read before it is written",
        ),
    ],
)
def test_intervene_errors(changes, more, kind, message):
    model = made(llama)
    encoder = SparseTranscoderEncoder(transcoders([1]), 4, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(kind, match=message) as error, encoder.intervene(model, changes, **more):
            model(prompts(3)[0][None])
    assert "\n" not in str(error.value)
    assert hooks_on(model) == 0
