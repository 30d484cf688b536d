"""Hidden states from Hugging Face models: right place, right positions, the same bits for any
batch and padding."""

import warnings

import pytest
import torch
import transformers
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights, capture

VOCAB, H, LAYERS = 97, 32, 3
SHAPE = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = SHAPE | {
    "hidden_size": H,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
GROUPED = WIDE | {"num_key_value_heads": 2, "head_dim": 8}


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))


def gemma2():
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GROUPED))


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**SHAPE, n_embd=H, n_layer=LAYERS, n_head=4)
    )


def gpt_neox():
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**WIDE, use_parallel_residual=False)
    )


def gpt_neox_parallel():
    return transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**WIDE, use_parallel_residual=True)
    )


MODELS = [llama, gemma2, gpt2, gpt_neox]
NORMS = {
    llama: lambda block: block.post_attention_layernorm,
    gemma2: lambda block: block.pre_feedforward_layernorm,
    gpt2: lambda block: block.ln_2,
    gpt_neox: lambda block: block.post_attention_layernorm,
}


def made(family):
    """A small model with all weights away from their starting values, so that no place equals
    another by chance."""
    torch.manual_seed(0)
    model = family().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def blocks(model):
    return getattr(model.base_model, "layers", None) or model.base_model.h


def prompts(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]


def padded(rows, side):
    width = max(map(len, rows)) + 2
    ids, mask = (
        torch.zeros(len(rows), width, dtype=torch.int64),
        torch.zeros(len(rows), width, dtype=torch.int64),
    )
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = row, 1
    return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask})


@pytest.mark.parametrize("family", MODELS)
def test_residual_stream_adds_up(family):
    model = made(family)
    ids = torch.stack(prompts(7, 7))
    names = (
        "hook_resid_pre",
        "hook_resid_mid",
        "hook_resid_post",
        "hook_mlp_out",
        "mlp.hook_in",
        "mlp.hook_out",
    )
    at = {hook: capture(model, ids, range(LAYERS), hook).hidden for hook in names}
    for layer in range(LAYERS):
        block = blocks(model)[layer]
        assert at["mlp.hook_in"][layer].shape == (14, H)
        assert torch.equal(
            at["hook_resid_mid"][layer] + at["hook_mlp_out"][layer], at["hook_resid_post"][layer]
        )
        with torch.no_grad():
            torch.testing.assert_close(
                NORMS[family](block)(at["hook_resid_mid"][layer]), at["mlp.hook_in"][layer]
            )
            torch.testing.assert_close(
                block.mlp(at["mlp.hook_in"][layer]), at["mlp.hook_out"][layer]
            )
        if layer:
            assert torch.equal(at["hook_resid_post"][layer - 1], at["hook_resid_pre"][layer])
    assert torch.equal(at["hook_mlp_out"][1], at["mlp.hook_out"][1]) == (family is not gemma2)


