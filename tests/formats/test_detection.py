"""Which checkpoint a folder holds, and which layers."""

import pytest
import torch
from checkpoints import load, parts, put, refused
from test_gemma_scope import gemma_scope
from test_sae_lens import sae_lens
from test_sparsify import sparsify


def test_a_checkpoint_alone(tmp_path):
    """The folder of one checkpoint can be given, where its config or the folders tell the layer."""
    want = gemma_scope(tmp_path, 12, 30, 8)
    loaded = load(tmp_path / "layer_12" / "width_16k" / "average_l0_5")
    assert list(loaded) == [12] and torch.equal(loaded[12].W_enc, want.W_enc)
    sae_lens(tmp_path / "other", 7, 30, 8)
    assert list(load(tmp_path / "other" / "folder_7")) == [7]


def test_two_checkpoints_of_a_layer_are_not_chosen_between(tmp_path):
    gemma_scope(tmp_path, 3, 30, 8)
    gemma_scope(tmp_path, 4, 30, 8)
    put(tmp_path / "layer_3" / "width_16k" / "average_l0_70", "params.npz", parts(30, 8))
    assert list(load(tmp_path, [4])) == [4]
    with pytest.raises(ValueError, match=r"layer 3 is there 2 times.*average_l0_5.*average_l0_70"):
        load(tmp_path)


def test_two_layouts_in_one_folder(tmp_path):
    want = gemma_scope(tmp_path, 3, 30, 8), sparsify(tmp_path, 4, 30, 8)
    loaded = load(tmp_path)
    assert list(loaded) == [3, 4]
    assert all(torch.equal(loaded[i].W_enc, w.W_enc) for i, w in zip((3, 4), want, strict=True))


def test_layers_are_numbers_not_text(tmp_path):
    for i in (10, 2, 1):
        sparsify(tmp_path, i, 30, 8)
    assert list(load(tmp_path)) == [1, 2, 10]


def test_the_config_tells_the_layer_before_the_folder(tmp_path):
    sae_lens(tmp_path, 5, 30, 8)
    (tmp_path / "folder_5").rename(tmp_path / "layer_9")
    assert list(load(tmp_path)) == [5]


def test_a_config_that_lists_other_files_is_not_guessed_around(tmp_path):
    """The list gives the order of the layers; the names of the folders must not replace it."""
    gemma_scope(tmp_path, 3, 30, 8)
    (tmp_path / "config.yaml").write_text(
        "transcoders:\n  - layer_3/width_16k/average_l0_5/params.npz\n"
    )
    refused(tmp_path, "params.npz")
    (tmp_path / "config.yaml").write_text("title: not of this project\n")
    assert list(load(tmp_path)) == [3]


def test_no_checkpoint(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load(tmp_path)
