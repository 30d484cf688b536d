"""Names of the Hugging Face hub, offline, from a download cache that the test makes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import load
from oracle import normal
from safetensors.torch import save_file
from sparse_transcoder import load_transcoders
from sparse_transcoder.formats.hub import local_folder
from test_gemma_scope import gemma_scope

SHA = "0123456789abcdef0123456789abcdef01234567"
OTHER = "fedcba9876543210fedcba9876543210fedcba98"
LOADER = """
import json, sys
from sparse_transcoder import load_transcoders
for name in sys.argv[1:]:
    try:
        weights = load_transcoders(name, device="cpu")
        outcome = {layer: [w.source, float(w.W_enc.double().sum())] for layer, w in weights.items()}
    except Exception as error:
        outcome = [type(error).__name__, str(error)]
    print(json.dumps(outcome))
"""


def cached(home, write, sha=SHA, revision="main"):
    """A repository org/name in a cache: blobs, links to them in snapshots, and a ref."""
    repository = home / "hub" / "models--org--name"
    for folder in ("blobs", "refs"):
        (repository / folder).mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(sha)
    plain = home / f"plain{sha[0]}"
    want = write(plain)
    for number, path in enumerate(sorted(plain.rglob("*"))):
        target = repository / "snapshots" / sha / path.relative_to(plain)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            blob = repository / "blobs" / f"{sha[0]}{number:063x}"
            path.rename(blob)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(blob)
    return want


def outcomes(home, *names):
    pytest.importorskip("huggingface_hub", reason="install sparse_transcoder[hub]")
    done = subprocess.run(
        [sys.executable, "-c", LOADER, *names],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_names_and_addresses(tmp_path):
    def first(root):
        return [gemma_scope(root, i, 30, 8) for i in (3, 4)]

    a, b = cached(tmp_path, first)
    old = cached(tmp_path, lambda root: gemma_scope(root, 9, 30, 8), OTHER, "v1")
    names = (
        "org/name",
        "hf://org/name",
        "hf://org/name/layer_4",
        "hf://org/name/layer_4/width_16k/@main",
        f"hf://org/name@{SHA}",
        "hf://org/name@v1",
        "hf://org/name?revision=v1",
    )
    sums = {i: float(w.W_enc.double().sum()) for i, w in ((3, a), (4, b), (9, old))}
    layers = ([3, 4], [3, 4], [4], [4], [3, 4], [9], [9])
    for name, found, want in zip(names, outcomes(tmp_path, *names), layers, strict=True):
        assert isinstance(found, dict) and list(found) == [str(i) for i in want], (name, found)
        for layer, (source, total) in found.items():
            assert total == sums[int(layer)] and "models--org--name" in source


def test_what_the_hub_does_not_have(tmp_path):
    cached(tmp_path, lambda root: gemma_scope(root, 3, 30, 8))
    names = ("org/other", "hf://org/name@nowhere", "hf://org/name/absent")
    for name, (error, text) in zip(names, outcomes(tmp_path, *names), strict=True):
        assert error == "FileNotFoundError" and "\n" not in text and len(text) < 600
        assert name in text or "absent" in text


def test_a_folder_that_is_there_is_taken_before_a_hub_name(tmp_path, monkeypatch):
    want = gemma_scope(tmp_path / "org" / "name", 3, 30, 8)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load("org/name")[3].W_enc, want.W_enc)


@pytest.mark.parametrize(
    "name",
    ["hf://", "hf://org", "hf://org/name/../up", "hf://org/name@", "hf:///x/y", "hf://o/n@a@b"],
)
def test_addresses_that_are_none(name):
    with pytest.raises(ValueError, match=r"must be hf://org/name\[/folder\]\[@revision\]"):
        load_transcoders(name)


@pytest.mark.parametrize("name", ["/absent/name", "./absent/name", "absent", "a/b/c", "~/x"])
def test_paths_are_no_hub_names(name):
    assert str(local_folder(name)) == name.removeprefix("./")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load_transcoders(name)


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"org/name: .* pip install sparse_transcoder\[hub\]"):
        load_transcoders("org/name")


def listing(folder, *entries, more=""):
    folder.mkdir()
    lines = ["model_kind: transcoder_set", "feature_input_hook: hook_resid_mid", "transcoders:"]
    lines += [f'- "{entry}"' for entry in entries]
    (folder / "config.yaml").write_text(
        "\n".join([*lines, "feature_output_hook: hook_mlp_out", more])
    )
    return str(folder)


def native_layer(path, i, skip):
    made = {"W_enc": normal(30, 8, seed=i), "b_enc": normal(30, seed=i), "b_dec": normal(8, seed=i)}
    made["W_dec"] = normal(30, 8, seed=i + 1)
    if skip:
        made["W_skip"] = normal(8, 8, seed=i + 2)
        made["activation_function.threshold"] = normal(30, seed=i + 3).abs()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(made, path)
    return made


CHECKED = """
import json, sys, warnings
from sparse_transcoder import load_transcoders
warnings.simplefilter("error")
for folder in sys.argv[1:]:
    try:
        out = {}
        for layer, w in load_transcoders(folder, device="cpu").items():
            there = {n: t for n, t in vars(w).items() if hasattr(t, "dim")}
            sums = {n: float(t.double().abs().sum()) for n, t in there.items()}
            shapes = [list(w.W_enc.shape), list(w.W_dec.shape)]
            out[layer] = [w.hook_in, w.hook_out, w.k, *shapes, sums]
    except Exception as error:
        out = [type(error).__name__, str(error)]
    print(json.dumps(out))
