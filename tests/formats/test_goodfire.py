"""Goodfire: one file that ends in -l{i}.pt or -l{i}.pth."""

import pytest
import torch
from checkpoints import Written, load, parts, put, relu
from every_layout import EveryLayout


def state(p):
    return {
        "encoder_linear.weight": p["W_enc"].T.contiguous(),
        "encoder_linear.bias": p["b_enc"],
        "decoder_linear.weight": p["W_dec"].T.contiguous(),
        "decoder_linear.bias": p["b_dec"],
    }


def goodfire(root, i, F, H):
    p = parts(F, H, i)
    put(root, f"Llama-3.1-8B-Instruct-SAE-l{i}.pt", state(p))

    def encode(x):
        return relu(x @ p["W_enc"] + p["b_enc"])

    hooks = ("hook_resid_post", "hook_resid_post")
    return Written(encode, p["W_enc"].T, p["W_dec"].T, p["b_dec"], hooks=hooks)


class TestGoodfire(EveryLayout):
    WRITERS = (goodfire,)


@pytest.mark.parametrize(
    "name", ["Llama-3.3-70B-Instruct-SAE-l5.pt", "Llama-3.1-8B-Instruct-SAE-l5.pth"]
)
def test_names_of_files(tmp_path, name):
    p = parts(30, 8)
    torch.save(state(p), tmp_path / name)
    loaded = load(tmp_path)
    assert list(loaded) == [5] and torch.equal(loaded[5].W_enc, p["W_enc"].T)
