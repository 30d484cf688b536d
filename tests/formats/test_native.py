"""The native layout: layer_{i}.safetensors and config.yaml."""

import json
import math
import os
import struct

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
from every_layout import EveryLayout
from oracle import FLOATS, check, make_layer, normal, same_bits
from safetensors.torch import save_file
from sparse_transcoder import (
    SparseTranscoderEncoder,
    load_transcoders,
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