@pytest.mark.parametrize("family", MODELS)
def test_whole_model_agrees(family):
    model = made(family)
    (row,) = prompts(9)
    with torch.no_grad():
        states = model(row[None], output_hidden_states=True).hidden_states
    hidden = capture(model, row, range(LAYERS), "hook_resid_pre").hidden
    for layer in range(LAYERS):
        torch.testing.assert_close(hidden[layer], states[layer][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "norm"),
    [(gpt2, "transformer.h.1.ln_2"), (gpt_neox, "layers.1.post_attention_layernorm")],
)
def test_layer_norm_is_named_by_what_is_meant(family, norm):
    model = made(family)
    ids = torch.stack(prompts(5))
    with pytest.raises(
        ValueError, match=r"layer 1: .* is a LayerNorm, .* say \S+:output or \S+:normalized$"
    ):
        capture(model, ids, [1], "ln2.hook_normalized")
    after = capture(model, ids, [1], f"{norm}:output").hidden[1]
    before = capture(model, ids, [1], f"{norm}:normalized").hidden[1]
    assert torch.equal(after, capture(model, ids, [1], "mlp.hook_in").hidden[1])
    middle = capture(model, ids, [1], "hook_resid_mid").hidden[1].double()
    torch.testing.assert_close(
        before, torch.nn.functional.layer_norm(middle, (H,)).float(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(("family", "gain"), [(llama, lambda w: w), (gemma2, lambda w: 1 + w)])
def test_rms_norm_is_read_before_its_weight(family, gain):
    model = made(family)
    ids = torch.stack(prompts(5))
    normalized = capture(model, ids, [1], "ln2.hook_normalized").hidden[1]
    mlp_in = capture(model, ids, [1], "mlp.hook_in").hidden[1]
    torch.testing.assert_close(normalized.pow(2).mean(-1), torch.ones(5), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        normalized * gain(NORMS[family](blocks(model)[1]).weight.detach()), mlp_in
    )


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch_is_the_prompts_one_by_one(family, side):
    model = made(family)
    rows = prompts(5, 1, 11, 5)
    batch = capture(model, padded(rows, side), [0, 2])
    assert batch.batch_idx.tolist() == [i for i, row in enumerate(rows) for _ in row]
    assert batch.ctx_idx.tolist() == [t for row in rows for t in range(len(row))]
    for layer in (0, 2):
        alone = torch.cat([capture(model, row, [layer]).hidden[layer] for row in rows])
        assert torch.equal(batch.hidden[layer], alone)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_at_once_is_close(family, side):
    model = made(family)
    inputs = padded(prompts(5, 1, 11, 5), side)
    exact, at_once = capture(model, inputs, [0, 2]), capture(model, inputs, [0, 2], exact=False)
    assert torch.equal(exact.batch_idx, at_once.batch_idx) and torch.equal(
        exact.ctx_idx, at_once.ctx_idx
    )
    for layer in (0, 2):
        torch.testing.assert_close(exact.hidden[layer], at_once.hidden[layer], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_masked_rows_and_holes(exact):
    model = made(llama)
    first, second = prompts(6, 4)
    ids = torch.stack(
        [first, torch.full((6,), 5), torch.cat([second[:2], torch.tensor([9, 9]), second[2:]])]
    )
    mask = torch.tensor([[1] * 6, [0] * 6, [1, 1, 0, 0, 1, 1]])
    captured = capture(model, {"input_ids": ids, "attention_mask": mask}, [2], exact=exact)
    assert captured.batch_idx.tolist() == [0] * 6 + [2] * 4
    assert captured.ctx_idx.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    alone = torch.cat([capture(model, row, [2]).hidden[2] for row in (first, second)])
    torch.testing.assert_close(captured.hidden[2], alone, rtol=1e-4, atol=1e-4)


def test_stops_after_the_deepest_layer():
    model = made(llama)
    capture(model, torch.stack(prompts(5)), [0])  # the first call on a model runs a pass of its own
    ran = []
    parts = [block.mlp for block in blocks(model)] + [model.base_model.norm, model.lm_head]
    for i, part in enumerate(parts):
        part.register_forward_hook(lambda *_, i=i: ran.append(i))
    capture(model, torch.stack(prompts(5)), [1, 0])
    assert ran == [0]  # the MLP of layer 1 is not needed for its input
    assert list(capture(model, torch.stack(prompts(5)), [2, 0]).hidden) == [0, 2]


@pytest.mark.parametrize("training", [False, True])
def test_leaves_the_model_as_it_was(training):
    model = made(llama).train(training)
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    captured = capture(model, torch.stack(prompts(5)), [0, 1])
    assert hooks() == 0
    with pytest.raises(IndexError):
        capture(model, torch.tensor([[VOCAB]]), [0])  # fails inside the model
    assert hooks() == 0
    assert model.training is training
    assert not captured.hidden[1].requires_grad and not captured.hidden[1].is_inference()
    assert torch.is_grad_enabled()


def test_hooks_that_differ_by_layer():
    model = made(llama)
    ids = torch.stack(prompts(5))
    mixed = capture(model, ids, [0, 1], {0: "hook_resid_mid", 1: "blocks.1.mlp.hook_in"}).hidden
    assert torch.equal(mixed[0], capture(model, ids, [0], "hook_resid_mid").hidden[0])
    assert torch.equal(mixed[1], capture(model, ids, [1]).hidden[1])


def test_inner_model_and_half_precision():
    model = made(llama)
    ids = torch.stack(prompts(5))
    assert torch.equal(capture(model.model, ids, [1]).hidden[1], capture(model, ids, [1]).hidden[1])
    assert capture(model.bfloat16(), ids, [1]).hidden[1].dtype == torch.bfloat16


def test_place_that_a_parallel_layer_lacks():
    model = made(gpt_neox_parallel)
    ids = torch.stack(prompts(5))
    assert capture(model, ids, [1]).hidden[1].shape == (5, H)
    with pytest.raises(
        ValueError,
        match=r"layer 1: GPTNeoXForCausalLM has no hook_resid_mid: .* attention and MLP .* at once",
    ):
        capture(model, ids, [1], "hook_resid_mid")
    pre, post, added = (
        capture(model, ids, [1], hook).hidden[1]
        for hook in ("hook_resid_pre", "hook_resid_post", "hook_mlp_out")
    )
    attention = capture(model, ids, [1], "gpt_neox.layers.{l}.attention:output").hidden[1]
    torch.testing.assert_close(pre + attention + added, post)


IDS = torch.tensor([[3, 4]])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"hook": "attn.hook_in"},
            ValueError,
            r"layer 0: hook must be one of mlp.hook_in, .*, got 'attn.hook_in'",
        ),
        (
            {"hook": "blocks.1.mlp.hook_in"},
            ValueError,
            "layer 0: hook must be a place of that layer, got 'blocks.1.mlp.hook_in'",
        ),
        (
            {"hook": "model.layers.1.mlp:input"},
            ValueError,
            "layer 0: hook must be a place of that layer, .* is in layer 1",
        ),
        (
            {"hook": "model.layers.0.ffn:input"},
            ValueError,
            "layer 0: LlamaForCausalLM has no module model.layers.0.ffn",
        ),
        (
            {"hook": "model.layers.0.mlp:normalized"},
            ValueError,
            "layer 0: .*:normalized must be of an RMSNorm or LayerNorm",
        ),
        (
            {"hook": "model.embed_tokens:input"},
            ValueError,
            "layer 0: model.embed_tokens:input must be a tensor, Embedding has none",
        ),
        (
            {"hook": {1: "mlp.hook_in"}},
            ValueError,
            r"layer 0: hook must name a place for each layer, got \[1\]",
        ),
        ({"hook": 3}, TypeError, "layer 0: hook must be a string, got int"),
        ({"layers": [3]}, ValueError, "layer 3: LlamaForCausalLM has layers 0 to 2"),
        ({"layers": [-1]}, ValueError, "layer -1: LlamaForCausalLM has layers 0 to 2"),
        ({"layers": []}, ValueError, "layers must name at least one layer"),
        ({"inputs": [[3, 4]]}, TypeError, "input_ids must be a torch.Tensor, got list"),
        (
            {"inputs": {"input_ids": IDS, "attention_mask": [[1, 1]]}},
            TypeError,
            "attention_mask must be a torch.Tensor",
        ),
        ({"inputs": {"ids": IDS}}, ValueError, "inputs must hold input_ids, got ids"),
        (
            {"inputs": {"input_ids": IDS.repeat(2, 1), "position_ids": IDS[:, :1].repeat(3, 1)}},
            ValueError,
            r"position_ids .* row for",
        ),
        ({"inputs": IDS.float()}, TypeError, "input_ids must be integers, got torch.float32"),
        (
            {"inputs": IDS[None]},
            ValueError,
            r"input_ids must be \[B, T\] or \[T\], got \[1, 1, 2\]",
        ),
        (
            {"inputs": {"input_ids": IDS, "attention_mask": IDS[0]}},
            ValueError,
            r"attention_mask must be \[1, 2\]",
        ),
        (
            {"inputs": {"input_ids": IDS, "attention_mask": IDS}},
            ValueError,
            "attention_mask must be 0 and 1",
        ),
        (
            {"inputs": {"input_ids": IDS, "attention_mask": 0 * IDS}},
            ValueError,
            "at least one token",
        ),
        ({"inputs": torch.zeros(1, 0, dtype=torch.int64)}, ValueError, "at least one token"),
        (
            {"model": torch.nn.Linear(2, 2)},
            ValueError,
            "model must run on input_ids alone, Linear gives TypeError",
        ),
    ],
)
def test_errors(change, kind, message):
    arguments = {"model": made(llama), "inputs": IDS, "layers": [0], "hook": None} | change
    with pytest.raises(kind, match=message) as error:
        capture(**arguments)
    assert "\n" not in str(error.value)


