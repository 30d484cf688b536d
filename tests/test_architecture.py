"""The rules of docs/architecture.md: which file may include which, and what the library exports."""

import re
import subprocess
from pathlib import Path

import pytest
import sparse_transcoder

CSRC = Path(__file__).resolve().parent.parent / "csrc"
FLOOR = {"types.h", "bounds.h"}
SHARED = {*FLOOR, "floating_point.h", "check_weights.h", "layer.h", "pool.h", "backend.h"}
# What a file may include beside the public headers and its own folder, by the file or its folder.
ALLOWED = {
    "types.h": set(),
    "bounds.h": set(),
    "floating_point.h": set(),
    "pool.h": set(),
    "check_weights": {"check_weights.h"},
    "layer": {*FLOOR, "check_weights.h", "layer.h", "stamp.h"},
    "stamp": {"stamp.h"},
    "backend.h": {*FLOOR, "layer.h"},
    "decode": {"decode.h", "layer.h"},
    "engine.cpp": {*SHARED, "decode.h"},
    "io": {"check_weights.h"},
    "cpu": SHARED,
    "cuda": SHARED,
    "cpu/kernels": FLOOR,
    "cuda/kernels": FLOOR,
    "bindings": {"io/safetensors.h"},
}
PUBLIC = ("Engine", "FileNotFound", "load_weights")
FOR_BINDINGS = ("read_safetensors", "cpu_instruction_set", "cuda_kernels")


def sources():
    found = [p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert found, f"no sources under {CSRC}"
    return found


def rule(name):
    """The key of ALLOWED for a file: the deepest folder that has one, or the file itself."""
    path = Path(name)
    for folder in path.parents:
        if str(folder) in ALLOWED:
            return str(folder)
    return path.name if path.name in ALLOWED else path.stem


def includes(text):
    return re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE)


def broken_rules(name, text):
    """Why a source breaks the rules of the map, one line each."""
    if name.startswith("include/"):
        wanted = re.findall(r"^\s*#\s*include\s*<(\w+)/", text, re.MULTILINE)
        return [
            f"{name} includes <{one}/..>"
            for one in [*wanted, *includes(text)]
            if one not in ("sparse_transcoder", "ATen", "c10")
        ]
    own, faults = rule(name), []
    if own not in ALLOWED:
        return [f"{name}: the map has no rule for it"]
    for one in includes(text):
        if ".." in one:
            faults.append(f"{name} includes {one}, which points up")
        elif one not in ALLOWED[own] and not (own in name and one.startswith(own + "/")):
            faults.append(f"{name} includes {one}")
    if "/kernels" in own:
        torch = re.findall(r"^\s*#\s*include\s*<((?:ATen|c10|torch)/[^>]+)>", text, re.MULTILINE)
        faults += [f"{name} includes <{one}>" for one in torch]
    for wing, other in (("cpu", "cuda"), ("cuda", "cpu")):
        if name.startswith(wing + "/") and re.search(rf"\b{other}(::|/)", text):
            faults.append(f"{name} names {other}")
    return faults


def test_includes_point_down():
    faults = []
    for path in sources():
        faults += broken_rules(path.relative_to(CSRC).as_posix(), path.read_text())
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "name, text",
    [
        ("cpu/backend.cpp", '#include "cuda/streams.h"'),
        ("cuda/chunk.cpp", "cpu::Workspace w;"),
        ("cpu/kernels/avx2.cpp", "#include <ATen/ATen.h>"),
        ("cpu/kernels/avx2.cpp", '#include "layer.h"'),
        ("layer.cpp", '#include "backend.h"'),
        ("io/safetensors.cpp", '#include "../layer.h"'),
        ("include/sparse_transcoder/engine.h", '#include "backend.h"'),
        ("new_folder/thing.cpp", ""),
    ],
)
def test_a_broken_rule_is_seen(name, text):
    assert broken_rules(name, text)


def test_only_the_public_api_is_exported():
    library = next(Path(sparse_transcoder.cmake_prefix_path).glob("lib/libsparse_transcoder.so"))
    command = ["nm", "-DC", "--defined-only", library]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    names = [line.split(maxsplit=2)[2] for line in lines if "sparse_transcoder::" in line]
    assert names, "the library exports nothing"
    public = "|".join(PUBLIC + FOR_BINDINGS)
    known = re.compile(rf"((typeinfo( name)?|vtable) for )?sparse_transcoder::({public})\b")
    assert not [name for name in names if not known.match(name)]
