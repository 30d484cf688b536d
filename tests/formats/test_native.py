"""The native layout: what is read, what is saved, and files that lie."""

import json
import math
import os
import struct
import subprocess
import sys

import pytest
import torch
from checkpoints import (
    CIRCUIT_TRACER,
    HIDDEN,
    Written,
    close,
    dense,
    ints,
    jumprelu,
    load,
    parts,
    put,
    randomise,
    relu,
    topk,
)
from every_layout import FIELDS, EveryLayout
from oracle import FLOATS, check, make_layer, normal, same_bits
from safetensors.torch import load_file, save_file
from sparse_transcoder import (
    SparseTranscoderEncoder,
    TranscoderWeights,
    load_transcoders,
    save_transcoders,
)

F, H = 30, 8
HOOKS = "feature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out\n"
CONFIG = "model_name: none/none\nmodel_kind: transcoder_set\n" + HOOKS


def tensors(seed=0, features=F, hidden_size=H, dtype=torch.float32, **more):
    """A native layer as its file holds it: W_dec is [F, H]."""
    layer = make_layer(features, hidden_size, seed)
    layer |= {
        "W_dec": normal(features, hidden_size, seed=seed + 5),
        "b_dec": normal(hidden_size, seed=seed + 6),
    }
    return {name: value.to(dtype) for name, value in layer.items()} | more


def write(folder, layers, config=CONFIG):
    folder.mkdir(parents=True, exist_ok=True)
    for i, layer in layers.items():
        save_file(layer, folder / f"layer_{i}.safetensors")
    (folder / "config.yaml").write_text(config)
    return folder


def equal(a, b):
    return a.dtype == b.dtype and torch.equal(a, b)


def encodes_like(weights, layer, hidden=None):
    hidden = normal(20, layer["W_enc"].shape[1]) if hidden is None else hidden
    check(
        SparseTranscoderEncoder({7: weights}, 10, 0.3).encode_layer(7, hidden),
        hidden,
        layer,
        10,
        0.3,
    )


def native_case(**more):
    """A layer with more tensors than a relu coder has."""

    def write(root, i, F, H):
        p = parts(F, H, i)
        extra = {name: value(F, H, i) for name, value in more.items()}
        names = {"threshold": "activation_function.threshold"}
        tensors = {"W_enc": p["W_enc"].T, "b_enc": p["b_enc"], "W_dec": p["W_dec"]}
        tensors |= {"b_dec": p["b_dec"]} | {names.get(name, name): v for name, v in extra.items()}
        put(root, f"layer_{i}.safetensors", tensors)
        (root / "config.yaml").write_text(CONFIG)

        def encode(x):
            pre = x @ p["W_enc"] + p["b_enc"]
            if "threshold" in extra:
                return jumprelu(pre, extra["threshold"])
            return topk(pre, int(extra["k"])) if "k" in extra else relu(pre)

        hooks = ("mlp.hook_in", "mlp.hook_out")
        W_skip = extra.get("W_skip")
        return Written(encode, p["W_enc"].T, p["W_dec"].T, p["b_dec"], W_skip, hooks)

    write.__name__ = "_".join(["native", *more])
    return write


