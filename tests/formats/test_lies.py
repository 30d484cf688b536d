"""Native files that lie. All are loaded in one other process: if it dies, no other test does."""

import json
import math
import os
import struct
import subprocess
import sys

import pytest
import torch
from checkpoints import load
from safetensors.torch import save_file
from test_native import CONFIG, F, H, equal, tensors, write

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
