"""SAELens: cfg.json beside sae_weights.safetensors."""

import pytest
import torch
from checkpoints import (
    HIDDEN,
    Written,
    check_k_beyond_64_bits,
    close,
    dense,
    ints,
    jumprelu,
    load,
    parts,
    put,
    randomise,
    relu,
    topk,
)
from every_layout import EveryLayout, WithConfig


def sae_lens(root, i, F, H, architecture="transcoder", centred=False, old=False):
    p = parts(F, H, i)
    threshold, skip = ints(F, seed=i + 7), ints(H, H, seed=i + 9)
    tensors = dict(p)
    if "jumprelu" in architecture:
        tensors["threshold"] = threshold
    if "skip" in architecture:
        tensors["W_skip"] = skip
    hook = f"blocks.{i}.hook_mlp_in"
    config = {
        "architecture": architecture,
        "apply_b_dec_to_input": centred,
        "normalize_activations": "none",
        "k": 4,
        "metadata": {"hook_name": hook, "hook_name_out": f"blocks.{i}.hook_mlp_out"},
    }
    if old:  # Before version 6 the activation and the hooks were beside the other options.
        config = {
            "activation_fn_str": "topk",
            "activation_fn_kwargs": {"k": 4},
            "hook_point": hook,
        }
    put(root / f"folder_{i}", "sae_weights.safetensors", tensors, "cfg.json", config)

    def encode(x):
        pre = (x - p["b_dec"] if centred else x) @ p["W_enc"] + p["b_enc"]
        if "jumprelu" in architecture:
            return jumprelu(pre, threshold)
        return topk(pre, 4) if "topk" in architecture else relu(pre)

    hooks = ("hook_mlp_in", "hook_mlp_in" if old else "hook_mlp_out")
    W_skip = skip if "skip" in architecture else None
    return Written(encode, p["W_enc"].T, p["W_dec"].T, p["b_dec"], W_skip, hooks)


def sae_lens_case(architecture, centred=False, old=False):
    def write(root, i, F, H):
        return sae_lens(root, i, F, H, architecture, centred, old)

    write.__name__ = f"sae_lens_{architecture}{'_centred' * centred}{'_old' * old}"
    return write


class TestSaeLens(EveryLayout, WithConfig):
    WRITERS = (
        sae_lens_case("transcoder"),
        sae_lens_case("skip_transcoder"),
        sae_lens_case("jumprelu_transcoder"),
        sae_lens_case("jumprelu_skip_transcoder"),
        sae_lens_case("standard"),
        sae_lens_case("standard", centred=True),
        sae_lens_case("jumprelu"),
        sae_lens_case("jumprelu", centred=True),
        sae_lens_case("topk"),
        sae_lens_case("topk", centred=True),
        sae_lens_case("topk", centred=True, old=True),
    )
    CONFIG = "cfg.json"
    UNSUPPORTED = (
        (sae_lens, {"architecture": "gated"}, ["gated"]),
        (sae_lens, {"architecture": "batchtopk"}, ["batchtopk"]),
        (sae_lens, {"architecture": "temporal"}, ["temporal"]),
        (sae_lens, {"architecture": "jumprelu_transcoder"}, ["threshold"]),
        (
            sae_lens,
            {"architecture": "topk", "rescale_acts_by_decoder_norm": True},
            ["rescale_acts_by_decoder_norm"],
        ),
        (sae_lens, {"normalize_activations": "layer_norm"}, ["layer_norm"]),
        (
            sae_lens,
            {"normalize_activations": "expected_average_only_in"},
            ["expected_average_only_in"],
        ),
        (sae_lens, {"apply_b_dec_to_input": True}, ["apply_b_dec_to_input"]),
        (sae_lens, {"activation_fn": "tanh-relu"}, ["tanh-relu"]),
        (sae_lens, {"finetuning_scaling_factor": True}, ["finetuning_scaling_factor"]),
        (sae_lens, {"architecture": ["a", "\n"]}, ["architecture"]),
    )


@pytest.mark.parametrize("k", [2**63, 10**300])
def test_k_beyond_64_bits(tmp_path, k):
    check_k_beyond_64_bits(tmp_path, sae_lens_case("topk"), "k", k)


@pytest.mark.parametrize("F", [64, 16])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    "architecture",
    [
        "standard",
        "jumprelu",
        "topk",
        "transcoder",
        "skip_transcoder",
        "jumprelu_transcoder",
        "jumprelu_skip_transcoder",
    ],
)
def test_sae_lens(tmp_path, architecture, centred, F):
    reason = "sae-lens is not installed: pip install sparse_transcoder[peers]"
    peer = pytest.importorskip("sae_lens", reason=reason)
    if "transcoder" in architecture and centred:
        pytest.skip("transcoders have no input bias")
    metadata = {
        "hook_name": "blocks.3.ln2.hook_normalized",
        "hook_name_out": "blocks.3.hook_mlp_out",
    }
    options = {
        "d_in": 16,
        "d_sae": F,
        "apply_b_dec_to_input": centred,
        "metadata": metadata,
        "architecture": architecture,
    }
    if "transcoder" in architecture:
        options["d_out"] = 16
    elif architecture == "topk":
        options["k"] = 7
    model = randomise(peer.SAE.from_dict(options))
    model.save_model(tmp_path / "any_name")
    weights = load(tmp_path)[3]
    assert close(dense(weights, HIDDEN), model.encode(HIDDEN))
    assert (weights.hook_in, weights.hook_out) == ("ln2.hook_normalized", "hook_mlp_out")
    if architecture == "skip_transcoder":
        kept = model.encode(HIDDEN)
        ours = kept @ weights.W_dec.T + weights.b_dec + HIDDEN @ weights.W_skip.T
        assert torch.allclose(ours, model(HIDDEN), atol=1e-4)