class TestNative(EveryLayout):
    WRITERS = (
        native_case(),
        native_case(threshold=lambda F, H, i: ints(F, seed=i + 7)),
        native_case(k=lambda F, H, i: torch.tensor([4])),
        native_case(W_skip=lambda F, H, i: ints(H, H, seed=i + 9)),
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("features, hidden_size", [(F, H), (12, 12), (5, 64), (1, 1)])
def test_native(tmp_path, dtype, features, hidden_size):
    saved = {i: tensors(i, features, hidden_size, dtype) for i in (0, 2, 11)}
    loaded = load(write(tmp_path, saved))
    assert list(loaded) == [0, 2, 11]
    for i, weights in loaded.items():
        assert weights.layer == i
        assert equal(weights.W_enc, saved[i]["W_enc"]) and equal(weights.b_enc, saved[i]["b_enc"])
        assert equal(weights.W_dec, saved[i]["W_dec"].T) and equal(weights.b_dec, saved[i]["b_dec"])
        assert weights.threshold is None and weights.k is None and weights.W_skip is None
        assert weights.input_bias is None and weights.ln_weight is None
        assert (weights.hook_in, weights.hook_out) == ("mlp.hook_in", "mlp.hook_out")
        encodes_like(weights, {name: saved[i][name] for name in ("W_enc", "b_enc")})


@pytest.mark.parametrize("as_text", [True, False])
def test_path_may_be_text(tmp_path, as_text):
    write(tmp_path, {0: tensors()})
    assert list(load_transcoders(str(tmp_path) if as_text else tmp_path)) == [0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_threshold_makes_jumprelu(tmp_path, dtype):
    threshold = normal(F, seed=4).abs().to(dtype)
    saved = tensors(dtype=dtype, **{"activation_function.threshold": threshold})
    weights = load(write(tmp_path, {0: saved}))[0]
    assert equal(weights.threshold, threshold) and weights.k is None
    encodes_like(
        weights, {"W_enc": saved["W_enc"], "b_enc": saved["b_enc"], "threshold": threshold}
    )


def test_skip(tmp_path):
    skip = normal(H, H, seed=4)
    weights = load(write(tmp_path, {0: tensors(W_skip=skip)}))[0]
    assert equal(weights.W_skip, skip)


@pytest.mark.parametrize(
    "config, stored",
    [
        ("activation: topk\nk: 4\n", {}),
        ("", {"k": torch.tensor(4)}),
        ("", {"k": torch.tensor([4])}),
        ("activation: topk\n", {"k": torch.tensor(4, dtype=torch.int32)}),
    ],
    ids=["config", "key", "key [1]", "both"],
)
def test_top_k_coder(tmp_path, config, stored):
    saved = tensors(**stored)
    weights = load(write(tmp_path, {0: saved}, CONFIG + config))[0]
    assert type(weights.k) is int and weights.k == 4 and weights.threshold is None
    encodes_like(weights, {"W_enc": saved["W_enc"], "b_enc": saved["b_enc"], "k": 4})
    hidden = normal(3, H)
    assert SparseTranscoderEncoder({0: weights}, None, 0.0).encode_layer(0, hidden)[
        "indices"
    ].shape == (3, 4)


def test_hook_names_are_kept(tmp_path):
    config = CONFIG.replace("mlp.hook_in", "hook_resid_mid").replace(
        "mlp.hook_out", "'ln2.hook_normalized'  # quoted"
    )
    weights = load(write(tmp_path, {0: tensors()}, config))[0]
    assert (weights.hook_in, weights.hook_out) == ("hook_resid_mid", "ln2.hook_normalized")


@pytest.mark.parametrize("layers", [[2], [11, 2], (0,), [0, 2, 11], {11}, range(0, 3, 2)])
def test_some_layers_are_read_and_no_other(tmp_path, layers):
    saved = {i: tensors(i) for i in (0, 2, 11)}
    write(tmp_path, saved)
    for i in set(saved) - set(layers):
        (tmp_path / f"layer_{i}.safetensors").write_bytes(b"no safetensors")
    loaded = load(tmp_path, layers)
    assert set(loaded) == set(layers)
    assert all(equal(weights.W_enc, saved[i]["W_enc"]) for i, weights in loaded.items())


def hollow(path, **shapes):
    """A native layer of bfloat16 zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def resident(folder):
    """{file: bytes in memory} of the files in a folder that this process has mapped."""
    found, name = {}, None
    for line in open("/proc/self/smaps"):
        words = line.split()
        if "-" in words[0]:  # a mapping begins
            name = os.path.basename(words[-1]) if words[-1].startswith(f"{folder}/") else None
        elif name and words[0] == "Rss:":
            found[name] = found.get(name, 0) + 1024 * int(words[1])
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux")
@pytest.mark.parametrize("cross_layer", [False, True])
def test_a_large_set_opens_without_being_read(tmp_path, cross_layer):
    features, hidden_size, layers = 163_840, 1024, 6
    size = 0
    for i in range(layers):
        encoder = {"W_enc": [features, hidden_size], "b_enc": [features], "b_dec": [hidden_size]}
        decoder = {"W_dec": [features, hidden_size]}
        if cross_layer:
            decoder = {f"W_dec_{i}": [features, layers - i, hidden_size]}
            size += hollow(tmp_path / f"W_dec_{i}.safetensors", **decoder)
            encoder = {f"{name}_{i}": shape for name, shape in encoder.items()}
            size += hollow(tmp_path / f"W_enc_{i}.safetensors", **encoder)
        else:
            size += hollow(tmp_path / f"layer_{i}.safetensors", **encoder, **decoder)
    wanted = [1, 2, 4]
    weights = load(tmp_path, wanted)
    assert [w.W_enc.shape[0] for w in weights.values()] == [features] * 3
    mapped = resident(tmp_path)
    names = (
        ("W_enc_{}.safetensors", "W_dec_{}.safetensors")
        if cross_layer
        else ("layer_{}.safetensors",)
    )
    assert set(mapped) == {name.format(i) for i in wanted for name in names}
    assert sum(mapped.values()) < 400e6 < size / 8


def test_a_layer_that_is_not_there(tmp_path):
    write(tmp_path, {0: tensors(), 2: tensors()})
    with pytest.raises((FileNotFoundError, KeyError, ValueError)) as caught:
        load(tmp_path, [0, 5])
    text = str(caught.value.args[0])
    assert "5" in text and str(tmp_path) in text and "\n" not in text


def test_layers_are_numbers_not_text(tmp_path):
    """Layer 10 is not between 1 and 2, and a stray file is no layer."""
    saved = {i: tensors(i) for i in (10, 2, 1)}
    write(tmp_path, saved)
    (tmp_path / "layer_x.safetensors").write_bytes(b"")
    (tmp_path / "my_layer_3.safetensors").write_bytes(b"")
    (tmp_path / "layer_4.safetensors.part").write_bytes(b"")
    assert list(load(tmp_path)) == [1, 2, 10]


def test_transcoders_of_the_config_give_the_order(tmp_path):
    write(tmp_path, {}, CONFIG + "transcoders:\n  - b.safetensors\n  - sub/a.safetensors\n")
    (tmp_path / "sub").mkdir()
    saved = [tensors(1), tensors(2)]
    save_file(saved[0], tmp_path / "b.safetensors")
    save_file(saved[1], tmp_path / "sub" / "a.safetensors")
    loaded = load(tmp_path)
    assert list(loaded) == [0, 1] and all(equal(loaded[i].W_enc, saved[i]["W_enc"]) for i in (0, 1))
    assert list(load(tmp_path, [1])) == [1]


def test_links_are_followed(tmp_path):
    """A download cache holds links to files elsewhere, with other names."""
    write(tmp_path / "blobs", {0: tensors()})
    write(tmp_path / "set", {})
    (tmp_path / "set" / "layer_0.safetensors").symlink_to(
        tmp_path / "blobs" / "layer_0.safetensors"
    )
    assert equal(load(tmp_path / "set")[0].W_enc, tensors()["W_enc"])


def test_weights_outlive_their_file(tmp_path):
    write(tmp_path, {0: tensors()})
    weights = load(tmp_path)[0]
    (tmp_path / "layer_0.safetensors").unlink()
    encodes_like(weights, {name: tensors()[name] for name in ("W_enc", "b_enc")})


def test_unaligned_tensors(tmp_path):
    """A header whose length is odd puts every tensor at an odd address."""
    table, data = {}, b""
    for name, tensor in tensors().items():
        raw = tensor.numpy().tobytes()
        table[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    for pad in range(4):
        header = json.dumps(table).encode() + b" " * pad
        write(tmp_path, {})
        (tmp_path / "layer_0.safetensors").write_bytes(
            struct.pack("<Q", len(header)) + header + data
        )
        weights = load(tmp_path)[0]
        assert equal(weights.W_enc, tensors()["W_enc"])
        encodes_like(weights, {name: tensors()[name] for name in ("W_enc", "b_enc")})


def test_metadata_is_no_trouble(tmp_path):
    write(tmp_path, {})
    save_file(tensors(), tmp_path / "layer_0.safetensors", metadata={"format": "pt", "é": "ü"})
    assert equal(load(tmp_path)[0].W_enc, tensors()["W_enc"])


def test_a_tensor_of_unknown_meaning_is_named(tmp_path):
    """It may change what is computed: never loaded approximately."""
    write(tmp_path, {0: tensors(gate=torch.ones(F))})
    with pytest.raises(ValueError, match="gate") as caught:
        load(tmp_path)
    assert str(tmp_path / "layer_0.safetensors") in str(caught.value) and "\n" not in str(
        caught.value
    )


@pytest.mark.gpu
def test_device(tmp_path):
    write(tmp_path, {0: tensors()})
    for device in ("cuda", None, torch.device("cuda", 0)):
        weights = load_transcoders(tmp_path, device=device)[0]
        assert (
            weights.W_enc.device.type
            == weights.W_dec.device.type
            == weights.b_enc.device.type
            == "cuda"
        )
        assert equal(weights.W_enc.cpu(), tensors()["W_enc"])


@pytest.mark.parametrize("F", [64, 16])
@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer_set(tmp_path, threshold, skip, F):
    name = "circuit_tracer.transcoder.single_layer_transcoder"
    peer = pytest.importorskip(name, reason=CIRCUIT_TRACER)
    layers = {
        i: randomise(
            peer.SingleLayerTranscoder(
                16,
                F,
                peer.JumpReLU(torch.zeros(F), 0.1) if threshold else torch.relu,
                i,
                skip_connection=skip,
                device=torch.device("cpu"),
                dtype=torch.float32,
            ),
            seed=i,
        )
        for i in range(2)
    }
    model = peer.TranscoderSet(layers, "mlp.hook_in", "mlp.hook_out")
    model.to_safetensors(str(tmp_path))
    config = "model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\n"
    (tmp_path / "config.yaml").write_text(config)
    for i, weights in load(tmp_path).items():
        assert close(dense(weights, HIDDEN), model.encode_layer(HIDDEN, i))
        assert same_bits(weights.W_skip, layers[i].W_skip.detach() if skip else None)
        assert weights.hook_in == "mlp.hook_in"


# Saving


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
        ({0: full(W_dec=normal(2 * H, F))}, ValueError, "layer 0: .* writes to many layers"),
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


# Native files that lie. All are loaded in one other process: if it dies, no other test does.

GOOD = {
    "W_enc": ("F32", [F, H], 0, 960),
    "W_dec": ("F32", [F, H], 960, 1920),
    "b_enc": ("F32", [F], 1920, 2040),
    "b_dec": ("F32", [H], 2040, 2072),
}
DATA = b"".join(struct.pack("<f", i % 7) for i in range(2072 // 4))
NAN, INF = struct.pack("<f", float("nan")), struct.pack("<f", float("inf"))


def entry(dtype, shape, *offsets):
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def table(**changes):
    return {
        name: e if isinstance(e, dict) else entry(*e)
        for name, e in {**GOOD, **changes}.items()
        if e is not None
    }


def file(header=None, data=DATA, length=None):
    header = table() if header is None else header
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def packed(**changes):
    """A file without a hole of the GOOD tensors, some with another dtype or shape, or absent."""
    tensors = {name: good[:2] for name, good in GOOD.items()} | changes
    header, end = {}, 0
    for name, tensor in tensors.items():
        if tensor is not None:
            dtype, shape = tensor
            begin, end = end, end + math.prod(shape) * (8 if dtype == "F64" else 4)
            header[name] = entry(dtype, shape, begin, end)
    return file(header, DATA[:end])


def with_bytes(at, raw):
    return DATA[:at] + raw + DATA[at + len(raw) :]


LIES = {
    "no file content": b"",
    "seven bytes": b"1234567",
    "header length only": struct.pack("<Q", 100),
    "header length 0": file(b""),
    "header length -1": file(length=2**64 - 1),
    "header length 2^63": file(length=2**63),
    "header length wraps past the end": file(length=2**64 - 8),
    "header longer than the file": file(length=10_000),
    "header ends inside the table": file(length=50),
    "header cut": file()[:40],
    "data cut by one byte": file(data=DATA[:-1]),
    "data cut in the middle": file(data=DATA[:1000]),
    "data absent": file(data=b""),
    "a text file": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n",
    "an archive": b"PK\x03\x04" + bytes(200),
    "header not JSON": file(b"{W_enc: 1}"),
    "header not UTF-8": file(b'{"\xff\xfe": 1}'),
    "header a list": file(b"[]"),
    "header a number": file(b"7"),
    "header null": file(b"null"),
    "header empty": file(b"{}"),
    "header nested without end": file(b'{"a":' * 100_000),
    "header nested deep": file(b"[" * 100_000 + b"]" * 100_000),
    "entry a number": file({**table(), "W_enc": 3}),
    "entry null": file({**table(), "W_enc": None}),
    "entry a list": file({**table(), "b_enc": [1, 2]}),
    "entry empty": file({**table(), "b_enc": {}}),
    "no dtype": file(table(b_enc={"shape": [F], "data_offsets": [1920, 2040]})),
    "no shape": file(table(b_enc={"dtype": "F32", "data_offsets": [1920, 2040]})),
    "no offsets": file(table(b_enc={"dtype": "F32", "shape": [F]})),
    "dtype unknown": file(table(b_enc=("F33", [F], 1920, 2040))),
    "dtype in lower case": file(table(b_enc=("f32", [F], 1920, 2040))),
    "dtype empty": file(table(b_enc=("", [F], 1920, 2040))),
    "dtype a number": file(table(b_enc=(32, [F], 1920, 2040))),
    "dtype integer": file(table(b_enc=("I32", [F], 1920, 2040))),
    "dtype float64": packed(W_enc=("F64", [F // 2, H]), W_dec=None, b_enc=("F32", [F // 2])),
    "dtype of another size": file(table(b_enc=("BF16", [F], 1920, 2040))),
    "shape a number": file(table(b_enc=("F32", F, 1920, 2040))),
    "shape text": file(table(b_enc=("F32", ["30"], 1920, 2040))),
    "shape negative": file(table(W_enc=("F32", [-F, -H], 0, 960))),
    "shape a fraction": file(table(b_enc=("F32", [30.0], 1920, 2040))),
    "shape beyond int64": file(table(b_enc=("F32", [2**64 + F], 1920, 2040))),
    "shape overflows to its bytes": file(table(W_enc=("F32", [2**62 + 240, 1], 0, 960))),
    "shape overflows to nothing": file(table(W_enc=("F32", [2**32, 2**32], 0, 0))),
    "shape larger than its bytes": file(
        table(W_enc=("F32", [F + 1, H], 0, 960), b_enc=("F32", [F + 1], 1920, 2040))
    ),
    "shape smaller than its bytes": file(table(W_enc=("F32", [F, H - 1], 0, 960))),
    "shape zero": packed(W_enc=("F32", [0, H]), b_enc=("F32", [0]), W_dec=("F32", [0, H])),
    "offsets out of the file": file(table(b_dec=("F32", [H], 2044, 2076))),
    "offsets far out of the file": file(table(b_enc=("F32", [F], 2**40, 2**40 + 120))),
    "offsets that wrap": file(table(b_enc=("F32", [F], 2**64 - 120, 2**64))),
    "offsets that wrap int64": file(table(b_enc=("F32", [F], 2**63 - 60, 2**63 + 60))),
    "offsets negative": file(table(b_enc=("F32", [F], -120, 0))),
    "offsets reversed": file(table(b_enc=("F32", [F], 2040, 1920))),
    "offsets fractions": file(table(b_enc=("F32", [F], 1920.0, 2040.0))),
    "offsets text": file(table(b_enc=("F32", [F], "1920", "2040"))),
    "one offset": file(table(b_enc=("F32", [F], 1920))),
    "three offsets": file(table(b_enc=("F32", [F], 1920, 2040, 2072))),
    "a hole": file(table(W_dec=None)),
    "a hole before the first tensor": file(table(W_enc=None)),
    "bytes after the last tensor": file(data=DATA + b"more"),
    "overlap": file(table(b_enc=("F32", [F], 1800, 1920))),
    "two names for the same bytes": file(table(W_dec=("F32", [F, H], 0, 960))),
    "W_enc missing": packed(W_enc=None),
    "b_enc missing": packed(b_enc=None),
    "b_enc of another length": packed(b_enc=("F32", [F - 1])),
    "b_enc with two axes": file(table(b_enc=("F32", [F, 1], 1920, 2040))),
    "b_enc a scalar": packed(b_enc=("F32", [])),
    "W_enc with one axis": file(table(W_enc=("F32", [F * H], 0, 960))),
    "encoder transposed": file(table(W_enc=("F32", [H, F], 0, 960))),
    "W_dec [H, F]": file(table(W_dec=("F32", [H, F], 960, 1920))),
    "W_dec of another size": packed(W_dec=("F32", [F - 1, H])),
    "b_dec of another length": packed(b_dec=("F32", [H - 1])),
    "threshold of another length": file(
        table(**{"activation_function.threshold": ("F32", [H], 2072, 2104)}), DATA + bytes(32)
    ),
    "W_skip of another shape": file(table(W_skip=("F32", [2, 4], 2072, 2104)), DATA + bytes(32)),
    "k zero": file(table(k=("I64", [], 2072, 2080)), DATA + bytes(8)),
    "k negative": file(table(k=("I64", [], 2072, 2080)), DATA + struct.pack("<q", -4)),
    "k of two": file(table(k=("I64", [2], 2072, 2088)), DATA + struct.pack("<qq", 4, 4)),
    "NaN in W_enc": file(data=with_bytes(956, NAN)),
    "Inf in W_enc": file(data=with_bytes(400, INF)),
    "NaN in b_enc": file(data=with_bytes(1920, NAN)),
    "NaN in threshold": file(
        table(**{"activation_function.threshold": ("F32", [F], 2072, 2192)}), DATA + NAN * F
    ),
}

CONFIGS = {
    "no key": "transcoders\n",
    "a list": "- 1\n- 2\n",
    "quote without end": CONFIG + "activation: 'topk\n",
    "top-k without k": CONFIG + "activation: topk\n",
    "k zero": CONFIG + "activation: topk\nk: 0\n",
    "k a word": CONFIG + "activation: topk\nk: many\n",
    "k a fraction": CONFIG + "activation: topk\nk: 2.5\n",
    "k beyond int64": CONFIG + "activation: topk\nk: 99999999999999999999\n",
    "activation unknown": CONFIG + "activation: groupmax\n",
    "activation in a tag": CONFIG + "activation: !!python/object/apply:os.system ['touch ran']\n",
    "kind unknown": CONFIG.replace("transcoder_set", "gated_set"),
    "jumprelu without thresholds": CONFIG + "activation: jumprelu\n",
    "transcoders a word": CONFIG + "transcoders: layer_0.safetensors\n",
    "transcoders an alias": "all: &all [layer_0.safetensors]\n" + CONFIG + "transcoders: *all\n",
    "transcoders not there": CONFIG + "transcoders:\n- absent.safetensors\n",
    "transcoders a folder": CONFIG + "transcoders:\n- sub\n",
    "transcoders out of the folder": CONFIG + "transcoders:\n- ../good/layer_0.safetensors\n",
    "transcoders out by a detour": CONFIG + "transcoders:\n- sub/../../good/layer_0.safetensors\n",
    "transcoders absolute": CONFIG + "transcoders:\n- ROOT/good/layer_0.safetensors\n",
    "transcoders on one line, out of the folder": CONFIG
    + "transcoders: [../good/layer_0.safetensors]\n",
    "transcoders on another machine": CONFIG
    + "transcoders:\n- https://example.org/layer_0.safetensors\n",
}

# What YAML calls broken, in places that mean nothing to us. It is refused or passed over.
CURIOUS = {
    "not YAML": CONFIG + "a: [1, 2\nb: }\n",
    "tabs": CONFIG + "a:\n\t- b\n",
    "not UTF-8": CONFIG.replace("none/none", "\udcff\udcfe"),
    "NUL": CONFIG.replace("none/none", "a\0b"),
    "one endless line": CONFIG + "a: " + "x" * 1_000_000,
    "python tag": CONFIG.replace("none/none", "!!python/object/apply:os.system ['touch ran']"),
    "nested deep": CONFIG + "a: " + "[" * 50_000 + "]" * 50_000,
}

LOADER = """
import json, os, sys
from sparse_transcoder import load_transcoders
for folder in sys.stdin.read().splitlines():
    try:
        load_transcoders(folder, device="cpu")
        outcome = ["loaded", ""]
    except Exception as error:
        outcome = [type(error).__name__, str(error.args[0]) if error.args else ""]
    print(json.dumps([os.path.basename(folder), *outcome]), flush=True)
"""


def load_elsewhere(root, folders):
    """{folder: (error, text)} from a process of its own; what follows a crash is absent."""
    done = subprocess.run(
        [sys.executable, "-c", LOADER],
        input="\n".join(map(str, folders)),
        capture_output=True,
        text=True,
        cwd=root,
        timeout=600,
    )
    outcomes = [json.loads(line) for line in done.stdout.splitlines()]
    return {name: (error, text) for name, error, text in outcomes}, (
        done.returncode,
        done.stderr[-500:],
    )


@pytest.fixture(scope="module")
def lies(tmp_path_factory):
    root = tmp_path_factory.mktemp("lies")
    write(root / "good", {0: tensors()})
    for number, raw in enumerate(LIES.values()):
        write(root / f"file{number}", {})
        (root / f"file{number}" / "layer_0.safetensors").write_bytes(raw)
    for number, text in enumerate([*CONFIGS.values(), *CURIOUS.values()]):
        write(root / f"config{number}", {0: tensors()})
        (root / f"config{number}" / "sub").mkdir()
        raw = text.replace("ROOT", str(root)).encode(errors="surrogateescape")
        (root / f"config{number}" / "config.yaml").write_bytes(raw)
    configs = len(CONFIGS) + len(CURIOUS)
    folders = [
        "good",
        *(f"file{n}" for n in range(len(LIES))),
        *(f"config{n}" for n in range(configs)),
    ]
    return root, *load_elsewhere(root, [root / folder for folder in folders])


def test_no_lie_crashes_the_process(lies):
    root, outcomes, (returncode, stderr) = lies
    assert (returncode, stderr) == (0, "")
    assert len(outcomes) == 1 + len(LIES) + len(CONFIGS) + len(CURIOUS)
    assert outcomes["good"] == ("loaded", "")
    assert not list(root.rglob("ran"))


def refused(outcomes, folder, path, errors=("ValueError",)):
    error, text = outcomes.get(folder, ("crashed", ""))
    assert error in errors, (error, text)
    assert str(path) in text and "\n" not in text, text
    assert len(text.replace(str(path), "").strip(" :.")) > 10, f"no reason given: {text}"
    assert len(text) < 600, text
    return text


@pytest.mark.parametrize("name", LIES)
def test_files_that_lie(lies, name):
    root, outcomes, _ = lies
    folder = f"file{list(LIES).index(name)}"
    text = refused(
        outcomes, folder, root / folder / "layer_0.safetensors", ("ValueError", "TypeError")
    )
    for tensor in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        assert tensor not in name or tensor in text, text


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_lie(lies, name):
    root, outcomes, _ = lies
    folder = f"config{list(CONFIGS).index(name)}"
    errors = (
        ("ValueError", "FileNotFoundError") if name == "transcoders not there" else ("ValueError",)
    )
    text = refused(outcomes, folder, root / folder, errors)
    assert "unknown" not in name or "groupmax" in text or "gated_set" in text, text


@pytest.mark.parametrize("name", CURIOUS)
def test_curious_configs(lies, name):
    root, outcomes, _ = lies
    folder = f"config{len(CONFIGS) + list(CURIOUS).index(name)}"
    assert outcomes.get(folder) == ("loaded", "") or refused(
        outcomes, folder, root / folder / "config.yaml"
    )


@pytest.mark.parametrize(
    "config",
    [
        "activation: topk\r\nk: 4\r\n",
        "activation : topk\nk : 4\n",
        '\'activation\': "topk"\n"k": 4\n',
        "activation: topk# no comment\nk: 4\n",
        "activation: topk  # a comment\nk: 4 # another\n",
        "activation:\n  topk\nk:\n  4\n",
        "activation: >\n  topk\nk: 4\n",
        "activation: !!str topk\nk: !!int 4\n",
        "activation: &a topk\nk: 4\n",
        "---\nactivation: topk\nk: 4\n...\n",
        "--- {activation: topk, k: 4}\n",
        "  activation: topk\n  k: 4\n",
        "{activation: topk, k: 4}\n",
        '{"activation": "topk", "k": 4}\n',
        '{\n  "activation": "topk",\n  "k": 4\n}\n',
        "? activation\n: topk\n? k\n: 4\n",
        "\ufeffactivation: topk\nk: 4\n",
    ],
)
def test_a_declaration_is_honoured_or_refused_in_any_form(tmp_path, config):
    """A top-k coder whose config is not understood must not become a relu coder."""
    write(tmp_path, {0: tensors()})
    (tmp_path / "config.yaml").write_bytes(config.encode())
    try:
        assert load(tmp_path)[0].k == 4
    except ValueError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    "entries",
    [
        "\n- b.safetensors\n- a.safetensors\n",
        "\n  - 'b.safetensors'  # first\n\n  # and\n  - \"a.safetensors\"\n",
        " [b.safetensors, a.safetensors]\n",
        " [b.safetensors,\n  a.safetensors]\n",
        "\n  [b.safetensors, a.safetensors]\n",
        " !!seq\n- b.safetensors\n- a.safetensors\n",
        "\n  0: b.safetensors\n  1: a.safetensors\n",
    ],
)
def test_the_order_is_honoured_or_refused_in_any_form(tmp_path, entries):
    write(
        tmp_path, {0: tensors(3), 1: tensors(4)}, CONFIG + "transcoders:" + entries
    )  # what a reader that gives up finds
    save_file(tensors(1), tmp_path / "b.safetensors")
    save_file(tensors(2), tmp_path / "a.safetensors")
    try:
        loaded = load(tmp_path)
    except ValueError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)
    else:
        assert [equal(loaded[i].W_enc, tensors(i + 1)["W_enc"]) for i in loaded] == [True, True]


MARKS = b'0123456789-.eE[]{}:,"\\ \x00\xff'


def test_damaged_files_are_refused_or_loaded_but_never_crash(tmp_path):
    """Three hundred files with a few bytes changed in the table, or cut short."""
    random = torch.Generator().manual_seed(0)

    def pick(stop):
        return int(torch.randint(stop, (1,), generator=random))

    whole = file()
    folders = []
    for number in range(300):
        raw = bytearray(whole)
        for _ in range(1 + pick(3)):
            raw[pick(len(whole) - len(DATA))] = MARKS[pick(len(MARKS))]
        if number % 5 == 0:
            raw = raw[: pick(len(raw))]
        folders.append(write(tmp_path / f"damaged{number}", {}))
        (folders[-1] / "layer_0.safetensors").write_bytes(raw)
    outcomes, end = load_elsewhere(tmp_path, folders)
    assert end == (0, "")
    assert len(outcomes) == 300
    for number in range(300):
        if outcomes[f"damaged{number}"][0] != "loaded":
            path = folders[number] / "layer_0.safetensors"
            refused(outcomes, f"damaged{number}", path, ("ValueError", "TypeError"))


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.isdir("/proc"), reason="needs a POSIX system")
def test_a_folder_where_a_file_should_be(tmp_path):
    write(tmp_path, {})
    (tmp_path / "layer_0.safetensors").mkdir()
    with pytest.raises((ValueError, FileNotFoundError, OSError)) as caught:
        load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
