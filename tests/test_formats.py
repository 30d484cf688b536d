"""Every checkpoint layout, written by hand as its project writes it, and by the projects' own code where they are installed."""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from oracle import integers, normal, same_bits
from safetensors.torch import load_file, save_file
from sparse_transcoder import SparseTranscoderEncoder, load_transcoders
from sparse_transcoder.__main__ import main

np = pytest.importorskip("numpy", reason="numpy is not installed")

SIZES = [(30, 8), (12, 12)]  # F == H must not be guessed from shapes


def load(folder, layers=None):
    return load_transcoders(folder, layers, device="cpu")


def dense(weights, hidden):
    """[N, F]: what the engine keeps, by scattering a result of all features."""
    features = weights.W_enc.shape[0]
    result = SparseTranscoderEncoder({weights.layer: weights}, features, 0.0).encode_layer(weights.layer, hidden)
    return torch.zeros(hidden.shape[0], features).scatter(1, result["indices"], result["activations"])


def relu(pre):
    return pre.clamp(min=0)


def jumprelu(pre, threshold):
    return torch.where(pre > threshold, pre, 0.0).clamp(min=0)


def topk(pre, k):
    order = pre.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(pre).scatter(1, order, pre.gather(1, order)).clamp(min=0)


def ints(*shape, seed):
    """Small whole numbers: every pre-activation is exact, many are equal to a threshold, results compare bit for bit."""
    return integers(*shape, seed=seed)


class Written:
    """A checkpoint on disk and what it means: encode is the project's formula on the stored tensors."""

    def __init__(self, encode, W_enc, W_dec, b_dec, W_skip=None, hooks=("", "")):
        self.encode, self.W_enc, self.W_dec, self.b_dec = encode, W_enc, W_dec, b_dec
        self.W_skip, self.hooks = W_skip, hooks


def put(folder, name, tensors, config_name=None, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    if name.endswith(".npz"):
        np.savez(folder / name, **{key: value.numpy() for key, value in tensors.items()})
    elif name.endswith(".pt"):
        torch.save(tensors, folder / name)
    else:
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name)
    if config_name:
        (folder / config_name).write_text(json.dumps(config))
    return folder / name


# The layouts, written by hand. Each writer: (root, layer, F, H) -> Written


def parts(F, H, seed=0, **more):
    tensors = {
        "W_enc": ints(H, F, seed=seed + 1),
        "b_enc": ints(F, seed=seed + 2),
        "W_dec": ints(F, H, seed=seed + 3),
        "b_dec": ints(H, seed=seed + 4),
    }
    return tensors | more


def clt(root, i, F, H, threshold=True, n=3):
    p = parts(F, H, i)
    theta = ints(F, seed=i + 7)
    W_dec = ints(F, n - i, H, seed=i + 8)
    tensors = {f"W_enc_{i}": p["W_enc"].T, f"b_enc_{i}": p["b_enc"], f"b_dec_{i}": p["b_dec"]}
    put(root, f"W_enc_{i}.safetensors", tensors | ({f"threshold_{i}": theta} if threshold else {}))
    put(root, f"W_dec_{i}.safetensors", {f"W_dec_{i}": W_dec})
    (root / "config.yaml").write_text(
        "model_kind: cross_layer_transcoder\nfeature_input_hook: hook_resid_mid\nfeature_output_hook: hook_mlp_out\n"
    )

    def encode(x):
        pre = x @ p["W_enc"] + p["b_enc"]
        return jumprelu(pre, theta) if threshold else relu(pre)

    stacked = W_dec.permute(1, 2, 0).reshape((n - i) * H, F)
    return Written(encode, p["W_enc"].T, stacked, p["b_dec"], hooks=("hook_resid_mid", "hook_mlp_out"))


def clt_relu(root, i, F, H):
    return clt(root, i, F, H, threshold=False)


def gemma_scope(root, i, F, H):
    p = parts(F, H, i, threshold=ints(F, seed=i + 7))
    put(root / f"layer_{i}" / "width_16k" / "average_l0_5", "params.npz", p)
    return Written(
        lambda x: jumprelu(x @ p["W_enc"] + p["b_enc"], p["threshold"]), p["W_enc"].T, p["W_dec"].T, p["b_dec"]
    )


def gemma_scope_2(root, i, F, H, affine=False, config=True):
    p = parts(F, H, i)
    theta, skip = ints(F, seed=i + 7), ints(H, H, seed=i + 9)
    tensors = {"w_enc": p["W_enc"], "w_dec": p["W_dec"], "b_enc": p["b_enc"], "b_dec": p["b_dec"], "threshold": theta}
    if affine:
        tensors["affine_skip_connection"] = skip
    hooks = ("model.layers.1.pre_feedforward_layernorm.output", "model.layers.1.post_feedforward_layernorm.output")
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


def sparsify(root, i, F, H, transcode=True, skip=False):
    p = parts(F, H, i)
    W_skip = ints(H, H, seed=i + 9)
    tensors = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"], "W_dec": p["W_dec"], "b_dec": p["b_dec"]}
    config = {
        "activation": "topk",
        "k": 4,
        "transcode": transcode,
        "skip_connection": skip,
        "d_in": H,
        "multi_topk": True,
    }
    put(root / f"layers.{i}.mlp", "sae.safetensors", tensors | ({"W_skip": W_skip} if skip else {}), "cfg.json", config)

    def encode(x):
        return topk(relu((x if transcode else x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]), 4)

    hooks = ("mlp.hook_in" if transcode else "mlp.hook_out", "mlp.hook_out")
    return Written(encode, p["W_enc"].T, p["W_dec"].T, p["b_dec"], W_skip if skip else None, hooks)


def sparsify_skip(root, i, F, H):
    return sparsify(root, i, F, H, skip=True)


def sparsify_sae(root, i, F, H):
    return sparsify(root, i, F, H, transcode=False)


