"""Names of the Hugging Face hub, offline, from a download cache that the test makes."""

import json
import os
import subprocess
import sys

import pytest
import torch
from checkpoints import load
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
