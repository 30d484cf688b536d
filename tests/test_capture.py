"""Hidden states of Hugging Face models: the right place and positions, whatever the padding."""

import pytest
import torch
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights, capture

transformers = pytest.importorskip("transformers")

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
    """A small model whose weights are not those it starts with, so that no two places agree."""
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


@pytest.mark.parametrize("family", [gpt2, gpt_neox])
def test_layer_norm_output_is_the_mlp_input(family):
    model = made(family)
    ids = torch.stack(prompts(5))
    normalized = capture(model, ids, [1], "ln2.hook_normalized").hidden[1]
    assert torch.equal(normalized, capture(model, ids, [1], "mlp.hook_in").hidden[1])


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
    for hook in ("hook_resid_mid", "ln2.hook_normalized"):
        with pytest.raises(
            ValueError,
            match=f"layer 1: {hook} needs a norm between attention and MLP, got GPTNeoXLayer",
        ):
            capture(model, ids, [1], hook)


IDS = torch.tensor([[3, 4]])


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (
            {"hook": "attn.hook_in"},
            ValueError,
            r"layer 0: hook must be one of mlp.hook_in, .*, got 'attn.hook_in'",
        ),
        ({"hook": "blocks.1.mlp.hook_in"}, ValueError, "layer 0: hook must be one of"),
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
            {"inputs": {"input_ids": IDS, "position_ids": IDS}},
            ValueError,
            "alone, got also position_ids",
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
            "model must be a Hugging Face causal model .*, got Linear",
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
    with pytest.raises(
        ValueError,
        match=r"layer 0: hook must be blocks.0.mlp.hook_in as the weights record, got hook",
    ):
        encoder.encode_model(model, IDS, hook="hook_resid_mid")
    with pytest.raises(ValueError, match="layer 1: hook must be given, the weights record none"):
        encoder.encode_model(model, IDS)
    with pytest.raises(
        KeyError, match="layer 2: there is no transcoder for it, only for layers 0, 1"
    ):
        encoder.encode_model(model, IDS, layers=[2])
    with pytest.raises(ValueError, match="layers must name at least one"):
        encoder.encode_model(model, IDS, layers=[])