def sae_lens(root, i, F, H, architecture="transcoder", centred=False, old=False):
    p = parts(F, H, i)
    threshold, skip = ints(F, seed=i + 7), ints(H, H, seed=i + 9)
    tensors = dict(p)
    if "jumprelu" in architecture:
        tensors["threshold"] = threshold
    if "skip" in architecture:
        tensors["W_skip"] = skip
    names = {"hook_name": f"blocks.{i}.hook_mlp_in", "hook_name_out": f"blocks.{i}.hook_mlp_out"}
    config = {"architecture": architecture, "apply_b_dec_to_input": centred, "normalize_activations": "none", "k": 4}
    if old:  # before version 6 the activation and the hooks were beside the other options
        config = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}, "hook_point": names["hook_name"]}
    else:
        config["metadata"] = names
    put(root / f"folder_{i}", "sae_weights.safetensors", tensors, "cfg.json", config)

    def encode(x):
        pre = (x - p["b_dec"] if centred else x) @ p["W_enc"] + p["b_enc"]
        return (
            jumprelu(pre, threshold)
            if "jumprelu" in architecture
            else topk(pre, 4)
            if "topk" in architecture
            else relu(pre)
        )

    hooks = ("hook_mlp_in", "hook_mlp_in" if old else "hook_mlp_out")
    return Written(encode, p["W_enc"].T, p["W_dec"].T, p["b_dec"], skip if "skip" in architecture else None, hooks)


def sae_lens_case(architecture, centred=False, old=False):
    def write(root, i, F, H):
        return sae_lens(root, i, F, H, architecture, centred, old)

    write.__name__ = f"sae_lens_{architecture}{'_centred' * centred}{'_old' * old}"
    return write


def dictionary_learning_case(kind):
    def write(root, i, F, H):
        p = parts(F, H, i)
        norms = torch.ones(F)
        if kind == "AutoEncoder":  # whose loader makes the decoder's directions unit vectors
            norms = torch.tensor([0.5, 1.0, 2.0])[torch.arange(F) % 3]
            p["W_dec"] = torch.zeros(F, H)
            p["W_dec"][torch.arange(F), torch.arange(F) % H] = norms
        encode_of = {
            "AutoEncoder": relu,
            "AutoEncoderNew": relu,
            "AutoEncoderTopK": lambda pre: topk(relu(pre), 4),
            "BatchTopKSAE": lambda pre: jumprelu(relu(pre), 2.0),
            "MatryoshkaBatchTopKSAE": lambda pre: jumprelu(relu(pre), 2.0),
            "JumpReluAutoEncoder": lambda pre: jumprelu(pre, ints(F, seed=i + 7)),
        }[kind]
        centred = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(kind, "b_dec")
        linear = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"], "decoder.weight": p["W_dec"].T}
        tensors = p if kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder") else linear | {bias: p["b_dec"]}
        if "TopK" in kind:  # top-k must not apply its threshold, batch top-k must
            tensors = tensors | {"k": torch.tensor(4, dtype=torch.int), "threshold": torch.tensor(2.0)}
        if kind == "MatryoshkaBatchTopKSAE":
            tensors = tensors | {"group_sizes": torch.tensor([4, F - 4])}
        if kind == "JumpReluAutoEncoder":
            tensors = tensors | {"threshold": ints(F, seed=i + 7)}
        trainer = {"dict_class": kind, "layer": i, "submodule_name": "mlp_out"} | ({"k": 4} if "TopK" in kind else {})
        folder = root / f"mlp_out_layer_{i}" / "trainer_0"
        put(folder, "ae.pt", tensors, "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})

        def encode(x):
            return encode_of((x - p["b_dec"] if centred else x) @ p["W_enc"] + p["b_enc"]) * norms

        W_enc, W_dec = p["W_enc"].T * norms[:, None], p["W_dec"].T / norms
        return Written(encode, W_enc, W_dec, p["b_dec"], hooks=("mlp_out", "mlp_out"))

    write.__name__ = f"dictionary_learning_{kind}"
    return write


def llamascopium_case(activation, rescaled=False, bias=True):
    def write(root, i, F, H):
        p = parts(F, H, i)
        norms = torch.tensor([0.5, 1.0, 2.0, 0.0])[torch.arange(F) % 4]
        W_D = torch.zeros(F, H)
        W_D[torch.arange(F), torch.arange(F) % H] = norms
        tensors = {"W_E": p["W_enc"], "b_E": p["b_enc"], "W_D": W_D}
        tensors["dataset_average_activation_norm.blocks.1.ln2.hook_normalized"] = torch.tensor(torch.nan)
        if bias:
            tensors["b_D"] = p["b_dec"]
        if activation == "jumprelu":
            tensors["activation_function.log_jumprelu_threshold"] = torch.zeros(F)
        hooks = ("ln2.hook_normalized", "hook_mlp_out")
        config = {
            "sae_type": "sae",
            "act_fn": activation,
            "top_k": 4,
            "norm_activation": "inference",
            "sparsity_include_decoder_norm": rescaled,
            "use_decoder_bias": bias,
            "hook_point_in": f"blocks.{i}.{hooks[0]}",
            "hook_point_out": f"blocks.{i}.{hooks[1]}",
        }
        put(root / f"L{i}TC", "sae_weights.safetensors", tensors, "config.json", config)

        def encode(x):
            pre = x @ p["W_enc"] + p["b_enc"]
            if activation == "jumprelu":
                return torch.where(pre * (norms if rescaled else 1.0) > 1.0, pre, 0.0)
            return topk(pre, 4) if activation == "topk" else relu(pre)

        return Written(encode, p["W_enc"].T, W_D.T, p["b_dec"] if bias else None, hooks=hooks)

    write.__name__ = f"llamascopium_{activation}{'_rescaled' * rescaled}{'' if bias else '_no_bias'}"
    return write


WRITERS = [
    clt,
    clt_relu,
    gemma_scope,
    gemma_scope_2,
    gemma_scope_2_affine,
    gemma_scope_2_without_config,
    sparsify,
    sparsify_skip,
    sparsify_sae,
    sae_lens_case("transcoder"),
    sae_lens_case("skip_transcoder"),
    sae_lens_case("jumprelu_transcoder"),
    sae_lens_case("jumprelu_skip_transcoder"),
    sae_lens_case("standard"),
    sae_lens_case("standard", centred=True),
    sae_lens_case("jumprelu"),
    sae_lens_case("jumprelu", centred=True),
    sae_lens_case("topk"),
    sae_lens_case("topk", centred=True),
    sae_lens_case("topk", centred=True, old=True),
    *(
        dictionary_learning_case(kind)
        for kind in (
            "AutoEncoder",
            "AutoEncoderNew",
            "AutoEncoderTopK",
            "BatchTopKSAE",
            "MatryoshkaBatchTopKSAE",
            "JumpReluAutoEncoder",
        )
    ),
    llamascopium_case("relu"),
    llamascopium_case("relu", rescaled=True, bias=False),
    llamascopium_case("jumprelu"),
    llamascopium_case("jumprelu", rescaled=True),
    llamascopium_case("topk"),
]
every_layout = pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)


