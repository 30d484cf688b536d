"""Gemma Scope 2's cross-layer transcoders: params_layer_{i}.safetensors."""

import pytest
import torch
from checkpoints import (
    Written,
    changed,
    check_stays_a_view,
    ints,
    jumprelu,
    load,
    parts,
    put,
    refused,
    weights_file,
)
from every_layout import EveryLayout
from oracle import normal
from sparse_transcoder import SparseTranscoderEncoder

L = 3


def gemma_scope_2_clt(root, i, F, H, affine=False):
    p = parts(F, H, i)
    theta, skip = ints(F, seed=i + 7), ints(H, H, seed=i + 9)
    w_dec = ints(F, L, H, seed=i + 8)
    w_dec[:, :i] = 0
    tensors = {"w_enc": p["W_enc"], "w_dec": w_dec, "threshold": theta}
    tensors |= {"b_enc": p["b_enc"], "b_dec": p["b_dec"]}
    if affine:
        tensors["affine_skip_connection"] = skip
    put(root / "clt" / "width_262k_l0_big", f"params_layer_{i}.safetensors", tensors)

    def encode(x):
        return jumprelu(x @ p["W_enc"] + p["b_enc"], theta)

    W_dec = w_dec[:, i:].reshape(F, -1).T
    W_skip = skip.T if affine else None
    return Written(encode, p["W_enc"].T, W_dec, p["b_dec"], W_skip, ("mlp.hook_in", ""))


def gemma_scope_2_clt_affine(root, i, F, H):
    return gemma_scope_2_clt(root, i, F, H, affine=True)


class TestGemmaScope2Clt(EveryLayout):
    WRITERS = (gemma_scope_2_clt, gemma_scope_2_clt_affine)
    NATIVE_CAN_HOLD = False


def test_the_decoder_stays_a_view_of_its_file(tmp_path):
    check_stays_a_view(tmp_path, gemma_scope_2_clt)


@pytest.mark.parametrize("F", [30, 8])
def test_every_layer_writes_to_itself_and_those_after_it(tmp_path, F):
    """The last layer too, whose decoder writes to one layer."""
    for i in range(L):
        gemma_scope_2_clt_affine(tmp_path, i, F, 8)
    loaded = load(tmp_path)
    encoder = SparseTranscoderEncoder(loaded, F, 0.0)
    x = normal(9, 8)
    for i, weights in loaded.items():
        assert weights.write_layers == L - i
        found = encoder.encode_layer(i, x)
        dense = torch.zeros(9, F).scatter(1, found["indices"], found["activations"]).double()
        parts = encoder.decode(i, found, x)
        parts = parts if i < L - 1 else {i: parts}
        assert list(parts) == list(range(i, L))
        for j, got in parts.items():
            want = dense @ weights.W_dec.double()[(j - i) * 8 : (j - i + 1) * 8].T
            if j == i:
                want = want + weights.b_dec.double() + x.double() @ weights.W_skip.double().T
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


def test_decoders_that_are_not_of_this_layer(tmp_path):
    gemma_scope_2_clt(tmp_path, 1, 30, 8)
    path = weights_file(tmp_path)
    changed(path, w_dec=torch.ones(30, L, 8))
    refused(tmp_path, path.name, "must be 0 for the layers before 1")
    changed(path, w_dec=torch.zeros(30, 1, 8))
    refused(tmp_path, path.name, "w_dec must be [30, L, 8] with L above layer 1, got [30, 1, 8]")
    changed(path, w_dec=torch.zeros(30, L, 9))
    refused(tmp_path, path.name, "w_dec must be [30, L, 8]")