"""


def test_a_list_of_files_of_the_hub(tmp_path, monkeypatch):
    """Files of several layouts and revisions; the order is that of the layers."""
    monkeypatch.setattr(sys.modules[__name__], "LOADER", CHECKED)
    written = {}

    def first(root):
        written["npz"] = gemma_scope(root, 0, 30, 8)
        written["plain"] = native_layer(root / "sub" / "layer_1.safetensors", 1, False)

    def old(root):
        written["skip"] = native_layer(root / "layer_2.safetensors", 2, True)

    cached(tmp_path, first)
    cached(tmp_path, old, OTHER, "v1")
    npz = next(p for p in (tmp_path / "hub").rglob("params.npz")).relative_to(
        tmp_path / "hub/models--org--name/snapshots" / SHA
    )
    entries = (
        f"hf://org/name/{npz.as_posix()}",
        "hf://org/name/sub/layer_1.safetensors",
        "hf://org/name/layer_2.safetensors?revision=v1",
    )
    folders = [
        listing(tmp_path / "all", *entries),
        listing(tmp_path / "topk", entries[0], entries[1], more="activation: topk\nk: 7\n"),
    ]
    whole, topk = outcomes(tmp_path, *folders)
    assert list(whole) == ["0", "1", "2"]

    def total(tensor):
        return float(tensor.double().abs().sum())

    for layer, key in ((1, "plain"), (2, "skip")):
        hook_in, hook_out, k, encoder, decoder, sums = whole[str(layer)]
        assert (hook_in, hook_out, k) == ("hook_resid_mid", "hook_mlp_out", None)
        assert (encoder, decoder) == ([30, 8], [8, 30])
        names = {"activation_function.threshold": "threshold"}
        assert sums == {names.get(n, n): total(t) for n, t in written[key].items()}
    assert whole["0"][:2] == ["hook_resid_mid", "hook_mlp_out"]
    assert whole["0"][5]["W_enc"] == total(written["npz"].W_enc) and "threshold" in whole["0"][5]
    assert topk["1"][2] == 7


def test_lists_that_cannot_be_had(tmp_path):
    cached(tmp_path, lambda root: native_layer(root / "layer_0.safetensors", 0, False))
    there = "hf://org/name/layer_0.safetensors"
    cases = {
        "hf://org/name/layer_5.safetensors": ("FileNotFoundError", "no such file"),
        "hf://org/other/layer_0.safetensors": ("FileNotFoundError", "org/other"),
        "hf://org/name": ("ValueError", "must be hf://org/name/file"),
        "hf://org/name/../layer_0.safetensors": ("ValueError", "must be hf://org/name/file"),
        "../layer_0.safetensors": ("ValueError", "must be hf:// or inside this folder"),
        "/etc/layer_0.safetensors": ("ValueError", "must be hf:// or inside this folder"),
        "layer_1.safetensors": ("FileNotFoundError", "there is no such file"),
    }
    folders = [listing(tmp_path / str(i), there, entry) for i, entry in enumerate(cases)]
    for (kind, words), (error, text) in zip(
        cases.values(), outcomes(tmp_path, *folders), strict=True
    ):
        assert error == kind and words in text and "\n" not in text, text


def test_a_file_in_another_layers_place_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "LOADER", CHECKED)  # warnings are errors there
    cached(tmp_path, lambda root: native_layer(root / "layer_7.safetensors", 0, False))
    local = tmp_path / "local"
    native_layer(local / "layer_7.safetensors", 0, False)
    (local / "config.yaml").write_text("transcoders:\n  - layer_7.safetensors\n")
    hub = listing(tmp_path / "hub-list", "hf://org/name/layer_7.safetensors")
    for error, text in outcomes(tmp_path, hub, str(local)):
        assert error == "UserWarning" and "lists a file of layer 7 in another layer's place" in text