@every_layout
@pytest.mark.parametrize("F, H", SIZES)
def test_by_hand(tmp_path, write, F, H):
    written = {i: write(tmp_path, i, F, H) for i in (0, 1)}
    hidden = ints(40, H, seed=20)
    loaded = load(tmp_path)
    assert list(loaded) == [0, 1]
    for i, weights in loaded.items():
        want = written[i]
        assert weights.layer == i and weights.source.startswith(str(tmp_path))
        assert torch.equal(weights.W_enc, want.W_enc) and weights.W_enc.is_contiguous()
        assert torch.equal(weights.W_dec, want.W_dec)
        assert want.b_dec is None or torch.equal(weights.b_dec, want.b_dec)
        assert same_bits(weights.W_skip, want.W_skip)
        assert (weights.hook_in, weights.hook_out) == want.hooks
        got, right = dense(weights, hidden), want.encode(hidden)
        assert torch.equal(got, right), f"{int((got != right).sum())} of {right.numel()} activations differ"
        assert 0.02 < (right > 0).double().mean() < 0.9  # neither nothing nor everything is active


@every_layout
def test_some_layers_are_read_and_no_other(tmp_path, write):
    written = {i: write(tmp_path, i, 30, 8) for i in (0, 1)}
    for path in tmp_path.rglob("*"):
        of_layer_0 = re.search(r"(layer_|layers\.|folder_|L|W_enc_|W_dec_)0(?!\d)", str(path.relative_to(tmp_path)))
        if of_layer_0 and path.suffix in (".npz", ".pt", ".safetensors"):
            path.write_bytes(b"no weights")
    loaded = load(tmp_path, [1])
    assert list(loaded) == [1] and torch.equal(loaded[1].W_enc, written[1].W_enc)
    with pytest.raises(ValueError, match=str(tmp_path)):
        load(tmp_path, [0])


@every_layout
def test_a_layer_that_is_not_there(tmp_path, write):
    write(tmp_path, 1, 30, 8)
    with pytest.raises(FileNotFoundError, match="layer 5") as caught:
        load(tmp_path, [5])
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@every_layout
def test_a_download_cache(tmp_path, write):
    """Files are links to blobs elsewhere with other names; the folder holds a link that goes in a circle."""
    want = write(tmp_path / "plain", 1, 30, 8)
    snapshot = tmp_path / "cache" / "snapshots" / "abc"
    (tmp_path / "cache" / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "plain").rglob("*"))):
        target = snapshot / path.relative_to(tmp_path / "plain")
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            blob = tmp_path / "cache" / "blobs" / f"{number:064x}"
            path.rename(blob)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(blob)
    (snapshot / "circle").symlink_to(snapshot)
    (snapshot / "nowhere").symlink_to(snapshot / "nowhere")
    assert torch.equal(load(snapshot)[1].W_enc, want.W_enc)


@pytest.mark.parametrize("write", [clt, gemma_scope_2, sparsify], ids=lambda write: write.__name__)
def test_matrices_stay_views_of_their_file(tmp_path, write):
    write(tmp_path, 0, 30, 8)
    weights = load(tmp_path)[0]
    assert weights.W_dec.T.is_contiguous() and not weights.W_dec.is_contiguous()


def test_a_checkpoint_alone(tmp_path):
    """The folder of one checkpoint can be given itself; its layer is told by its config or by the folders around it."""
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


def test_layers_are_numbers_not_text(tmp_path):
    for i in (10, 2, 1):
        sparsify(tmp_path, i, 30, 8)
    assert list(load(tmp_path)) == [1, 2, 10]


def test_the_config_tells_the_layer_before_the_folder(tmp_path):
    sae_lens(tmp_path, 5, 30, 8)
    (tmp_path / "folder_5").rename(tmp_path / "layer_9")
    assert list(load(tmp_path)) == [5]


