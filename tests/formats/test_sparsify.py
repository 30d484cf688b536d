"""sparsify: cfg.json beside sae.safetensors."""

import pytest
import torch
from checkpoints import (
    HIDDEN,
    Written,
    changed,
    check_is_not_waited_for,
    check_k_beyond_64_bits,
    check_stays_a_view,
    close,
    configured,
    dense,
    ints,
    load,
    parts,
    put,
    randomise,
    relu,
    topk,
    weights_file,
)
from every_layout import EveryLayout, WithConfig
from oracle import same_bits


def sparsify(root, i, F, H, transcode=True, skip=False):
    p = parts(F, H, i)
    W_skip = ints(H, H, seed=i + 9)
    tensors = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"]}
    tensors |= {"W_dec": p["W_dec"], "b_dec": p["b_dec"]}
    config = {
        "activation": "topk",
        "k": 4,
        "transcode": transcode,
        "skip_connection": skip,
        "d_in": H,
        "multi_topk": True,
    }
    if skip:
        tensors["W_skip"] = W_skip
    put(root / f"layers.{i}.mlp", "sae.safetensors", tensors, "cfg.json", config)

    def encode(x):
        return topk(relu((x if transcode else x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]), 4)

    hooks = ("mlp.hook_in" if transcode else "mlp.hook_out", "mlp.hook_out")
    return Written(encode, p["W_enc"].T, p["W_dec"].T, p["b_dec"], W_skip if skip else None, hooks)


def sparsify_skip(root, i, F, H):
    return sparsify(root, i, F, H, skip=True)


def sparsify_sae(root, i, F, H):
    return sparsify(root, i, F, H, transcode=False)


class TestSparsify(EveryLayout, WithConfig):
    WRITERS = (sparsify, sparsify_skip, sparsify_sae)
    CONFIG = "cfg.json"
    UNSUPPORTED = (
        (sparsify, {"activation": "groupmax"}, ["groupmax"]),
        (sparsify, {"signed": True}, ["signed"]),
        (sparsify, {"k": 0}, ["k must be at least 1"]),
        (sparsify, {"k": None}, ["k is missing"]),
        (sparsify, {"k": True}, ["k must be"]),
        (sparsify, {"transcode": "yes"}, ["transcode"]),
        (sparsify, {"skip_connection": True}, ["W_skip"]),
    )


def test_matrices_stay_views_of_their_file(tmp_path):
    check_stays_a_view(tmp_path, sparsify)


def test_pipes_and_links_in_a_circle_are_not_waited_for(tmp_path):
    check_is_not_waited_for(tmp_path, sparsify, "cfg.json")


@pytest.mark.parametrize("k", [2**63, 10**300])
def test_k_beyond_64_bits(tmp_path, k):
    check_k_beyond_64_bits(tmp_path, sparsify, "k", k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(tmp_path, dtype):
    p = parts(30, 8)
    tensors = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"]}
    tensors |= {"W_dec": p["W_dec"], "b_dec": p["b_dec"]}
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    config = {"k": 4, "transcode": True}
    put(tmp_path / "layers.0", "sae.safetensors", tensors, "cfg.json", config)
    weights = load(tmp_path)[0]
    assert weights.W_enc.dtype == weights.b_dec.dtype == dtype
    hidden = ints(9, 8, seed=4)
    assert torch.equal(dense(weights, hidden), topk(relu(hidden @ p["W_enc"] + p["b_enc"]), 4))


@pytest.mark.parametrize("F", [64, 16])
@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_sparsify(tmp_path, transcode, skip, F):
    reason = "eai-sparsify is not installed: pip install sparse_transcoder[peers]"
    peer = pytest.importorskip("sparsify", reason=reason)
    config = peer.SparseCoderConfig(num_latents=F, k=7, transcode=transcode, skip_connection=skip)
    model = randomise(peer.SparseCoder(16, config))
    model.save_to_disk(tmp_path / "layers.3.mlp")
    weights = load(tmp_path)[3]
    found = model.encode(HIDDEN)
    want = torch.zeros(50, F).scatter(1, found.top_indices, found.top_acts.detach())
    assert close(dense(weights, HIDDEN), want)
    assert same_bits(weights.W_skip, model.W_skip.detach() if skip else None)


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "x" * 5000])
def test_names_that_would_spoil_the_message(tmp_path, name):
    sparsify(tmp_path, 0, 30, 8)
    changed(weights_file(tmp_path), **{name: torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r'sae\.safetensors: tensor ".*" is not part of this layout'
    ) as caught:
        load(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    configured(next(tmp_path.rglob("cfg.json")), activation=name)
    with pytest.raises(ValueError, match="is not supported") as caught:
        load(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
