"""Llama Scope as first published: hyperparams.json and checkpoints/final.safetensors."""

import json
import math

import pytest
import torch
from checkpoints import Written, changed, configured, dense, load, parts, put, refused, relu
from every_layout import EveryLayout, WithConfig
from oracle import normal


def llama_scope(root, i, F, H, place="R", activation="jumprelu", rescaled=True):
    """Scales and lengths are powers of 2, so that all is exact."""
    p = parts(F, H, i)
    norms = torch.tensor([0.5, 1.0, 2.0, 0.0])[torch.arange(F) % 4]
    W_dec = torch.zeros(F, H)
    W_dec[torch.arange(F), torch.arange(F) % H] = norms
    tensors = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"]}
    tensors |= {"decoder.weight": W_dec.T, "decoder.bias": p["b_dec"]}
    s_in, s_out = (2.0, 2.0) if place == "R" else (2.0, 4.0)
    hooks = ("hook_resid_post",) * 2 if place == "R" else ("ln2.hook_normalized", "hook_mlp_out")
    config = {
        "d_model": H,
        "d_sae": F,
        "act_fn": activation,
        "jump_relu_threshold": 1.5,
        "top_k": 50,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {
            "in": math.sqrt(H) / s_in,
            "out": math.sqrt(H) / s_out,
        },
        "sparsity_include_decoder_norm": rescaled,
        "use_decoder_bias": True,
        "hook_point_in": f"blocks.{i}.{hooks[0]}",
        "hook_point_out": f"blocks.{i}.{hooks[1]}",
    }
    folder = root / f"Llama3_1-8B-Base-L{i}{place}-8x"
    put(folder / "checkpoints", "final.safetensors", tensors)
    (folder / "hyperparams.json").write_text(json.dumps(config))

    def encode(x):
        pre = s_in * x @ p["W_enc"] + p["b_enc"]
        if activation == "relu":
            return relu(pre)
        at_gate = pre * norms / s_out if rescaled else pre / s_in
        return torch.where(at_gate > 1.5, pre, 0.0)

    W_enc, b_dec = s_in * p["W_enc"].T, p["b_dec"] / s_out
    return Written(encode, W_enc, W_dec.T / s_out, b_dec, hooks=hooks)


def llama_scope_transcoder(root, i, F, H):
    return llama_scope(root, i, F, H, "TC")


def llama_scope_not_rescaled(root, i, F, H):
    return llama_scope(root, i, F, H, "TC", rescaled=False)


def llama_scope_relu(root, i, F, H):
    return llama_scope(root, i, F, H, activation="relu")


def llama_scope_topk(root, i, F, H):
    """Its loader makes a jumprelu coder of a top-k coder that has a threshold."""
    return llama_scope(root, i, F, H, activation="topk")


class TestLlamaScope(EveryLayout, WithConfig):
    WRITERS = (
        llama_scope,
        llama_scope_transcoder,
        llama_scope_not_rescaled,
        llama_scope_relu,
        llama_scope_topk,
    )
    CONFIG = "hyperparams.json"
    UNSUPPORTED = (
        (llama_scope, {"act_fn": "gelu"}, ["gelu"]),
        (llama_scope, {"act_fn": "topk", "jump_relu_threshold": 0.0}, ["topk without"]),
        (llama_scope, {"jump_relu_threshold": None}, ["jump_relu_threshold must be a finite"]),
        (llama_scope, {"norm_activation": "token-wise"}, ["token-wise"]),
        (llama_scope, {"use_glu_encoder": True}, ["use_glu_encoder"]),
        (llama_scope, {"apply_decoder_bias_to_pre_encoder": True}, ["pre_encoder"]),
        (llama_scope, {"dataset_average_activation_norm": {}}, ["needs dataset_average"]),
        (llama_scope, {"dataset_average_activation_norm": {"in": 0, "out": 1}}, ["above 0"]),
        (llama_scope, {"d_sae": 31}, ["d_sae must be 30 like the tensors', got 31"]),
        (llama_scope, {"d_model": 16}, ["d_model must be 8 like the tensors', got 16"]),
        (llama_scope, {"expansion_factor": 8}, ["expansion_factor must be 3.75"]),
    )


def publisher(tensors, config, x):
    """What lm_saes computes in float64: (activations, reconstruction).

    When it loads a checkpoint it moves the norms of the data set into the parameters, then the
    lengths of the decoder's directions, and compares with the threshold after both.
    """
    W, b = tensors["encoder.weight"].double(), tensors["encoder.bias"].double()
    D, c = tensors["decoder.weight"].double(), tensors["decoder.bias"].double()
    norms = config["dataset_average_activation_norm"]
    s_in, s_out = (math.sqrt(config["d_model"]) / norms[side] for side in ("in", "out"))
    b, c, D = b / s_in, c / s_out, D * s_in / s_out
    length = D.norm(dim=0)
    W, b, D = W * length[:, None], b * length, D / length
    pre = x.double() @ W.T + b
    acts = pre * (pre > config["jump_relu_threshold"])
    return acts, acts @ D.T + c


@pytest.mark.parametrize("norms", [(9.0, 9.0), (64.0, 3.4)])
@pytest.mark.parametrize("F", [64, 16])
def test_as_the_publisher_computes_it(tmp_path, norms, F):
    """The same features are active, and their reconstruction is the same."""
    llama_scope(tmp_path, 3, F, 16)
    path = next(tmp_path.rglob("final.safetensors"))
    tensors = {
        "encoder.weight": normal(F, 16, seed=1),
        "encoder.bias": normal(F, seed=2),
        "decoder.weight": normal(16, F, seed=3),
        "decoder.bias": normal(16, seed=4),
    }
    changed(path, **tensors)
    config_path = next(tmp_path.rglob("hyperparams.json"))
    norm = {"in": norms[0], "out": norms[1]}
    configured(config_path, dataset_average_activation_norm=norm)
    x = 4 * normal(50, 16, seed=5)
    acts, y = publisher(tensors, json.loads(config_path.read_text()), x)
    weights = load(tmp_path)[3]
    got = dense(weights, x)
    assert 0.05 < (acts > 0).double().mean() < 0.95
    assert torch.equal(got > 0, acts > 0)
    ours = got.double() @ weights.W_dec.T.double() + weights.b_dec.double()
    torch.testing.assert_close(ours, y, rtol=1e-5, atol=1e-5)
    pre = 4 / norms[0] * x.double() @ tensors["encoder.weight"].T.double()
    pre += tensors["encoder.bias"].double()
    torch.testing.assert_close(got.double(), pre * (acts > 0), rtol=1e-5, atol=1e-5)


def test_keys_that_are_not_known_are_named(tmp_path):
    llama_scope(tmp_path, 3, 30, 8)
    configured(next(tmp_path.rglob("hyperparams.json")), tp_size=1, rotation="random")
    with pytest.warns(UserWarning, match=r"hyperparams.json has .* ignored: rotation \(layer 3\)"):
        load(tmp_path)


def test_the_weights_are_missing(tmp_path):
    llama_scope(tmp_path, 0, 30, 8)
    changed(next(tmp_path.rglob("final.safetensors")), **{"decoder.weight": None})
    refused(tmp_path, "decoder.weight is missing")
