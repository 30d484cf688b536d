"""qresearch's SAEs of DeepSeek-R1: one file with l{i} in its name."""

import pytest
import torch
from checkpoints import Written, load, parts, put, relu
from every_layout import EveryLayout


def state(p):
    return {
        "encoder.weight": p["W_enc"].T.contiguous(),
        "encoder.bias": p["b_enc"],
        "decoder.weight": p["W_dec"].T.contiguous(),
        "decoder.bias": p["b_dec"],
    }


def deepseek_r1(root, i, F, H):
    p = parts(F, H, i)
    put(root, f"Llama-3.1-8B-Instruct-SAE-l{i}.pt", state(p))

    def encode(x):
        return relu(x @ p["W_enc"] + p["b_enc"])

    hooks = ("hook_resid_post", "hook_resid_post")
    return Written(encode, p["W_enc"].T, p["W_dec"].T, p["b_dec"], hooks=hooks)


class TestQresearch(EveryLayout):
    WRITERS = (deepseek_r1,)


@pytest.mark.parametrize(
    "name", ["DeepSeek-R1-Distill-Llama-8B-SAE-l5.pt", "sae-l5-v2.pt", "l5.pt"]
)
def test_names_of_files(tmp_path, name):
    p = parts(30, 8)
    torch.save(state(p), tmp_path / name)
    loaded = load(tmp_path)
    assert list(loaded) == [5] and torch.equal(loaded[5].W_enc, p["W_enc"].T)