def encoder_for(hooks, **options):
    torch.manual_seed(3)
    return SparseTranscoderEncoder(
        {
            layer: TranscoderWeights(
                torch.randn(256, H), torch.randn(256), layer=layer, hook_in=hook
            )
            for layer, hook in hooks.items()
        },
        **({"top_k": 7, "activation_threshold": 0.1} | options),
    )


RESULTS = ("activations", "indices", "sparsity")


@pytest.mark.parametrize("side", ["left", "right"])
def test_encode_model(side):
    model = made(llama)
    encoder = encoder_for({0: "mlp.hook_in", 2: "hook_resid_mid"})
    rows = prompts(5, 1, 11, 5)
    encoded = encoder.encode_model(model, padded(rows, side))
    assert list(encoded) == [0, 2]
    for layer, hook in ((0, "mlp.hook_in"), (2, "hook_resid_mid")):
        result = encoded[layer]
        assert result["layer"] == layer
        assert result["activations"].shape == (22, 7) and result["batch_idx"].shape == result[
            "ctx_idx"
        ].shape == (22,)
        for i, row in enumerate(rows):
            alone = encoder.encode_model(model, row, layers=[layer])[layer]
            direct = encoder.encode_layer(layer, capture(model, row, [layer], hook).hidden[layer])
            mine = result["batch_idx"] == i
            assert torch.equal(result["ctx_idx"][mine], torch.arange(len(row)))
            for key in RESULTS:
                assert torch.equal(result[key][mine], alone[key])
                assert torch.equal(alone[key], direct[key])


