"""Places in models that bitsandbytes quantised, on the CPU, against hooks of the test's own."""

import logging

import pytest
import torch
import transformers
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights, capture

bitsandbytes = pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

H, LAYER = 64, 1
KINDS = {
    "8 bit": ({"load_in_8bit": True}, "Linear8bitLt"),
    "fp4": ({"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}, "Linear4bit"),
    "nf4, bfloat16": (
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        "Linear4bit",
    ),
}


@pytest.fixture(params=KINDS)
def model(request, tmp_path):
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    options, linear = KINDS[request.param]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=H,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    plain = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    plain.save_pretrained(tmp_path)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=transformers.BitsAndBytesConfig(**options),
        device_map="cpu",
    ).eval()
    assert type(quantised.model.layers[LAYER].mlp.up_proj).__name__ == linear
    return quantised


def seen(model, ids):
    """What the layer's parts are given and give in one pass."""
    block, got = model.model.layers[LAYER], {}

    def keep(name, side):
        def hook(module, args, output):
            value = args[0] if side == "input" else output
            got[name] = (value[0] if isinstance(value, tuple) else value).detach()[0].clone()

        return hook

    parts = [
        (block.mlp, "mlp.hook_in", "input"),
        (block.mlp, "mlp.hook_out", "output"),
        (block.post_attention_layernorm, "hook_resid_mid", "input"),
        (block, "hook_resid_post", "output"),
    ]
    hooks = [part.register_forward_hook(keep(name, side)) for part, name, side in parts]
    before = block.register_forward_pre_hook(
        lambda module, args: got.update(hook_resid_pre=args[0].detach()[0].clone())
    )
    with torch.no_grad():
        model(ids)
    for hook in (*hooks, before):
        hook.remove()
    got["hook_mlp_out"] = got["mlp.hook_out"]
    return got


def test_places(model):
    ids = torch.tensor([[3, 9, 27, 41, 5]])
    expected = seen(model, ids)
    for name, states in expected.items():
        got = capture(model, ids, [LAYER], name)
        assert torch.equal(got.hidden[LAYER], states), name
    both = expected["hook_resid_mid"] + expected["hook_mlp_out"]
    torch.testing.assert_close(both, expected["hook_resid_post"], rtol=1e-5, atol=1e-5)


def test_features_while_it_generates(model):
    torch.manual_seed(1)
    weights = TranscoderWeights(
        torch.randn(200, H), torch.randn(200), torch.randn(H, 200), hook_in="mlp.hook_in",
        hook_out="mlp.hook_out",
    )  # fmt: skip
    encoder = SparseTranscoderEncoder({LAYER: weights}, 10, 0.1)
    ids = torch.tensor([[3, 9, 27, 41, 5]])
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with encoder.attach(model) as monitor:
        text = model.generate(ids, max_new_tokens=3, **options)
    prompt = encoder.encode_layer(LAYER, seen(model, ids)["mlp.hook_in"])
    found = monitor.features()[LAYER]
    assert len(found["indices"]) == text.shape[1] - 1
    assert torch.equal(found["indices"][:5], prompt["indices"])
    assert torch.equal(found["activations"][:5], prompt["activations"])
    with torch.no_grad():
        plain = seen(model, ids)["hook_resid_post"]
        with encoder.intervene(model, {LAYER: {7: 3.0}}):
            steered = seen(model, ids)["hook_resid_post"]
    direction = 3.0 * weights.W_dec[:, 7]
    # Releases of transformers differ in the dtype that they load a quantised model in.
    tolerance = 1e-3 if steered.dtype == torch.float32 else 3e-2
    moved = steered.float() - plain.float()
    torch.testing.assert_close(moved, direction.expand(5, H), rtol=tolerance, atol=tolerance)
