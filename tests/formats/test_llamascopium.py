"""llamascopium: config.json beside sae_weights.safetensors."""

import pytest
import torch
from checkpoints import (
    HIDDEN,
    Written,
    check_k_beyond_64_bits,
    check_spoils_no_terminal,
    close,
    configured,
    dense,
    load,
    parts,
    put,
    randomise,
    relu,
    topk,
)
from every_layout import EveryLayout, WithConfig


def llamascopium_case(activation, rescaled=False, bias=True):
    def write(root, i, F, H):
        p = parts(F, H, i)
        norms = torch.tensor([0.5, 1.0, 2.0, 0.0])[torch.arange(F) % 4]
        W_D = torch.zeros(F, H)
        W_D[torch.arange(F), torch.arange(F) % H] = norms
        tensors = {"W_E": p["W_enc"], "b_E": p["b_enc"], "W_D": W_D}
        tensors["dataset_average_activation_norm.blocks.1.ln2.hook_normalized"] = torch.tensor(
            torch.nan
        )
        if bias:
            tensors["b_D"] = p["b_dec"]
        if activation == "jumprelu":
            tensors["activation_function.log_jumprelu_threshold"] = torch.zeros(F)
        hooks = ("ln2.hook_normalized", "hook_mlp_out")
        config = {
            "sae_type": "sae",
            "act_fn": activation,
            "top_k": 4,
            "norm_activation": "inference",
            "sparsity_include_decoder_norm": rescaled,
            "use_decoder_bias": bias,
            "hook_point_in": f"blocks.{i}.{hooks[0]}",
            "hook_point_out": f"blocks.{i}.{hooks[1]}",
        }
        put(root / f"L{i}TC", "sae_weights.safetensors", tensors, "config.json", config)

        def encode(x):
            pre = x @ p["W_enc"] + p["b_enc"]
            if activation == "jumprelu":
                return torch.where(pre * (norms if rescaled else 1.0) > 1.0, pre, 0.0)
            return topk(pre, 4) if activation == "topk" else relu(pre)

        return Written(encode, p["W_enc"].T, W_D.T, p["b_dec"] if bias else None, hooks=hooks)

    write.__name__ = (
        f"llamascopium_{activation}{'_rescaled' * rescaled}{'' if bias else '_no_bias'}"
    )
    return write


class TestLlamascopium(EveryLayout, WithConfig):
    WRITERS = (
        llamascopium_case("relu"),
        llamascopium_case("relu", rescaled=True, bias=False),
        llamascopium_case("jumprelu"),
        llamascopium_case("jumprelu", rescaled=True),
        llamascopium_case("topk"),
    )
    CONFIG = "config.json"
    UNSUPPORTED = (
        (
            llamascopium_case("topk"),
            {"sparsity_include_decoder_norm": True},
            ["topk", "decoder_norm"],
        ),
        (
            llamascopium_case("topk"),
            {"sparsity_include_decoder_norm": None},
            ["topk", "decoder_norm"],
        ),
        (llamascopium_case("relu"), {"act_fn": "batchtopk"}, ["batchtopk"]),
        (llamascopium_case("relu"), {"norm_activation": "token-wise"}, ["token-wise"]),
        (llamascopium_case("relu"), {"norm_activation": None}, ["norm_activation"]),
        (llamascopium_case("relu"), {"sae_type": "crosscoder"}, ["crosscoder"]),
        (llamascopium_case("relu"), {"use_glu_encoder": True}, ["use_glu_encoder"]),
        (llamascopium_case("relu"), {"act_fn": "jumprelu"}, ["log_jumprelu_threshold"]),
    )


@pytest.mark.parametrize("k", [2**63, 10**300])
def test_k_beyond_64_bits(tmp_path, k):
    check_k_beyond_64_bits(tmp_path, llamascopium_case("topk"), "top_k", k)


def test_hook_names_that_would_spoil_a_terminal(tmp_path):
    llamascopium_case("relu")(tmp_path, 0, 30, 8)
    configured(next(tmp_path.rglob("config.json")), hook_point_in="\x1b[31mred")
    check_spoils_no_terminal(tmp_path)


@pytest.mark.parametrize("F", [64, 16])
@pytest.mark.parametrize(
    "act_fn, rescaled", [("relu", False), ("jumprelu", False), ("jumprelu", True), ("topk", False)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_llamascopium(tmp_path, act_fn, rescaled, bias, F):
    reason = "llamascopium is not installed: make peers"
    peer = pytest.importorskip("llamascopium.models.sae", reason=reason)
    config = peer.SAEConfig(
        hook_point_in="blocks.3.ln2.hook_normalized",
        hook_point_out="blocks.3.hook_mlp_out",
        d_model=16,
        expansion_factor=F / 16,
        act_fn=act_fn,
        top_k=7,
        sparsity_include_decoder_norm=rescaled,
        use_decoder_bias=bias,
        norm_activation="inference",
        device="cpu",
        dtype=torch.float32,
    )
    model = randomise(peer.SparseAutoEncoder(config))
    model.save_pretrained(tmp_path / "L3TC")
    config.save_hyperparameters(tmp_path / "L3TC")
    weights = load(tmp_path)[3]
    kept = model.encode(HIDDEN)
    assert kept.count_nonzero() > 50
    assert close(dense(weights, HIDDEN), kept)
    ours = kept @ weights.W_dec.T + (weights.b_dec if bias else 0)
    assert torch.allclose(ours, model.decode(kept), atol=1e-5)
    assert (weights.hook_in, weights.hook_out) == ("ln2.hook_normalized", "hook_mlp_out")