def test_equal_rows_encode_equally_whatever_their_batch():
    encoder = encoder_for({0: ""})
    hidden = torch.randn(40, H)
    together = encoder.encode_layer(0, hidden)
    shuffled = torch.randperm(40)
    for rows in (shuffled, shuffled[:1], shuffled[:13]):
        for key in RESULTS:
            assert torch.equal(encoder.encode_layer(0, hidden[rows])[key], together[key][rows])


def test_encode_model_batch_at_once_is_close():
    model = made(llama)
    inputs = padded(prompts(5, 11), "left")
    encoder = encoder_for({1: "mlp.hook_in"})
    exact, at_once = (
        encoder.encode_model(model, inputs)[1],
        encoder.encode_model(model, inputs, exact=False)[1],
    )
    torch.testing.assert_close(exact["activations"], at_once["activations"], rtol=1e-4, atol=1e-4)
    assert torch.equal(exact["ctx_idx"], at_once["ctx_idx"])


def test_hook_given_and_recorded():
    model = made(llama)
    encoder = encoder_for({0: "blocks.0.mlp.hook_in", 1: ""})
    assert list(encoder.encode_model(model, IDS, hook="mlp.hook_in")) == [0, 1]
    with pytest.warns(
        UserWarning,
        match="hook_resid_mid in layer 0, where the weights record blocks.0.mlp.hook_in",
    ) as told:
        named = encoder.encode_model(model, IDS, hook="hook_resid_mid")
    assert len(told) == 1
    middle = capture(model, IDS, [0], "hook_resid_mid").hidden[0]
    assert torch.equal(named[0]["indices"], encoder.encode_layer(0, middle)["indices"])
    with pytest.raises(ValueError, match="layer 1: hook must be given, the weights record none"):
        encoder.encode_model(model, IDS)
    with pytest.raises(
        KeyError, match="layer 2: there is no transcoder for it, only for layers 0, 1"
    ):
        encoder.encode_model(model, IDS, layers=[2])
    with pytest.raises(ValueError, match="layers must name at least one"):
        encoder.encode_model(model, IDS, layers=[])


@pytest.mark.parametrize(
    ("recorded", "place"),
    [
        ("model.layers.1.post_attention_layernorm.output", "mlp.hook_in"),  # Gemma Scope 2
        ("resid_post_layer_1", "hook_resid_post"),  # dictionary_learning
        ("resid_pre_layer_1", "hook_resid_pre"),
        ("layers.1", "hook_resid_post"),  # sparsify
        ("layers.1.mlp", "mlp.hook_out"),
        ("layers.1.self_attn", "model.layers.1.self_attn:output"),
        ("model.layers[1].mlp.input", "mlp.hook_in"),  # nnsight
    ],
)
def test_names_that_checkpoints_record(recorded, place):
    model = made(llama)
    encoder = encoder_for({1: recorded})
    wanted = encoder.encode_layer(1, capture(model, IDS, [1], place).hidden[1])
    assert torch.equal(encoder.encode_model(model, IDS)[1]["activations"], wanted["activations"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the two names are of one place
        encoder.encode_model(model, IDS, hook=place)


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        (
            "model.layers.1.pre_feedforward_layernorm.output",
            "LlamaForCausalLM has no module model.layers.1.pre_feedforward_layernorm",
        ),
        (
            "resid_post_layer_2",
            "layer 1: hook must be a place of that layer, got 'resid_post_layer_2'",
        ),
        ("layers.2.mlp", "layer 1: hook must be a place of that layer, got 'layers.2.mlp'"),
        ("blocks.1.attn.hook_z", "layer 1: hook must be one of .*, got 'blocks.1.attn.hook_z'"),
    ],
)
def test_recorded_names_without_a_place_are_refused(recorded, message):
    model = made(llama)
    encoder = encoder_for({1: recorded})
    with pytest.raises(ValueError, match=message):
        encoder.encode_model(model, IDS)
    with pytest.warns(UserWarning, match="where the weights record"):
        encoder.encode_model(model, IDS, hook="mlp.hook_in")


