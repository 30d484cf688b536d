"""Which checkpoint a folder holds, and which layers."""

import json

import pytest
import torch
from checkpoints import changed, configured, load, parts, put, refused
from sparse_transcoder import load_transcoders, save_transcoders
from test_dictionary_learning import dictionary_learning_case
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
    with pytest.raises(
        ValueError, match=r"layer 3 is there 2 times, choose one with variant=: .*l0_5.*l0_70"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    "variant", ["average_l0_70", "width_16k/average_l0_70", "layer_*/*/average_l0_7*", "*_70/"]
)
def test_the_caller_chooses_between_coders_of_a_layer(tmp_path, variant):
    want = parts(30, 8, seed=7)
    gemma_scope(tmp_path, 3, 30, 8)
    put(
        tmp_path / "layer_3" / "width_16k" / "average_l0_70",
        "params.npz",
        want | {"threshold": torch.ones(30)},
    )
    loaded = load_transcoders(tmp_path, device="cpu", variant=variant)
    assert list(loaded) == [3] and torch.equal(loaded[3].W_enc, want["W_enc"].T)
    for other in ("average_l0_7", "l0_70", "params"):  # Whole names, not parts of them.
        with pytest.raises(ValueError, match=r"no coder's path has variant '.*', got layer_3/.*"):
            load_transcoders(tmp_path, device="cpu", variant=other)


def anonymous(root, i, F=30, H=8):
    """A checkpoint that says its layer nowhere."""
    want = gemma_scope(root / "made", i, F, H)
    (root / "made" / f"layer_{i}" / "width_16k" / "average_l0_5").rename(root / f"coder{i}")
    return want


def test_a_layer_that_nobody_says_is_not_0(tmp_path):
    want = anonymous(tmp_path, 3)
    refused(
        tmp_path, "coder3", "neither its config nor its folder's name tells the layer", "layer="
    )
    for given in (3, 0, 11):
        loaded = load_transcoders(tmp_path, device="cpu", layer=given)
        assert list(loaded) == [given] and loaded[given].layer == given
        assert torch.equal(loaded[given].W_enc, want.W_enc)
    assert list(load_transcoders(tmp_path, [3], "cpu", layer=3)) == [3]
    with pytest.raises(FileNotFoundError, match="no file for layer 4, only for 3"):
        load_transcoders(tmp_path, [4], "cpu", layer=3)


def test_layer_names_one_checkpoint(tmp_path):
    anonymous(tmp_path, 3)
    want = anonymous(tmp_path, 4)
    with pytest.raises(ValueError, match=r"2 do not say their layer, choose .*coder3.*coder4"):
        load_transcoders(tmp_path, device="cpu", layer=4)
    loaded = load_transcoders(tmp_path, device="cpu", layer=4, variant="coder4")
    assert torch.equal(loaded[4].W_enc, want.W_enc)


def test_layer_does_not_overrule_the_checkpoint(tmp_path):
    want = sae_lens(tmp_path, 5, 30, 8)
    with pytest.raises(FileNotFoundError, match="no file for layer 2, only for 5"):
        load_transcoders(tmp_path, device="cpu", layer=2)
    sae_lens(tmp_path, 6, 30, 8)
    loaded = load_transcoders(tmp_path, device="cpu", layer=5)
    assert list(loaded) == [5] and torch.equal(loaded[5].W_enc, want.W_enc)


def test_the_way_to_the_folder_does_not_overrule_the_caller(tmp_path):
    """Where the folder lies tells the layer only where nobody else does."""
    folder = tmp_path / "layers_7"
    anonymous(folder, 3)
    assert list(load(folder / "coder3")) == [7]
    assert list(load_transcoders(folder / "coder3", device="cpu", layer=3)) == [3]


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"layer": -1}, ValueError, "layer must be at least 0, got -1"),
        ({"layer": "3"}, TypeError, "layer must be an integer, got str"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"k": 2.5}, TypeError, "k must be an integer, got float"),
        ({"variant": 3}, TypeError, "variant must be a str, got int"),
        ({"k": 4}, ValueError, "params.npz: k must not be given, it is no top-k coder; got k=4"),
    ],
)
def test_arguments(tmp_path, arguments, error, words):
    gemma_scope(tmp_path, 3, 30, 8)
    with pytest.raises(error, match=words):
        load_transcoders(tmp_path, device="cpu", **arguments)


@pytest.mark.parametrize("write", [sparsify, dictionary_learning_case("AutoEncoderTopK"), sae_lens])
def test_k_that_stands_nowhere(tmp_path, write):
    write(tmp_path, 3, 30, 8)
    path = next(tmp_path.rglob("c*f*g.json"))
    if write is sae_lens:
        configured(path, architecture="topk", apply_b_dec_to_input=False)
        config = json.loads(path.read_text())
        del config["k"]
        path.write_text(json.dumps(config))
    elif write is sparsify:
        config = json.loads(path.read_text())
        del config["k"]
        path.write_text(json.dumps(config))
    else:
        configured(path, trainer={"dict_class": "AutoEncoderTopK", "layer": 3})
        changed(next(tmp_path.rglob("ae.pt")), k=None)
    refused(tmp_path, "its k stands nowhere in the checkpoint: give k=")
    assert load_transcoders(tmp_path, device="cpu", k=4)[3].k == 4


def test_a_native_set_in_a_subfolder(tmp_path):
    sparsify(tmp_path / "source", 3, 30, 8)
    want = load(tmp_path / "source")
    save_transcoders(want, tmp_path / "sets" / "a" / "native")
    loaded = load(tmp_path / "sets")
    assert list(loaded) == [3] and torch.equal(loaded[3].W_enc, want[3].W_enc)
    save_transcoders(want, tmp_path / "sets" / "b")
    with pytest.raises(
        ValueError, match="several checkpoints, choose one with variant=: a/native, b"
    ):
        load(tmp_path / "sets")
    loaded = load_transcoders(tmp_path / "sets", device="cpu", variant="b")
    assert loaded[3].source.startswith(str(tmp_path / "sets" / "b"))
    with pytest.raises(FileNotFoundError, match="layer 5"):
        load_transcoders(tmp_path / "sets" / "b", device="cpu", layer=5)


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
