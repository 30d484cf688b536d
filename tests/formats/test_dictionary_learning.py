"""dictionary_learning: config.json beside ae.pt."""

import json
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
from checkpoints import (
    HIDDEN,
    Bomb,
    Written,
    close,
    dense,
    ints,
    jumprelu,
    load,
    parts,
    put,
    randomise,
    refused,
    relu,
    rezipped,
    topk,
    weights_file,
)
from every_layout import EveryLayout, WithConfig

KINDS = (
    "AutoEncoder",
    "AutoEncoderNew",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)


def dictionary_learning_case(kind):
    def write(root, i, F, H):
        p = parts(F, H, i)
        norms = torch.ones(F)
        if kind == "AutoEncoder":  # Its loader makes the decoder's directions unit vectors.
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
        tensors = dict(p)
        if kind not in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
            tensors = {"encoder.weight": p["W_enc"].T, "encoder.bias": p["b_enc"]}
            tensors |= {"decoder.weight": p["W_dec"].T, bias: p["b_dec"]}
        trainer = {"dict_class": kind, "layer": i, "submodule_name": "mlp_out"}
        if "TopK" in kind:  # The top-k coder must not apply its threshold, the batch top-k must.
            tensors |= {"k": torch.tensor(4, dtype=torch.int), "threshold": torch.tensor(2.0)}
            trainer["k"] = 4
        if kind == "MatryoshkaBatchTopKSAE":
            tensors["group_sizes"] = torch.tensor([4, F - 4])
        if kind == "JumpReluAutoEncoder":
            tensors["threshold"] = ints(F, seed=i + 7)
        folder = root / f"mlp_out_layer_{i}" / "trainer_0"
        config = {"trainer": trainer, "buffer": {"ctx_len": 128}}
        put(folder, "ae.pt", tensors, "config.json", config)

        def encode(x):
            return encode_of((x - p["b_dec"] if centred else x) @ p["W_enc"] + p["b_enc"]) * norms

        W_enc, W_dec = p["W_enc"].T * norms[:, None], p["W_dec"].T / norms
        return Written(encode, W_enc, W_dec, p["b_dec"], hooks=("mlp_out", "mlp_out"))

    write.__name__ = f"dictionary_learning_{kind}"
    return write


class TestDictionaryLearning(EveryLayout, WithConfig):
    WRITERS = tuple(dictionary_learning_case(kind) for kind in KINDS)
    CONFIG = "config.json"
    UNSUPPORTED = (
        (
            dictionary_learning_case("AutoEncoder"),
            {"trainer": {"dict_class": "GatedAutoEncoder"}},
            ["Gated"],
        ),
        (dictionary_learning_case("AutoEncoder"), {"trainer": {}}, ["dict_class"]),
        (dictionary_learning_case("AutoEncoder"), {"trainer": 3}, ["trainer"]),
        (
            dictionary_learning_case("AutoEncoderTopK"),
            {"trainer": {"dict_class": "AutoEncoderTopK", "k": 5}},
            ["k must be 5"],
        ),
    )


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


def test_compressed_pickles(tmp_path):
    dictionary_learning_case("AutoEncoder")(tmp_path, 0, 30, 8)
    rezipped(weights_file(tmp_path), lambda name, record: record, zipfile.ZIP_DEFLATED)
    refused(tmp_path, "ae.pt", "is compressed")


@pytest.mark.parametrize("size", [0, 4, 100])
def test_pickles_with_less_data_than_they_say(tmp_path, size):
    dictionary_learning_case("AutoEncoder")(tmp_path, 0, 30, 8)
    path = weights_file(tmp_path)
    rezipped(path, lambda name, record: record[:size] if "/data/" in name else record)
    refused(tmp_path, "ae.pt")


def test_damaged_pickles_are_refused_or_loaded_but_never_crash(tmp_path):
    """In a process of its own: a few bytes are changed anywhere, or the file is cut short."""
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
    command = [sys.executable, "-c", script, tmp_path, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0 < int(done.stdout) < 1500


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
    trainer = {"dict_class": type(model).__name__, "layer": 3, "submodule_name": "mlp_out_layer_3"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer | options}))
    peer, _ = utils.load_dictionary(str(folder), "cpu")
    weights = load(root)[3]
    kept = peer.encode(HIDDEN)
    assert kept.count_nonzero() > 100
    assert close(dense(weights, HIDDEN), kept)
    assert torch.allclose(kept @ weights.W_dec.T + weights.b_dec, peer.decode(kept), atol=1e-5)
