"""save_transcoders: what is written and refused. A set is there whole or not at all."""

import dataclasses

import pytest
import torch
from checkpoints import load
from every_layout import FIELDS
from oracle import FLOATS, normal, same_bits
from safetensors.torch import load_file
from sparse_transcoder import TranscoderWeights, save_transcoders

F, H = 30, 8


def full(layer=0, dtype=torch.float32, **more):
    """Weights with every field that the layout can hold at once."""
    fields = {
        "W_enc": normal(F, H, seed=layer + 1).to(dtype),
        "b_enc": normal(F, seed=layer + 2),
        "W_dec": normal(H, F, seed=layer + 3).to(dtype),
        "b_dec": normal(H, seed=layer + 4).to(dtype),
        "threshold": normal(F, seed=layer + 5).abs(),
        "k": 7,
        "W_skip": normal(H, H, seed=layer + 6).to(dtype),
        "hook_in": "blocks.3.ln2.hook_normalized",
        "hook_out": "model.layers.3:output, of one layer",
    }
    return TranscoderWeights(**(fields | more), layer=layer)


def same_fields(got, want):
    return all(same_bits(getattr(got, name), getattr(want, name)) for name in FIELDS)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("as_pairs", [False, True])
def test_saved_fields_come_back(tmp_path, dtype, as_pairs):
    saved = {layer: full(layer, dtype) for layer in (0, 3, 11)}
    folder = tmp_path / "missing" / "set"
    save_transcoders(iter(saved.items()) if as_pairs else saved, folder)
    names = [*(f"layer_{layer}.safetensors" for layer in saved), "config.yaml"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    assert [path.name for path in folder.parent.iterdir()] == ["set"]
    loaded = load(folder)
    assert list(loaded) == list(saved)
    assert all(same_fields(loaded[layer], saved[layer]) for layer in saved)


def test_saved_fields_may_be_absent(tmp_path):
    save_transcoders({2: TranscoderWeights(normal(F, H), normal(F))}, str(tmp_path))
    weights = load(tmp_path)[2]
    assert same_fields(weights, TranscoderWeights(normal(F, H), normal(F)))
    assert (tmp_path / "config.yaml").read_text() == "model_kind: transcoder_set\n"


@pytest.mark.parametrize("width", [1, 5, 2 * H])
def test_a_decoder_of_another_width_comes_back(tmp_path, width):
    """Also where it is a multiple of the hidden size: it is one layer's."""
    wide = {"W_dec": normal(width, F), "b_dec": normal(width), "W_skip": normal(width, H)}
    save_transcoders({0: full(**wide)}, tmp_path)
    weights = load(tmp_path)[0]
    assert same_fields(weights, full(**wide)) and weights.write_layers == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_saved_dtype(tmp_path, dtype):
    save_transcoders({0: full()}, tmp_path, dtype)
    weights = load(tmp_path)[0]
    for name in ("W_enc", "W_dec", "W_skip"):
        assert same_bits(getattr(weights, name), getattr(full(), name).to(dtype)), name
    for name in ("b_enc", "b_dec", "threshold"):
        assert same_bits(getattr(weights, name), getattr(full(), name)), name


def test_saved_tensors_of_any_strides(tmp_path):
    """Views, gradients, and more rows than are written at a time."""
    W_enc = torch.nn.Parameter(normal(H, 9000, seed=1)).T
    weights = TranscoderWeights(W_enc, normal(18000)[::2], W_enc.T[:, ::1])
    save_transcoders({0: weights}, tmp_path)
    loaded = load(tmp_path)[0]
    assert torch.equal(loaded.W_enc, W_enc) and torch.equal(loaded.W_dec, W_enc.T)
    assert torch.equal(loaded.b_enc, normal(18000)[::2])


@pytest.mark.gpu
def test_saved_from_the_device(tmp_path):
    save_transcoders({0: TranscoderWeights(normal(F, H).cuda(), normal(F).cuda())}, tmp_path)
    assert torch.equal(load(tmp_path)[0].W_enc, normal(F, H))


def test_the_official_reader_reads_what_is_saved(tmp_path):
    save_transcoders({0: full()}, tmp_path)
    tensors = load_file(tmp_path / "layer_0.safetensors")
    assert torch.equal(tensors["W_dec"], full().W_dec.T) and tensors["k"].tolist() == [7]


def test_layers_of_different_hooks(tmp_path):
    saved = {layer: full(layer, hook_in=f"layers.{layer}") for layer in (0, 1)}
    with pytest.warns(UserWarning, match="different hooks") as caught:
        save_transcoders(saved, tmp_path)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert load(tmp_path)[1].hook_in == load(tmp_path)[1].hook_out == ""


def test_a_folder_that_holds_anything_is_not_written_to(tmp_path):
    (tmp_path / "layer_5.safetensors").write_bytes(b"another set")
    for target in (tmp_path, tmp_path / "layer_5.safetensors"):
        with pytest.raises(ValueError, match="must be an empty folder or not be there yet"):
            save_transcoders({0: full()}, target)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"another set"]


