"""Gemma Scope 2: params.safetensors, with or without its config.json."""

import pytest
import torch
from checkpoints import (
    CIRCUIT_TRACER,
    Written,
    changed,
    check_is_not_waited_for,
    check_stays_a_view,
    dense,
    ints,
    jumprelu,
    load,
    parts,
    put,
    refused,
    relu,
    weights_file,
)
from every_layout import EveryLayout, WithConfig


def gemma_scope_2(root, i, F, H, affine=False, config=True):
    p = parts(F, H, i)
    theta, skip = ints(F, seed=i + 7), ints(H, H, seed=i + 9)
    tensors = {"w_enc": p["W_enc"], "w_dec": p["W_dec"], "threshold": theta}
    tensors |= {"b_enc": p["b_enc"], "b_dec": p["b_dec"]}
    if affine:
        tensors["affine_skip_connection"] = skip
    hooks = (
        "model.layers.1.pre_feedforward_layernorm.output",
        "model.layers.1.post_feedforward_layernorm.output",
    )
    declared = {
        "architecture": "jump_relu",
        "affine_connection": affine,
        "hf_hook_point_in": hooks[0],
        "hf_hook_point_out": hooks[1],
    }
    folder = root / f"layer_{i}_width_16k_l0_small{'_affine' * affine}"
    put(folder, "params.safetensors", tensors, "config.json" if config else None, declared)
    return Written(
        lambda x: jumprelu(x @ p["W_enc"] + p["b_enc"], theta),
        p["W_enc"].T,
        p["W_dec"].T,
        p["b_dec"],
        skip.T if affine else None,  # y += x @ skip
        hooks if config else ("", ""),
    )


def gemma_scope_2_affine(root, i, F, H):
    return gemma_scope_2(root, i, F, H, affine=True)


def gemma_scope_2_without_config(root, i, F, H):
    return gemma_scope_2(root, i, F, H, config=False)


class TestGemmaScope2(EveryLayout, WithConfig):
    WRITERS = (gemma_scope_2, gemma_scope_2_affine, gemma_scope_2_without_config)
    CONFIG = "config.json"
    UNSUPPORTED = (
        (gemma_scope_2, {"architecture": "gated"}, ["gated"]),
        (gemma_scope_2, {"affine_connection": True}, ["affine"]),
    )


def test_matrices_stay_views_of_their_file(tmp_path):
    check_stays_a_view(tmp_path, gemma_scope_2)


def test_pipes_and_links_in_a_circle_are_not_waited_for(tmp_path):
    """The config may be absent, but what is there must be read."""
    check_is_not_waited_for(tmp_path, gemma_scope_2, "config.json")
    refused(tmp_path, "config.json")


def test_multi_layer_gemma_scope_2_is_named(tmp_path):
    gemma_scope_2(tmp_path, 0, 30, 8)
    changed(weights_file(tmp_path), w_dec=torch.zeros(30, 4, 8))
    refused(tmp_path, "cross")


@pytest.mark.parametrize("F, H", [(64, 16), (16, 16)])
def test_as_circuit_tracer_reads_it(tmp_path, F, H):
    name = "circuit_tracer.transcoder.single_layer_transcoder"
    peer = pytest.importorskip(name, reason=CIRCUIT_TRACER)
    gemma_scope_2_affine(tmp_path, 4, F, H)
    path = str(weights_file(tmp_path))
    model = peer.load_gemma_scope_2_transcoder(path, 4, device=torch.device("cpu"))
    hidden = ints(40, H, seed=20)
    weights = load(tmp_path)[4]
    # The engine never returns a negative activation, whatever the threshold.
    assert torch.equal(dense(weights, hidden), relu(model.encode(hidden)))
    assert torch.equal(weights.W_skip, model.W_skip)