def test_a_copy_is_kept_where_the_model_changes_its_own_tensor():
    model = made(llama)
    places = {0: "hook_resid_mid", 2: "mlp.hook_in"}
    before = capture(model, IDS, [0, 2], places).hidden[0]
    norm = blocks(model)[0].post_attention_layernorm
    norm.register_forward_hook(lambda _, args, output: args[0].mul_(2.0).sum() * 0 + output)
    assert torch.equal(capture(model, IDS, [0, 2], places).hidden[0], before)


def test_places_are_proven_again_when_a_module_is_exchanged():
    model = made(llama)
    capture(model, IDS, [1], "hook_resid_mid")

    class Twice(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, hidden_states, **kwargs):
            return 2 * self.layer(hidden_states, **kwargs)

    model.model.layers[1] = Twice(model.model.layers[1])
    with pytest.raises(ValueError, match="layer 1: LlamaForCausalLM has no hook_resid_mid"):
        capture(model, IDS, [1], "hook_resid_mid")


def test_attention_that_adds_nothing_is_no_middle():
    model = made(llama)
    torch.nn.init.zeros_(blocks(model)[1].self_attn.o_proj.weight)
    with pytest.raises(ValueError, match="adds nothing to the stream before its MLP"):
        capture(model, IDS, [1], "hook_resid_mid")


@pytest.mark.parametrize("exact", [True, False])
def test_further_keys_of_a_tokenizer(exact):
    model = made(llama)
    inputs = padded(prompts(5, 3), "left")
    plain = capture(model, inputs, [2], exact=exact).hidden[2]
    more = dict(inputs) | {
        "token_type_ids": 0 * inputs["input_ids"],
        "length": torch.tensor([5, 3]),
        "text": ["a", "b"],
    }
    assert torch.equal(capture(model, more, [2], exact=exact).hidden[2], plain)
    later = dict(inputs) | {"position_ids": 7 * inputs["attention_mask"].cumsum(-1)}
    assert not torch.allclose(capture(model, later, [2], exact=exact).hidden[2], plain, atol=1e-3)


def test_exclude():
    model = made(llama)
    inputs = padded(prompts(5, 3), "left")
    inputs["input_ids"][inputs["attention_mask"].cumsum(-1) * inputs["attention_mask"] == 1] = (
        1  # the first token is BOS
    )
    encoder = encoder_for({1: "mlp.hook_in"})
    whole = encoder.encode_model(model, inputs)[1]
    mask = (inputs["input_ids"] == 1) & (inputs["attention_mask"] == 1)
    for exclude in ("special", {1}, [1], mask, mask.long()):
        some = encoder.encode_model(model, inputs, exclude=exclude)[1]
        kept = whole["ctx_idx"] > 0
        assert kept.sum() == 6 and some["ctx_idx"].tolist() == [1, 2, 3, 4, 1, 2]
        for key in (*RESULTS, "batch_idx"):
            assert torch.equal(some[key], whole[key][kept])
    hidden = torch.randn(2, 4, H)
    ids = torch.tensor([[1, 5, 6, 7], [8, 1, 9, 5]])
    every = encoder.extract_attribution_features({1: hidden}, 10**6)
    left = encoder.extract_attribution_features({1: hidden}, 10**6, exclude={1}, inputs=ids)
    assert (
        left
        == [node for node in every if (node["batch_idx"], node["ctx_idx"]) not in ((0, 0), (1, 1))]
        != every
    )
    assert left == encoder.extract_attribution_features({1: hidden}, 10**6, exclude=ids == 1)
    marked = {"input_ids": ids, "special_tokens_mask": (ids == 1).long()}
    assert left == encoder.extract_attribution_features(
        {1: hidden}, 10**6, exclude="special", inputs=marked
    )


