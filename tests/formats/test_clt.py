"""circuit-tracer's cross-layer transcoders."""

import pytest
import torch
from checkpoints import (
    CIRCUIT_TRACER,
    HIDDEN,
    Written,
    check_spoils_no_terminal,
    check_stays_a_view,
    close,
    dense,
    ints,
    jumprelu,
    load,
    parts,
    put,
    randomise,
    refused,
    relu,
)
from every_layout import EveryLayout
from safetensors.torch import load_file


def clt(root, i, F, H, threshold=True, n=3):
    p = parts(F, H, i)
    theta = ints(F, seed=i + 7)
    W_dec = ints(F, n - i, H, seed=i + 8)
    tensors = {f"W_enc_{i}": p["W_enc"].T, f"b_enc_{i}": p["b_enc"], f"b_dec_{i}": p["b_dec"]}
    put(root, f"W_enc_{i}.safetensors", tensors | ({f"threshold_{i}": theta} if threshold else {}))
    put(root, f"W_dec_{i}.safetensors", {f"W_dec_{i}": W_dec})
    (root / "config.yaml").write_text(
        "model_kind: cross_layer_transcoder\n"
        "feature_input_hook: hook_resid_mid\n"
        "feature_output_hook: hook_mlp_out\n"
    )

    def encode(x):
        pre = x @ p["W_enc"] + p["b_enc"]
        return jumprelu(pre, theta) if threshold else relu(pre)

    stacked = W_dec.permute(1, 2, 0).reshape((n - i) * H, F)
    hooks = ("hook_resid_mid", "hook_mlp_out")
    return Written(encode, p["W_enc"].T, stacked, p["b_dec"], hooks=hooks)


def clt_relu(root, i, F, H):
    return clt(root, i, F, H, threshold=False)


class TestClt(EveryLayout):
    WRITERS = (clt, clt_relu)
    NATIVE_CAN_HOLD = False


def test_matrices_stay_views_of_their_file(tmp_path):
    check_stays_a_view(tmp_path, clt)


def test_clt_layers_may_be_taken_alone(tmp_path):
    want = [clt(tmp_path, i, 30, 8) for i in range(3)]
    weights = load(tmp_path, [1])[1]
    assert weights.W_dec.shape == (2 * 8, 30) and weights.b_dec.shape == (8,)
    written = load_file(tmp_path / "W_dec_1.safetensors")["W_dec_1"]
    assert torch.equal(weights.W_dec[8:], written[:, 1].T)
    assert torch.equal(dense(weights, ints(5, 8, seed=3)), want[1].encode(ints(5, 8, seed=3)))


@pytest.mark.parametrize("shape", [(30, 8), (30, 0, 8), (8, 3, 30), (31, 3, 8)])
def test_clt_decoders_that_do_not_fit(tmp_path, shape):
    clt(tmp_path, 0, 30, 8)
    put(tmp_path, "W_dec_0.safetensors", {"W_dec_0": torch.zeros(shape)})
    refused(tmp_path, "W_dec_0")
    (tmp_path / "W_dec_0.safetensors").unlink()
    refused(tmp_path, "W_dec_0.safetensors")


def test_hook_names_that_would_spoil_a_terminal(tmp_path):
    clt(tmp_path, 0, 30, 8)
    (tmp_path / "config.yaml").write_text("feature_input_hook: \x1b[31mred\n")
    check_spoils_no_terminal(tmp_path)


def test_a_config_without_its_files(tmp_path):
    (tmp_path / "config.yaml").write_text("model_kind: cross_layer_transcoder\n")
    with pytest.raises(FileNotFoundError, match=r"no W_enc_\{i\}.safetensors of a cross-layer"):
        load(tmp_path)


def test_a_config_line_without_end(tmp_path):
    """It is read in one pass: a search that goes back and forth would not return."""
    clt(tmp_path, 0, 30, 8)
    line = "title: x" + 500_000 * " " + "y"
    (tmp_path / "config.yaml").write_text(
        f"{line}\nfeature_input_hook: 'hook_resid_mid'  # here\nscan: a#b # c\n"
    )
    assert load(tmp_path)[0].hook_in == "hook_resid_mid"


@pytest.mark.parametrize("F", [64, 16])
@pytest.mark.parametrize("activation", ["relu", "jump_relu"])
def test_circuit_tracer_clt(tmp_path, activation, F):
    name = "circuit_tracer.transcoder.cross_layer_transcoder"
    peer = pytest.importorskip(name, reason=CIRCUIT_TRACER)
    model = peer.CrossLayerTranscoder(
        3, F, 16, activation, lazy_decoder=False, device=torch.device("cpu"), dtype=torch.float32
    )
    randomise(model).to_safetensors(str(tmp_path))
    loaded = load(tmp_path)
    want = model.encode(HIDDEN.expand(3, -1, -1))
    assert list(loaded) == [0, 1, 2]
    for i, weights in loaded.items():
        assert close(dense(weights, HIDDEN), want[i])
        by_target = weights.W_dec.reshape(3 - i, 16, F)
        assert torch.equal(by_target, model.W_dec[i].detach().permute(1, 2, 0))
        assert torch.equal(weights.b_dec, model.b_dec[i])