def test_clt_layers_may_be_taken_alone(tmp_path):
    want = [clt(tmp_path, i, 30, 8) for i in range(3)]
    weights = load(tmp_path, [1])[1]
    assert weights.W_dec.shape == (2 * 8, 30) and weights.b_dec.shape == (8,)
    assert torch.equal(weights.W_dec[8:], load_file(tmp_path / "W_dec_1.safetensors")["W_dec_1"][:, 1].T)
    assert torch.equal(dense(weights, ints(5, 8, seed=3)), want[1].encode(ints(5, 8, seed=3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(tmp_path, dtype):
    p = parts(30, 8)
    tensors = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"], "W_dec": p["W_dec"], "b_dec": p["b_dec"]}
    tensors = {name: value.to(dtype) for name, value in tensors.items()}
    put(tmp_path / "layers.0", "sae.safetensors", tensors, "cfg.json", {"k": 4, "transcode": True})
    weights = load(tmp_path)[0]
    assert weights.W_enc.dtype == weights.b_dec.dtype == dtype
    hidden = ints(9, 8, seed=4)
    assert torch.equal(dense(weights, hidden), topk(relu(hidden @ p["W_enc"] + p["b_enc"]), 4))


# What is refused: one line with the file and the reason


def changed(path, **changes):
    """Rewrite a checkpoint's tensors; None takes one away."""
    tensors = (
        torch.load(path)
        if path.suffix == ".pt"
        else load_file(path)
        if path.suffix == ".safetensors"
        else dict(np.load(path))
    )
    tensors |= changes
    tensors = {name: torch.as_tensor(value) for name, value in tensors.items() if value is not None}
    path.unlink()
    put(path.parent, path.name, tensors)


def configured(path, **changes):
    values = json.loads(path.read_text())
    values.update(changes)
    path.write_text(json.dumps(values))


def refused(folder, *words):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(folder)
    text = str(caught.value)
    assert str(folder) in text and "\n" not in text and len(text) < 1000
    for word in words:
        assert word in text, text


def weights_file(folder):
    return next(
        p for p in sorted(folder.rglob("*")) if p.suffix in (".npz", ".pt", ".safetensors") and "W_dec_" not in p.name
    )


@every_layout
@pytest.mark.parametrize(
    "change", ["cut", "empty", "missing", "strange", "shape", "dimensions", "nan", "integers", "folder"]
)
def test_broken_weights(tmp_path, write, change):
    write(tmp_path, 0, 30, 8)
    path = weights_file(tmp_path)
    stored = (
        torch.load(path) if path.suffix == ".pt" else dict(np.load(path)) if path.suffix == ".npz" else load_file(path)
    )
    bias = next(name for name in stored if name in ("b_enc", "b_enc_0", "encoder.bias", "b_E"))
    matrix = next(name for name in stored if name in ("W_enc", "w_enc", "W_enc_0", "encoder.weight", "W_E"))
    words = [path.name]
    if change == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif change == "empty":
        path.write_bytes(b"")
    elif change == "folder":
        path.unlink()
        path.mkdir()
    elif change == "missing":
        changed(path, **{bias: None})
        words.append(bias)
    elif change == "strange":
        changed(path, gate=torch.ones(30))
        words.append("gate")
    elif change == "shape":
        changed(path, **{bias: torch.zeros(31)})
        words.append("b_enc")
    elif change == "dimensions":
        changed(path, **{bias: torch.zeros(30, 1)})
        words.append(bias)
    elif change == "integers":
        changed(path, **{matrix: torch.as_tensor(stored[matrix]).long()})
        words.append(matrix)
    elif change == "nan":
        broken = torch.as_tensor(stored[matrix]).clone()
        broken[3, 2] = torch.nan
        changed(path, **{matrix: broken})
        words.append("NaN")
    refused(tmp_path, *words)


@pytest.mark.parametrize(
    "write, name",
    [
        (sparsify, "cfg.json"),
        (sae_lens, "cfg.json"),
        (dictionary_learning_case("AutoEncoder"), "config.json"),
        (llamascopium_case("relu"), "config.json"),
        (gemma_scope_2, "config.json"),
    ],
    ids=["sparsify", "sae_lens", "dictionary_learning", "llamascopium", "gemma_scope_2"],
)
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "[" * 100_000, "\xff\xfe", '{"architecture": 3, "k": "4", "act_fn": []']
)
def test_broken_configs(tmp_path, write, name, text):
    write(tmp_path, 0, 30, 8)
    path = next(tmp_path.rglob(name))
    path.write_bytes(text.encode("latin-1"))
    refused(tmp_path, name)


@pytest.mark.parametrize(
    "write, name, changes, words",
    [
        (sparsify, "cfg.json", {"activation": "groupmax"}, ["groupmax"]),
        (sparsify, "cfg.json", {"signed": True}, ["signed"]),
        (sparsify, "cfg.json", {"k": 0}, ["k must be at least 1"]),
        (sparsify, "cfg.json", {"k": None}, ["k is missing"]),
        (sparsify, "cfg.json", {"k": True}, ["k must be"]),
        (sparsify, "cfg.json", {"transcode": "yes"}, ["transcode"]),
        (sparsify, "cfg.json", {"skip_connection": True}, ["W_skip"]),
        (sae_lens, "cfg.json", {"architecture": "gated"}, ["gated"]),
        (sae_lens, "cfg.json", {"architecture": "batchtopk"}, ["batchtopk"]),
        (sae_lens, "cfg.json", {"architecture": "temporal"}, ["temporal"]),
        (sae_lens, "cfg.json", {"architecture": "jumprelu_transcoder"}, ["threshold"]),
        (
            sae_lens,
            "cfg.json",
            {"architecture": "topk", "rescale_acts_by_decoder_norm": True},
            ["rescale_acts_by_decoder_norm"],
        ),
        (sae_lens, "cfg.json", {"normalize_activations": "layer_norm"}, ["layer_norm"]),
        (sae_lens, "cfg.json", {"normalize_activations": "expected_average_only_in"}, ["expected_average_only_in"]),
        (sae_lens, "cfg.json", {"apply_b_dec_to_input": True}, ["apply_b_dec_to_input"]),
        (sae_lens, "cfg.json", {"activation_fn": "tanh-relu"}, ["tanh-relu"]),
        (sae_lens, "cfg.json", {"finetuning_scaling_factor": True}, ["finetuning_scaling_factor"]),
        (sae_lens, "cfg.json", {"architecture": ["a", "\n"]}, ["architecture"]),
        (llamascopium_case("topk"), "config.json", {"sparsity_include_decoder_norm": True}, ["topk", "decoder_norm"]),
        (llamascopium_case("topk"), "config.json", {"sparsity_include_decoder_norm": None}, ["topk", "decoder_norm"]),
        (llamascopium_case("relu"), "config.json", {"act_fn": "batchtopk"}, ["batchtopk"]),
        (llamascopium_case("relu"), "config.json", {"norm_activation": "token-wise"}, ["token-wise"]),
        (llamascopium_case("relu"), "config.json", {"norm_activation": None}, ["norm_activation"]),
        (llamascopium_case("relu"), "config.json", {"sae_type": "crosscoder"}, ["crosscoder"]),
        (llamascopium_case("relu"), "config.json", {"use_glu_encoder": True}, ["use_glu_encoder"]),
        (llamascopium_case("relu"), "config.json", {"act_fn": "jumprelu"}, ["log_jumprelu_threshold"]),
        (
            dictionary_learning_case("AutoEncoder"),
            "config.json",
            {"trainer": {"dict_class": "GatedAutoEncoder"}},
            ["Gated"],
        ),
        (dictionary_learning_case("AutoEncoder"), "config.json", {"trainer": {}}, ["dict_class"]),
        (dictionary_learning_case("AutoEncoder"), "config.json", {"trainer": 3}, ["trainer"]),
        (
            dictionary_learning_case("AutoEncoderTopK"),
            "config.json",
            {"trainer": {"dict_class": "AutoEncoderTopK", "k": 5}},
            ["k must be 5"],
        ),
        (gemma_scope_2, "config.json", {"architecture": "gated"}, ["gated"]),
        (gemma_scope_2, "config.json", {"affine_connection": True}, ["affine"]),
    ],
)
def test_variants_that_are_not_supported_are_named(tmp_path, write, name, changes, words):
    write(tmp_path, 0, 30, 8)
    configured(next(tmp_path.rglob(name)), **changes)
    refused(tmp_path, *words)


def test_multi_layer_gemma_scope_2_is_named(tmp_path):
    gemma_scope_2(tmp_path, 0, 30, 8)
    changed(weights_file(tmp_path), w_dec=torch.zeros(30, 4, 8))
    refused(tmp_path, "cross")


@pytest.mark.parametrize("shape", [(30, 8), (30, 0, 8), (8, 3, 30), (31, 3, 8)])
def test_clt_decoders_that_do_not_fit(tmp_path, shape):
    clt(tmp_path, 0, 30, 8)
    put(tmp_path, "W_dec_0.safetensors", {"W_dec_0": torch.zeros(shape)})
    refused(tmp_path, "W_dec_0")
    (tmp_path / "W_dec_0.safetensors").unlink()
    refused(tmp_path, "W_dec_0.safetensors")


class Bomb:
    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def test_pickled_code_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "ran"
    dictionary_learning_case("AutoEncoder")(tmp_path, 0, 30, 8)
    path = weights_file(tmp_path)
    for content in (Bomb(marker), {"bias": Bomb(marker)}):
        torch.save(content, path)
        refused(tmp_path, "ae.pt")
        path.write_bytes(pickle.dumps(content))
        refused(tmp_path, "ae.pt")
    assert not marker.exists()


def test_object_arrays_are_refused_and_not_run(tmp_path):
    marker = tmp_path / "ran"
    gemma_scope(tmp_path, 0, 30, 8)
    path = weights_file(tmp_path)
    np.savez(path, W_enc=np.array([Bomb(marker)], dtype=object))
    refused(tmp_path, "params.npz")
    assert not marker.exists()


@pytest.mark.parametrize(
    "header", ["{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1099511627776), }", "(" * 5000]
)
def test_npz_headers_that_lie(tmp_path, header):
    gemma_scope(tmp_path, 0, 30, 8)
    text = header.encode() + b"\n"
    array = io.BytesIO()
    array.write(b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text)
    with zipfile.ZipFile(weights_file(tmp_path), "w") as archive:
        archive.writestr("W_enc.npy", array.getvalue())
    refused(tmp_path, "params.npz")


def test_npz_that_unpacks_to_much_more(tmp_path):
    gemma_scope(tmp_path, 0, 30, 8)
    with zipfile.ZipFile(weights_file(tmp_path), "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more.npy", bytes(80 << 20))
    refused(tmp_path, "params.npz", "it unpacks to 838", "expected at most 67")


def rezipped(path, change, compression=zipfile.ZIP_STORED):
    """The same archive with each record as change(name, bytes) gives it."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, record in records.items():
            archive.writestr(name, change(name, record))


def test_compressed_pickles(tmp_path):
    dictionary_learning_case("AutoEncoder")(tmp_path, 0, 30, 8)
    rezipped(weights_file(tmp_path), lambda name, record: record, zipfile.ZIP_DEFLATED)
    refused(tmp_path, "ae.pt", "is compressed")


@pytest.mark.parametrize("size", [0, 4, 100])
def test_pickles_with_less_data_than_they_say(tmp_path, size):
    dictionary_learning_case("AutoEncoder")(tmp_path, 0, 30, 8)
    rezipped(weights_file(tmp_path), lambda name, record: record[:size] if "/data/" in name else record)
    refused(tmp_path, "ae.pt")


def test_damaged_pickles_are_refused_or_loaded_but_never_crash(tmp_path):
    """In a process of its own: every byte of the small records, and cuts."""
    dictionary_learning_case("AutoEncoder")(tmp_path, 0, 3, 2)
    script = """
import random, sys, torch
from pathlib import Path
from sparse_transcoder import load_transcoders
root, path = Path(sys.argv[1]), Path(sys.argv[2])
whole, pick, loaded = path.read_bytes(), random.Random(3), 0
for number in range(1500):
    damaged = bytearray(whole)
    for _ in range(pick.randint(1, 4)):
        damaged[pick.randrange(len(whole))] = pick.choice([0, 1, 255, pick.randrange(256)])
    path.write_bytes(damaged[: pick.randrange(len(whole))] if number % 10 == 0 else damaged)
    try:
        weights = load_transcoders(root, device="cpu")
        assert all(w.W_enc.isfinite().all() and w.W_dec.isfinite().all() for w in weights.values())
        loaded += 1
    except (ValueError, FileNotFoundError) as error:
        assert str(root) in str(error) and str(error).isprintable(), repr(error)
print(loaded)
"""
    path = weights_file(tmp_path)
    done = subprocess.run([sys.executable, "-c", script, tmp_path, path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < int(done.stdout) < 1500


@pytest.mark.parametrize("k", [2**63, 10**300])
@pytest.mark.parametrize(
    "name, write", [("k", sparsify), ("k", sae_lens_case("topk")), ("top_k", llamascopium_case("topk"))]
)
def test_k_beyond_64_bits(tmp_path, name, write, k):
    write(tmp_path, 0, 30, 8)
    path = next(tmp_path.rglob("c*f*g.json"))
    configured(path, **{name: k})
    refused(tmp_path, path.name, f"{name} must be at least 1 and fit 64 bits")


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31m", "x" * 5000])
def test_names_that_would_spoil_the_message(tmp_path, name):
    sparsify(tmp_path, 0, 30, 8)
    changed(weights_file(tmp_path), **{name: torch.zeros(1)})
    with pytest.raises(ValueError, match=r'sae\.safetensors: tensor ".*" is not part of this layout') as caught:
        load(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    configured(next(tmp_path.rglob("cfg.json")), activation=name)
    with pytest.raises(ValueError, match="is not supported") as caught:
        load(tmp_path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "name, write", [("cfg.json", sparsify), ("config.json", gemma_scope_2), ("params.npz", gemma_scope)]
)
def test_pipes_and_links_in_a_circle_are_not_waited_for(tmp_path, name, write):
    write(tmp_path, 0, 30, 8)
    path = next(tmp_path.rglob(name))
    for put_there in (lambda: os.mkfifo(path), lambda: path.symlink_to(path)):
        path.unlink()
        put_there()
        if name == "config.json":  # it may be absent, but what is there must be read
            refused(tmp_path, name)
        else:
            refused(tmp_path)


@pytest.mark.parametrize("layout", ["llamascopium", "clt"])
def test_hook_names_that_would_spoil_a_terminal(tmp_path, layout):
    if layout == "clt":
        clt(tmp_path, 0, 30, 8)
        (tmp_path / "config.yaml").write_text("feature_input_hook: \x1b[31mred\n")
    else:
        llamascopium_case("relu")(tmp_path, 0, 30, 8)
        configured(next(tmp_path.rglob("config.json")), hook_point_in="\x1b[31mred")
    with pytest.raises(ValueError, match="hook_in must be printable text, got") as caught:
        load(tmp_path)
    assert str(caught.value).isprintable() and str(tmp_path) in str(caught.value)


def test_a_config_line_without_end(tmp_path):
    """Read in one pass: a search that goes back and forth would not return."""
    clt(tmp_path, 0, 30, 8)
    line = "title: x" + 500_000 * " " + "y"
    (tmp_path / "config.yaml").write_text(f"{line}\nfeature_input_hook: 'hook_resid_mid'  # here\nscan: a#b # c\n")
    assert load(tmp_path)[0].hook_in == "hook_resid_mid"


def test_a_config_that_lists_other_files_is_not_guessed_around(tmp_path):
    """The list gives the order of the layers; the names of the folders must not replace it."""
    gemma_scope(tmp_path, 3, 30, 8)
    (tmp_path / "config.yaml").write_text("transcoders:\n  - layer_3/width_16k/average_l0_5/params.npz\n")
    refused(tmp_path, "params.npz")
    (tmp_path / "config.yaml").write_text("title: not of this project\n")
    assert list(load(tmp_path)) == [3]


def test_no_checkpoint(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load(tmp_path)


# The projects' own code

HIDDEN = 2 * normal(50, 16, seed=11)


def close(got, want):
    want = want.detach().double()
    return bool(((got.double() - want).abs() <= 1e-5 * want.abs().clamp(min=1)).all())


def randomise(module, seed=0):
    with torch.no_grad():
        for number, (name, parameter) in enumerate(sorted(module.named_parameters())):
            value = normal(*parameter.shape, seed=seed + 31 * number) / (4 if parameter.ndim > 1 else 2)
            parameter.copy_(value.abs() if "threshold" in name else value)
    return module


@pytest.mark.parametrize("F", [64, 16])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(
    "architecture",
    [
        "standard",
        "jumprelu",
        "topk",
        "transcoder",
        "skip_transcoder",
        "jumprelu_transcoder",
        "jumprelu_skip_transcoder",
    ],
)
def test_sae_lens(tmp_path, architecture, centred, F):
    peer = pytest.importorskip("sae_lens", reason="sae-lens is not installed: pip install sparse_transcoder[peers]")
    if "transcoder" in architecture and centred:
        pytest.skip("transcoders have no input bias")
    metadata = {"hook_name": "blocks.3.ln2.hook_normalized", "hook_name_out": "blocks.3.hook_mlp_out"}
    options = {
        "d_in": 16,
        "d_sae": F,
        "apply_b_dec_to_input": centred,
        "metadata": metadata,
        "architecture": architecture,
    }
    options |= {"d_out": 16} if "transcoder" in architecture else {"k": 7} if architecture == "topk" else {}
    model = randomise(peer.SAE.from_dict(options))
    model.save_model(tmp_path / "any_name")
    weights = load(tmp_path)[3]
    assert close(dense(weights, HIDDEN), model.encode(HIDDEN))
    assert (weights.hook_in, weights.hook_out) == ("ln2.hook_normalized", "hook_mlp_out")
    if architecture == "skip_transcoder":
        kept = model.encode(HIDDEN)
        ours = kept @ weights.W_dec.T + weights.b_dec + HIDDEN @ weights.W_skip.T
        assert torch.allclose(ours, model(HIDDEN), atol=1e-4)


@pytest.mark.parametrize("F", [64, 16])
@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_sparsify(tmp_path, transcode, skip, F):
    peer = pytest.importorskip("sparsify", reason="eai-sparsify is not installed: pip install sparse_transcoder[peers]")
    config = peer.SparseCoderConfig(num_latents=F, k=7, transcode=transcode, skip_connection=skip)
    model = randomise(peer.SparseCoder(16, config))
    model.save_to_disk(tmp_path / "layers.3.mlp")
    weights = load(tmp_path)[3]
    found = model.encode(HIDDEN)
    want = torch.zeros(50, F).scatter(1, found.top_indices, found.top_acts.detach())
    assert close(dense(weights, HIDDEN), want)
    assert same_bits(weights.W_skip, model.W_skip.detach() if skip else None)


DICTIONARY_LEARNING = "dictionary-learning is not installed: make peers"


@pytest.mark.parametrize("F", [64, 16])
@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderNew", "JumpReluAutoEncoder"])
def test_dictionary_learning(tmp_path, kind, F):
    peer = pytest.importorskip("dictionary_learning.dictionary", reason=DICTIONARY_LEARNING)
    check_dictionary(tmp_path, randomise(getattr(peer, kind)(16, F)), {})


@pytest.mark.parametrize("F", [64, 16])
@pytest.mark.parametrize(
    "kind, module",
    [
        ("AutoEncoderTopK", "top_k"),
        ("BatchTopKSAE", "batch_top_k"),
        ("MatryoshkaBatchTopKSAE", "matryoshka_batch_top_k"),
    ],
)
@pytest.mark.parametrize("threshold", [-1.0, 0.5])
def test_dictionary_learning_top_k(tmp_path, kind, module, threshold, F):
    peer = pytest.importorskip(f"dictionary_learning.trainers.{module}", reason=DICTIONARY_LEARNING)
    more = [[F // 4, F - F // 4]] if "Matryoshka" in kind else []
    model = randomise(getattr(peer, kind)(16, F, 7, *more))
    model.threshold.fill_(threshold)
    check_dictionary(tmp_path, model, {"k": 7})


def check_dictionary(root, model, options):
    """Against what the project's own loader makes of the files that its trainer writes."""
    utils = pytest.importorskip("dictionary_learning.utils", reason=DICTIONARY_LEARNING)
    folder = root / "mlp_out_layer_3" / "trainer_0"
    folder.mkdir(parents=True)
    torch.save(model.state_dict(), folder / "ae.pt")
    trainer = {"dict_class": type(model).__name__, "layer": 3, "submodule_name": "mlp_out_layer_3"} | options
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    peer, _ = utils.load_dictionary(str(folder), "cpu")
    weights = load(root)[3]
    kept = peer.encode(HIDDEN)
    assert kept.count_nonzero() > 100
    assert close(dense(weights, HIDDEN), kept)
    assert torch.allclose(kept @ weights.W_dec.T + weights.b_dec, peer.decode(kept), atol=1e-5)


@pytest.mark.parametrize("F", [64, 16])
@pytest.mark.parametrize(
    "act_fn, rescaled", [("relu", False), ("jumprelu", False), ("jumprelu", True), ("topk", False)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_llamascopium(tmp_path, act_fn, rescaled, bias, F):
    peer = pytest.importorskip("llamascopium.models.sae", reason="llamascopium is not installed: make peers")
    config = peer.SAEConfig(
        hook_point_in="blocks.3.ln2.hook_normalized", hook_point_out="blocks.3.hook_mlp_out", d_model=16,
        expansion_factor=F / 16, act_fn=act_fn, top_k=7, sparsity_include_decoder_norm=rescaled, use_decoder_bias=bias,
        norm_activation="inference", device="cpu", dtype=torch.float32,
    )  # fmt: skip
    model = randomise(peer.SparseAutoEncoder(config))
    model.save_pretrained(tmp_path / "L3TC")
    config.save_hyperparameters(tmp_path / "L3TC")
    weights = load(tmp_path)[3]
    kept = model.encode(HIDDEN)
    assert kept.count_nonzero() > 50
    assert close(dense(weights, HIDDEN), kept)
    assert torch.allclose(kept @ weights.W_dec.T + (weights.b_dec if bias else 0), model.decode(kept), atol=1e-5)
    assert (weights.hook_in, weights.hook_out) == ("ln2.hook_normalized", "hook_mlp_out")


CIRCUIT_TRACER = "circuit-tracer is not installed: pip install sparse_transcoder[peers]"


@pytest.mark.parametrize("F", [64, 16])
@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_circuit_tracer_set(tmp_path, threshold, skip, F):
    peer = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder", reason=CIRCUIT_TRACER)
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
    (tmp_path / "config.yaml").write_text("model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\n")
    for i, weights in load(tmp_path).items():
        assert close(dense(weights, HIDDEN), model.encode_layer(HIDDEN, i))
        assert same_bits(weights.W_skip, layers[i].W_skip.detach() if skip else None)
        assert weights.hook_in == "mlp.hook_in"


@pytest.mark.parametrize("F", [64, 16])
@pytest.mark.parametrize("activation", ["relu", "jump_relu"])
def test_circuit_tracer_clt(tmp_path, activation, F):
    peer = pytest.importorskip("circuit_tracer.transcoder.cross_layer_transcoder", reason=CIRCUIT_TRACER)
    model = peer.CrossLayerTranscoder(
        3, F, 16, activation, lazy_decoder=False, device=torch.device("cpu"), dtype=torch.float32
    )
    randomise(model).to_safetensors(str(tmp_path))
    loaded = load(tmp_path)
    want = model.encode(HIDDEN.expand(3, -1, -1))
    assert list(loaded) == [0, 1, 2]
    for i, weights in loaded.items():
        assert close(dense(weights, HIDDEN), want[i])
        by_target = weights.W_dec.reshape(3 - i, 16, F)
        assert torch.equal(by_target, model.W_dec[i].detach().permute(1, 2, 0))
        assert torch.equal(weights.b_dec, model.b_dec[i])


@pytest.mark.parametrize("F, H", [(64, 16), (16, 16)])
def test_gemma_scope_as_circuit_tracer_reads_it(tmp_path, F, H):
    peer = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder", reason=CIRCUIT_TRACER)
    gemma_scope(tmp_path, 3, F, H)
    gemma_scope_2_affine(tmp_path / "second", 4, F, H)
    cpu = torch.device("cpu")
    first = peer.load_gemma_scope_transcoder(str(weights_file(tmp_path / "layer_3")), 3, device=cpu)
    second = peer.load_gemma_scope_2_transcoder(str(weights_file(tmp_path / "second")), 4, device=cpu)
    hidden = ints(40, H, seed=20)
    loaded = load(tmp_path)
    for i, model in ((3, first), (4, second)):
        assert torch.equal(
            dense(loaded[i], hidden), relu(model.encode(hidden))
        )  # a threshold below 0 passes none of ours
    assert torch.equal(loaded[4].W_skip, second.W_skip)


# The commands


def command(*arguments):
    line = [sys.executable, "-m", "sparse_transcoder", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_info(tmp_path):
    for i in (0, 1):
        sparsify_sae(tmp_path, i, 30, 8)
    code, out, err = command("info", tmp_path)
    assert (code, err) == (0, "")
    head, *rows, last = out.splitlines()
    assert head.split() == ["layer", "H", "F", "dtype", "activation", "hooks", "bytes"]
    assert len(rows) == 2 and rows[1].split()[:4] == ["1", "8", "30", "float32"]
    assert "topk k=4, input bias" in rows[1] and "mlp.hook_out" in rows[1]
    assert last.startswith("sparsify: 2 layers")


CONVERTED = [w for w in WRITERS if not w.__name__.startswith("clt")]


def test_convert_gives_what_the_source_gives(tmp_path):
    for number, write in enumerate(CONVERTED):
        source, target = tmp_path / f"{number}", tmp_path / f"{number}.native"
        want = write(source, 1, 30, 8)
        assert main(["convert", str(source), str(target)]) == 0
        assert sorted(path.name for path in target.iterdir()) == ["config.yaml", "layer_1.safetensors"]
        before, after = load(source)[1], load(target)[1]
        hidden = ints(40, 8, seed=20)
        assert torch.equal(dense(after, hidden), want.encode(hidden)), write.__name__
        assert after.input_bias is None
        for name in ("W_enc", "W_dec", "b_dec", "W_skip", "threshold", "k", "hook_in", "hook_out"):
            assert same_bits(getattr(after, name), getattr(before, name)), (write.__name__, name)


def test_convert_dtype(tmp_path):
    sae_lens(tmp_path / "a", 1, 30, 8, "jumprelu", centred=True)
    code, out, err = command("convert", tmp_path / "a", tmp_path / "b", "--dtype", "bfloat16")
    assert (code, err) == (0, "") and "folded" in out
    weights = load(tmp_path / "b")[1]
    assert weights.W_enc.dtype == weights.W_dec.dtype == torch.bfloat16
    assert weights.threshold.dtype == weights.b_enc.dtype == torch.float32


def test_a_folded_bias_is_close(tmp_path):
    """Not whole numbers: folding in float64 rounds once."""
    p = {name: value + 0.1 * normal(*value.shape, seed=5) for name, value in parts(30, 8).items()}
    config = {"architecture": "standard", "apply_b_dec_to_input": True, "hook_name": "blocks.0.hook_mlp_in"}
    put(tmp_path / "a", "sae_weights.safetensors", p, "cfg.json", config)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    hidden = normal(40, 8)
    want = relu((hidden - p["b_dec"]).double() @ p["W_enc"].double() + p["b_enc"].double())
    assert close(dense(load(tmp_path / "b")[0], hidden), want)


def reference_with_layer_norm(root, i, F, H):
    root.mkdir(parents=True)
    state = {"enc.0.weight": torch.ones(H), "enc.0.bias": torch.zeros(H), "dec.weight": torch.ones(H, F)}
    torch.save({"state_dict": state}, root / f"transcoder_L{i}.pt")


@pytest.mark.parametrize("write, word", [(clt, "many layers"), (reference_with_layer_norm, "LayerNorm")])
def test_convert_refuses_what_native_cannot_express(tmp_path, capsys, write, word):
    write(tmp_path / "a", 0, 30, 8)
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and word in err
    assert [path.name for path in tmp_path.iterdir()] == ["a"], "something half-written is left"


def test_command_errors(tmp_path, capsys):
    """In this process: an exit code of 2 is argparse's SystemExit."""
    sparsify(tmp_path / "a", 0, 30, 8)
    for arguments, expected in (
        (["info", tmp_path / "none"], 1),
        (["info", tmp_path / "a" / "layers.0.mlp" / "cfg.json"], 1),
        (["convert", tmp_path / "a", tmp_path / "a"], 1),
        ([], 2),
        (["info"], 2),
        (["convert", tmp_path / "a", tmp_path / "b", "--dtype", "int8"], 2),
    ):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        assert (code, out) == (expected, ""), arguments
        assert expected == 2 or (err.startswith("error: ") and err.count("\n") == 1)
    assert command("info", tmp_path / "none") == (1, "", f"error: {tmp_path / 'none'}: there is no such folder\n")
    assert command("fly")[0] == 2


@pytest.mark.parametrize("of", [(), ("info",), ("convert",)])
def test_help_has_examples(capsys, of):
    with pytest.raises(SystemExit) as ended:
        main([*of, "--help"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert "examples:" in out and "python -m sparse_transcoder convert" in out and "exit codes" in out


@pytest.mark.parametrize("native", [False, True])
def test_progress_on_a_terminal(tmp_path, monkeypatch, native):
    for i in (0, 1, 4):
        gemma_scope(tmp_path / "source", i, 30, 8)
    source = tmp_path / "source"
    if native:
        assert main(["convert", str(source), str(tmp_path / "native")]) == 0
        source = tmp_path / "native"
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["convert", str(source), str(tmp_path / "target")]) == 0
    bars = re.findall(r"\rconvert \[(#*) *\] (\d)/3 layer (\d)", terminal.getvalue())
    assert bars == [("", "0", "0"), ("#" * 10, "1", "1"), ("#" * 20, "2", "4")]