def failing():
    yield 0, full()
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "transcoders, error, words",
    [
        ({}, ValueError, "at least one layer, got none"),
        (3, TypeError, "transcoders must map layers to TranscoderWeights, got int"),
        ({0: full().W_enc}, TypeError, "layer 0: transcoders must hold TranscoderWeights"),
        ({-1: full()}, ValueError, "layer must be at least 0, got -1"),
        ({"0": full()}, TypeError, "layer must be an integer, got str"),
        ([(4, full()), (4, full())], ValueError, "layer 4: must be there once, got it twice"),
        ({0: full(), 1: full(b_enc=normal(F + 1))}, ValueError, r"layer 1: b_enc must be \[30\]"),
        ({0: full(b_dec=normal(H) / 0)}, ValueError, "layer 0: b_dec"),
        ({0: full(W_dec=normal(H, F) * 1e30 * 1e30)}, ValueError, "layer 0: W_dec is not finite"),
        ({0: full(input_bias=normal(H))}, ValueError, "layer 0: .* input bias; .* convert"),
        ({0: full(ln_weight=normal(H), ln_bias=normal(H))}, ValueError, "layer 0: .* LayerNorm"),
        (
            {0: full(W_dec=normal(2 * H, F), write_layers=2)},
            ValueError,
            "layer 0: .* writes to many layers",
        ),
        ({0: full(hook_in='say "mlp"')}, ValueError, "feature_input_hook must be printable text"),
        ({0: full(hook_out="mlp\n")}, ValueError, "feature_output_hook must be printable text"),
        (failing(), KeyboardInterrupt, None),
    ],
)
def test_what_cannot_be_saved_leaves_nothing_behind(tmp_path, transcoders, error, words):
    with pytest.raises(error, match=words) as caught:
        save_transcoders(transcoders, tmp_path / "set")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "float32"])
def test_dtypes_that_cannot_be_saved(tmp_path, dtype):
    with pytest.raises(TypeError, match="dtype must be float32, bfloat16 or float16, got"):
        save_transcoders({0: full()}, tmp_path, dtype)
    with pytest.raises(TypeError, match="dir must be a str or Path, got NoneType"):
        save_transcoders({0: full()}, None)


def test_values_too_large_for_the_dtype(tmp_path):
    with pytest.raises(ValueError, match="layer 0: W_enc is not finite as float16"):
        save_transcoders({0: full(W_enc=1e6 * normal(F, H))}, tmp_path, torch.float16)


def test_every_field_comes_back_or_is_refused(tmp_path):
    """A field that is new in TranscoderWeights needs a value here, and a place in the layout."""
    refused = {
        "ln_weight": normal(H),
        "ln_bias": normal(H),
        "input_bias": normal(H),
        "write_layers": 2,
    }
    elsewhere = {"layer", "source"}  # the file's name and the folder's
    fields = {field.name for field in dataclasses.fields(TranscoderWeights)}
    kept = {name for name in fields if getattr(full(), name) is not None} - {"write_layers"}
    assert kept | set(refused) | elsewhere == fields
    for name, value in refused.items():
        with pytest.raises(ValueError):
            save_transcoders({0: full(**{name: value})}, tmp_path / name)
        assert not (tmp_path / name).exists()
    save_transcoders({0: full()}, tmp_path / "kept")
    got = load(tmp_path / "kept")[0]
    assert all(same_bits(getattr(got, name), getattr(full(), name)) for name in kept - elsewhere)
