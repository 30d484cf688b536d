"""SAELens: cfg.json beside sae_weights.safetensors."""

import json
import warnings

import pytest
import torch
from checkpoints import (
    HIDDEN,
    Written,
    changed,
    check_k_beyond_64_bits,
    close,
    configured,
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
from oracle import normal
from sparse_transcoder import SparseTranscoderEncoder


def sae_lens(root, i, F, H, architecture="transcoder", centred=False, old=False, rescaled=False):
    p = parts(F, H, i)
    threshold, skip = ints(F, seed=i + 7), ints(H, H, seed=i + 9)
    norms = torch.ones(F)
    if rescaled:  # Lengths of decoder directions that make all exact.
        norms = torch.tensor([0.5, 1.0, 2.0, 0.0])[torch.arange(F) % 4]
        p["W_dec"] = torch.zeros(F, H)
        p["W_dec"][torch.arange(F), torch.arange(F) % H] = norms
    tensors = dict(p)
    if architecture == "gated":
        del tensors["b_enc"]
        tensors |= {"b_mag": p["b_enc"], "b_gate": threshold, "r_mag": torch.zeros(F)}
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
        "rescale_acts_by_decoder_norm": rescaled,
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
        if architecture == "gated":
            return relu(pre) * (pre - p["b_enc"] + threshold > 0)
        pre = pre * norms
        return topk(pre, 4) if "topk" in architecture else relu(pre)

    hooks = ("hook_mlp_in", "hook_mlp_in" if old else "hook_mlp_out")
    W_skip = skip if "skip" in architecture else None
    W_dec = p["W_dec"].T / norms.where(norms > 0, 1.0)
    return Written(encode, p["W_enc"].T * norms[:, None], W_dec, p["b_dec"], W_skip, hooks)


def sae_lens_case(architecture, centred=False, old=False, rescaled=False):
    def write(root, i, F, H):
        return sae_lens(root, i, F, H, architecture, centred, old, rescaled)

    more = "_centred" * centred + "_old" * old + "_rescaled" * rescaled
    write.__name__ = f"sae_lens_{architecture}{more}"
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
        sae_lens_case("gated"),
        sae_lens_case("gated", centred=True),
        sae_lens_case("topk", rescaled=True),
        sae_lens_case("topk", centred=True, rescaled=True),
    )
    CONFIG = "cfg.json"
    UNSUPPORTED = (
        (sae_lens, {"architecture": "gated"}, ["b_gate is missing"]),
        (sae_lens, {"architecture": "batchtopk"}, ["batchtopk"]),
        (sae_lens, {"architecture": "temporal"}, ["temporal"]),
        (sae_lens, {"architecture": "jumprelu_transcoder"}, ["threshold"]),
        (sae_lens, {"rescale_acts_by_decoder_norm": True}, ["rescale_acts_by_decoder_norm"]),
        (sae_lens, {"d_in": 9}, ["d_in must be 8 like the tensors', got 9"]),
        (sae_lens, {"d_sae": 31}, ["d_sae must be 30"]),
        (sae_lens, {"d_out": 16}, ["d_out must be 8"]),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gated_by_formula(tmp_path, dtype):
    """The project's two branches, in float64 on the stored tensors."""
    sae_lens(tmp_path, 3, 300, 16, "gated")
    path = next(tmp_path.rglob("*.safetensors"))
    names = ("b_gate", "b_mag", "r_mag")
    given = {name: normal(300, seed=i).to(dtype) for i, name in enumerate(names)}
    given |= {"W_enc": normal(16, 300, seed=5).to(dtype)}
    changed(path, **given)
    wide = {name: value.double() for name, value in given.items()}
    product = HIDDEN.double() @ wide["W_enc"]
    magnitude = HIDDEN.double() @ (wide["W_enc"] * wide["r_mag"].exp()) + wide["b_mag"]
    want = (product + wide["b_gate"] > 0) * magnitude.clamp(min=0)
    got = dense(load(tmp_path)[3], HIDDEN)
    assert torch.equal(got > 0, want > 0) and 0.2 < (want > 0).double().mean() < 0.8
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    closed = (product + wide["b_gate"] <= 0) & (magnitude > 0)
    assert closed.any() and ((product + wide["b_gate"] > 0) & (magnitude <= 0)).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("F", [300, 16])
def test_rescaled_top_k_by_formula(tmp_path, F, dtype):
    """The project's encode and decode, in float64 on the stored tensors."""
    sae_lens(tmp_path, 3, F, 16, "topk", rescaled=True)
    path = next(tmp_path.rglob("*.safetensors"))
    W_enc, b_enc = normal(16, F, seed=5).to(dtype), normal(F, seed=6).to(dtype)
    W_dec = (normal(F, 16, seed=7) * (1 + torch.arange(F) % 5)[:, None]).to(dtype)
    changed(path, W_enc=W_enc, b_enc=b_enc, W_dec=W_dec)
    norm = W_dec.double().norm(dim=-1)
    pre = (HIDDEN.double() @ W_enc.double() + b_enc.double()) * norm
    want = topk(pre, 4)
    weights = load(tmp_path)[3]
    got = dense(weights, HIDDEN)
    assert torch.equal(got > 0, want > 0)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    ours = got.double() @ weights.W_dec.T.double()
    torch.testing.assert_close(ours, want / norm @ W_dec.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", ["transcoder", "skip_transcoder"])
@pytest.mark.parametrize("width", [8, 16, 20, 32])
def test_transcoders_that_write_to_another_width(tmp_path, architecture, width):
    sae_lens(tmp_path, 3, 30, 8, architecture)
    path = next(tmp_path.rglob("*.safetensors"))
    W_dec, b_dec, x = normal(30, width, seed=1), normal(width, seed=2), normal(5, 8, seed=3)
    W_skip = normal(width, 8, seed=4) if architecture == "skip_transcoder" else None
    changed(path, W_dec=W_dec, b_dec=b_dec, **({} if W_skip is None else {"W_skip": W_skip}))
    configured(path.with_name("cfg.json"), d_in=8, d_out=width)
    weights = load(tmp_path)[3]
    assert weights.write_layers == 1
    encoder = SparseTranscoderEncoder({3: weights}, 30, 0.0)
    got = encoder.decode(3, encoder.encode_layer(3, x), x)
    want = dense(weights, x).double() @ W_dec.double() + b_dec.double()
    if W_skip is not None:
        want += x.double() @ W_skip.double().T
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_a_changed_model_and_unknown_keys_are_told_in_one_warning(tmp_path):
    for i in (3, 4):
        sae_lens(tmp_path, i, 30, 8)
        path = tmp_path / f"folder_{i}" / "cfg.json"
        metadata = json.loads(path.read_text())["metadata"]
        kwargs = {"center_writing_weights": True, "fold_ln": True, "n_devices": 2}
        metadata |= {"model_from_pretrained_kwargs": kwargs, "rotary": "new"}
        configured(path, metadata=metadata, gate_bias=3, nothing=None)
    with pytest.warns(UserWarning) as caught:
        load(tmp_path)
    (warning,) = caught
    text = str(warning.message)
    assert warning.filename.endswith("checkpoints.py") and "\n" not in text
    for words in (
        str(tmp_path),
        "(layers 3, 4)",
        "model_from_pretrained_kwargs says",
        "from_pretrained_no_processing(.., center_writing_weights=True, fold_ln=True)",
        "cfg.json has keys that are not known, ignored: gate_bias",
        "rotary",
    ):
        assert words in text, text
    assert "n_devices" not in text and "nothing" not in text


@pytest.mark.parametrize("kwargs", [None, {}, {"center_writing_weights": False, "n_devices": 4}])
def test_a_model_as_it_is_published_needs_no_warning(tmp_path, kwargs):
    sae_lens(tmp_path, 3, 30, 8)
    path = next(tmp_path.rglob("cfg.json"))
    metadata = json.loads(path.read_text())["metadata"]
    configured(path, metadata=metadata | {"model_from_pretrained_kwargs": kwargs})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path)


def test_old_files_say_their_layer_and_model_beside_the_other_options(tmp_path):
    sae_lens(tmp_path, 3, 30, 8, "standard", old=True)
    path = next(tmp_path.rglob("cfg.json"))
    configured(path, hook_point="hook_embed", hook_layer=7, hook_head_index=2)
    configured(path, model_from_pretrained_kwargs={"center_writing_weights": True})
    with pytest.warns(UserWarning, match=r"center_writing_weights=True.*reads head 2") as caught:
        assert list(load(tmp_path)) == [7]
    assert len(caught) == 1


def test_a_hook_of_another_layer_is_kept_whole(tmp_path):
    sae_lens(tmp_path, 3, 30, 8)
    path = next(tmp_path.rglob("cfg.json"))
    names = {"hook_name": "blocks.3.hook_mlp_in", "hook_name_out": "blocks.5.hook_resid_post"}
    configured(path, metadata=names)
    weights = load(tmp_path)[3]
    assert (weights.hook_in, weights.hook_out) == ("hook_mlp_in", "blocks.5.hook_resid_post")


@pytest.mark.parametrize("F", [64, 16])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    "architecture",
    [
        "standard",
        "gated",
        "jumprelu",
        "topk",
        "topk_rescaled",
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
        "architecture": architecture.removesuffix("_rescaled"),
    }
    if "transcoder" in architecture:
        options["d_out"] = 16
    elif "topk" in architecture:
        options |= {"k": 7, "rescale_acts_by_decoder_norm": architecture == "topk_rescaled"}
    model = randomise(peer.SAE.from_dict(options))
    model.save_model(tmp_path / "any_name")
    weights = load(tmp_path)[3]
    assert close(dense(weights, HIDDEN), model.encode(HIDDEN))
    assert (weights.hook_in, weights.hook_out) == ("ln2.hook_normalized", "hook_mlp_out")
    if architecture == "skip_transcoder":
        kept = model.encode(HIDDEN)
        ours = kept @ weights.W_dec.T + weights.b_dec + HIDDEN @ weights.W_skip.T
        assert torch.allclose(ours, model(HIDDEN), atol=1e-4)
