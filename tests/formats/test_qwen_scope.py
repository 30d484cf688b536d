"""Qwen-Scope: layer{i}.sae.pt in a folder whose name tells k."""

import pytest
import torch
from checkpoints import Written, dense, ints, load, parts, put, refused, topk
from every_layout import EveryLayout
from sparse_transcoder import load_transcoders

NAME = "SAE-Res-Qwen3-8B-Base-W64K-L0_4"


def qwen_scope(root, i, F, H, folder=NAME):
    p = parts(F, H, i)
    tensors = {"W_enc": p["W_enc"].T.contiguous(), "W_dec": p["W_dec"].T.contiguous()}
    put(root / folder, f"layer{i}.sae.pt", tensors | {n: p[n] for n in ("b_enc", "b_dec")})

    def encode(x):
        return topk(x @ p["W_enc"] + p["b_enc"], 4)

    hooks = ("hook_resid_post", "hook_resid_post")
    return Written(encode, p["W_enc"].T, p["W_dec"].T, p["b_dec"], hooks=hooks)


class TestQwenScope(EveryLayout):
    WRITERS = (qwen_scope,)


def test_k_of_the_folder_or_of_the_caller(tmp_path):
    want = qwen_scope(tmp_path, 3, 30, 8, "weights")
    refused(tmp_path, "layer3.sae.pt", "its k stands nowhere in the checkpoint: give k=")
    weights = load_transcoders(tmp_path, device="cpu", k=4)[3]
    hidden = ints(40, 8, seed=20)
    assert weights.k == 4 and torch.equal(dense(weights, hidden), want.encode(hidden))
    snapshot = tmp_path / f"models--Qwen--{NAME}" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    (tmp_path / "weights").rename(snapshot)
    assert load(snapshot)[3].k == 4
    with pytest.raises(ValueError, match=r"layer3.*it is a top-k coder of k 4; got k=5"):
        load_transcoders(snapshot, device="cpu", k=5)


@pytest.mark.parametrize("name", ["x-W64K-L0_0", "x-W64K-L0_", "L0_4", "x-W64K-L0_99999999999"])
def test_names_that_tell_no_k(tmp_path, name):
    qwen_scope(tmp_path, 3, 30, 8, name)
    refused(tmp_path, "give k=")
