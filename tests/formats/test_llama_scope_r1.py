"""Llama Scope R1-Distill: config.json beside sae_weights.safetensors."""

import math

import pytest
import torch
from checkpoints import Written, changed, configured, dense, load, parts, put, refused
from every_layout import EveryLayout, WithConfig
from oracle import normal

HOOK = "blocks.{}.hook_resid_post"


def llama_scope_r1(root, i, F, H, rescaled=True, norm_in_config=False):
    """Scales and lengths are powers of 2, and exp(0) is 1, so that all is exact."""
    p = parts(F, H, i)
    norms = torch.tensor([0.5, 1.0, 2.0, 0.0])[torch.arange(F) % 4]
    W_dec = torch.zeros(F, H)
    W_dec[torch.arange(F), torch.arange(F) % H] = norms
    tensors = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"]}
    tensors |= {"decoder.weight": W_dec.T, "decoder.bias": p["b_dec"]}
    tensors["log_jumprelu_threshold"] = torch.zeros(F)
    hook, norm = HOOK.format(i), math.sqrt(H) / 2
    config = {
        "sae_type": "sae",
        "d_model": H,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": rescaled,
        "hook_point_in": hook,
        "hook_point_out": hook,
    }
    if norm_in_config:
        config["dataset_average_activation_norm"] = {"in": norm, "out": norm}
    else:
        value = torch.tensor(math.sqrt(H) / 2, dtype=torch.float32)
        tensors[f"dataset_average_activation_norm.{hook}"] = value
    put(root / f"L{i}R", "sae_weights.safetensors", tensors, "config.json", config)
    s = 2.0 if norm_in_config else math.sqrt(H) / float(torch.tensor(norm))

    def encode(x):
        pre = (s * x.double()) @ p["W_enc"].double() + p["b_enc"].double()
        return torch.where(pre * (norms if rescaled else 1.0) > 1.0, pre, 0.0).float()

    W_enc, b_dec = p["W_enc"].T * s, p["b_dec"] / s
    hooks = ("hook_resid_post", "hook_resid_post")
    return Written(encode, W_enc, W_dec.T / s, b_dec, hooks=hooks)


def llama_scope_r1_config(root, i, F, H):
    return llama_scope_r1(root, i, F, H, norm_in_config=True)


def llama_scope_r1_not_rescaled(root, i, F, H):
    return llama_scope_r1(root, i, F, H, rescaled=False, norm_in_config=True)


class TestLlamaScopeR1(EveryLayout, WithConfig):
    WRITERS = (llama_scope_r1_config, llama_scope_r1_not_rescaled)
    CONFIG = "config.json"
    UNSUPPORTED = (
        (llama_scope_r1, {"act_fn": "topk"}, ["topk"]),
        (llama_scope_r1, {"norm_activation": "batch-wise"}, ["batch-wise"]),
        (llama_scope_r1, {"sae_type": "crosscoder"}, ["crosscoder"]),
        (llama_scope_r1, {"hook_point_out": "blocks.9.hook_resid_post"}, ["needs dataset_average"]),
        (llama_scope_r1, {"d_model": 9}, ["d_model must be 8"]),
    )


@pytest.mark.parametrize("F", [64, 16])
@pytest.mark.parametrize("rescaled", [True, False])
def test_by_formula(tmp_path, F, rescaled):
    """Training's own formula in float64, with the norm stored in the file and any lengths."""
    llama_scope_r1(tmp_path, 3, F, 16, rescaled)
    W, b, D = normal(F, 16, seed=1), normal(F, seed=2), normal(16, F, seed=3)
    log = normal(F, seed=4)
    norm = torch.tensor(9.5)
    changed(
        next(tmp_path.rglob("*.safetensors")),
        **{
            "encoder.weight": W,
            "encoder.bias": b,
            "decoder.weight": D,
            "log_jumprelu_threshold": log,
            f"dataset_average_activation_norm.{HOOK.format(3)}": norm,
        },
    )
    x = 4 * normal(50, 16, seed=5)
    pre = 4 / 9.5 * x.double() @ W.T.double() + b.double()
    at_gate = pre * D.double().norm(dim=0) if rescaled else pre
    want = pre * (at_gate > log.double().exp())
    got = dense(load(tmp_path)[3], x)
    assert torch.equal(got > 0, want > 0) and 0.05 < (want > 0).double().mean() < 0.6
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_weights_that_are_normalized_already(tmp_path):
    """With norm_activation inference nothing is scaled, whatever norms are stored."""
    llama_scope_r1(tmp_path, 3, 30, 8)
    configured(next(tmp_path.rglob("config.json")), norm_activation="inference")
    path = next(tmp_path.rglob("*.safetensors"))
    W = normal(30, 8, seed=1)
    changed(path, **{"encoder.weight": W})
    assert torch.equal(load(tmp_path)[3].W_enc, W)


def test_a_norm_that_is_garbage(tmp_path):
    llama_scope_r1(tmp_path, 3, 30, 8)
    name = f"dataset_average_activation_norm.{HOOK.format(3)}"
    changed(next(tmp_path.rglob("*.safetensors")), **{name: torch.tensor(torch.nan)})
    refused(tmp_path, "must be above 0, got nan")