@pytest.mark.parametrize(
    ("exclude", "kind", "message"),
    [
        ("bos", ValueError, "exclude must be \"special\", token ids or a mask, got 'bos'"),
        (
            torch.ones(1, 3),
            ValueError,
            r"exclude must be a mask \[1, 2\] as the tokens, got \[1, 3\]",
        ),
        (torch.tensor([[3, 4]]), ValueError, "exclude must be a mask of 0 and 1"),
        (5, TypeError, "exclude must be .*, got int"),
        ({"a"}, TypeError, "exclude must hold token ids, got str"),
        ({3, 4}, ValueError, "exclude must leave at least one position, got none"),
    ],
)
def test_exclude_errors(exclude, kind, message):
    encoder = encoder_for({1: "mlp.hook_in"})
    with pytest.raises(kind, match=message):
        encoder.encode_model(made(llama), IDS, exclude=exclude)


def test_special_needs_someone_who_knows():
    encoder = encoder_for({1: ""})
    with pytest.raises(ValueError, match="give their ids"):
        encoder.extract_attribution_features(
            {1: torch.randn(1, 2, H)}, exclude="special", inputs=IDS
        )
    with pytest.raises(ValueError, match="needs the tokens' ids, got none"):
        encoder.extract_attribution_features({1: torch.randn(1, 2, H)}, exclude={3})


def test_wrapped_models():
    model = made(llama)
    ids = torch.stack(prompts(5))
    hooks = (
        "hook_resid_mid",
        "hook_mlp_out",
        "mlp.hook_in",
        "ln2.hook_normalized",
        "model.layers.1.self_attn:output",
    )
    wanted = [capture(model, ids, [1], hook).hidden[1] for hook in hooks]
    compiled = torch.compile(model)
    for hook, states in zip(hooks, wanted, strict=True):
        assert torch.equal(capture(compiled, ids, [1], hook).hidden[1], states)
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for hook, states in zip(hooks, wanted, strict=True):
        assert torch.equal(capture(model, ids, [1], hook).hidden[1], states)
    with torch.no_grad():
        model(ids)  # still runs


def test_offload_to_disk(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, ids = made(llama), torch.stack(prompts(5))
    wanted = capture(model, ids, [1]).hidden[1]
    accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert torch.equal(capture(model, ids, [1]).hidden[1], wanted)


def test_adapters():
    peft = pytest.importorskip("peft")
    base, ids = made(llama), torch.stack(prompts(5))
    before = capture(base, ids, [1]).hidden[1]
    model = peft.get_peft_model(
        base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    assert torch.equal(
        capture(model, ids, [1], "model.layers.{l}.mlp:input").hidden[1], before
    )  # LoRA starts at nothing
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(1.0)
    after = capture(model, ids, [1]).hidden[1]
    assert not torch.allclose(after, before, atol=1e-3)
    pre, post = (
        capture(model, ids, [layer], hook).hidden[layer]
        for layer, hook in ((1, "hook_resid_pre"), (0, "hook_resid_post"))
    )
    assert torch.equal(pre, post)


def test_dropout_is_told():
    model, (row,) = made(llama), prompts(7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        capture(model, row, [1])
        capture(model.train(), row, [1])  # its dropout is 0

    def dropping_llama():
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**GROUPED, attention_dropout=0.3)
        )

    for family in (gpt2, dropping_llama):
        each = made(family)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            capture(each, row, [1])
        with pytest.warns(UserWarning, match=r"in training mode: dropout in .* model\.eval"):
            capture(each.train(), row, [1])
        assert each.training


def test_weights_in_another_layer_are_told():
    model, (row,) = made(llama), prompts(7)
    weights = TranscoderWeights(torch.randn(30, H), torch.randn(30), layer=1, hook_in="mlp.hook_in")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SparseTranscoderEncoder({1: weights}, 4, 0.1).encode_model(model, row)
    with pytest.warns(
        UserWarning, match="other layers than their own: layer 0 has those of layer 1"
    ):
        SparseTranscoderEncoder({0: weights}, 4, 0.1).encode_model(model, row)
