"""The safetensors reader accepts what the official reader accepts, and nothing else."""

import json
import random
import struct

import pytest
import safetensors
import torch
from safetensors.torch import save
from sparse_transcoder import _C

WIDTHS = {"F32": 4, "BF16": 2, "U8": 1}


def file(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin, end, dtype="U8", shape=None):
    return {"dtype": dtype, "shape": shape or [end - begin], "data_offsets": [begin, end]}


def accepted(read):
    """What was read, or None where it was refused."""
    try:
        return read()
    except (ValueError, safetensors.SafetensorError) as error:
        return None if str(error) else pytest.fail("no reason is given")


def check_as_official(path, content):
    """Whether both readers accept the file; they must agree, on the bytes of each tensor too."""
    path.write_bytes(content)
    theirs = accepted(lambda: safetensors.deserialize(content))
    ours = accepted(lambda: _C.read_safetensors(str(path)))
    assert (ours is None) == (theirs is None), content
    if ours is not None:
        want = {name: bytes(tensor["data"]) for name, tensor in theirs}
        flat = {name: t.flatten().view(torch.uint8) for name, t in ours.items()}
        assert {name: bytes(t.tolist()) for name, t in flat.items()} == want
    return ours is not None


@pytest.mark.parametrize(
    "header, size, whole",
    [
        ({}, 0, True),
        ({}, 1, False),
        ({"a": entry(0, 4)}, 4, True),
        ({"a": entry(0, 4)}, 5, False),
        ({"a": entry(0, 4)}, 3, False),
        ({"a": entry(1, 4)}, 4, False),
        ({"a": entry(0, 4), "b": entry(4, 6)}, 6, True),
        ({"b": entry(4, 6), "a": entry(0, 4)}, 6, True),
        ({"a": entry(0, 4), "b": entry(5, 6)}, 6, False),
        ({"a": entry(0, 4), "b": entry(3, 6)}, 6, False),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 4, False),
        ({"a": entry(0, 4), "b": entry(0, 4)}, 8, False),
        ({"a": entry(0, 4), "b": entry(0, 0), "c": entry(4, 4)}, 4, True),
        ({"a": entry(0, 4), "b": entry(2, 2)}, 4, False),
        ({"a": entry(0, 0), "b": entry(0, 0)}, 0, True),
        ({"__metadata__": {"format": "pt"}, "a": entry(0, 4)}, 4, True),
        ({"__metadata__": {"format": "pt"}, "a": entry(0, 4)}, 12, False),
    ],
)
def test_holes_and_trailing_bytes(tmp_path, header, size, whole):
    assert check_as_official(tmp_path / "f", file(header, bytes(range(size)))) == whole


def test_random_tables(tmp_path):
    """Tensors laid out without a hole, then a few offsets, sizes or the end moved."""
    pick = random.Random(0)
    outcomes = []
    for _ in range(2000):
        header, end = {}, 0
        for number in range(pick.randint(1, 4)):
            dtype = pick.choice(list(WIDTHS))
            count = pick.choice([0, 1, 2, 5])
            begin, end = end, end + count * WIDTHS[dtype]
            header[f"t{number}"] = entry(begin, end, dtype, [count])
        for _ in range(pick.choice([0, 0, 1, 2])):
            offsets = pick.choice(list(header.values()))["data_offsets"]
            shift = pick.choice([-4, -2, -1, 1, 2, 4])
            for i in pick.choice([(0, 1), (0,), (1,)]):
                offsets[i] = max(0, offsets[i] + shift)
        size = max(0, end + pick.choice([0, 0, 0, -1, 1, 8]))
        data = pick.randbytes(size)
        outcomes.append(check_as_official(tmp_path / "f", file(header, data)))
    assert 300 < sum(outcomes) < 1700


def test_the_reason_is_given(tmp_path):
    path = tmp_path / "f"
    whole = save({"a": torch.ones(3), "b": torch.ones(2)})
    path.write_bytes(whole + b"more")
    with pytest.raises(ValueError) as caught:
        _C.read_safetensors(str(path))
    assert (
        str(caught.value) == f"{path}: the tensors must fill the 24 bytes after the header, got 20"
    )
    path.write_bytes(file({"a": entry(0, 2), "b": entry(3, 4)}, bytes(4)))
    with pytest.raises(ValueError) as caught:
        _C.read_safetensors(str(path))
    assert str(caught.value) == (
        f'{path}: tensor "b" must begin at byte 2, where the tensors before it end, got 3'
    )
