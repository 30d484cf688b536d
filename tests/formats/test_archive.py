"""Files of torch.save that lie about how much data they hold."""

import io
import zipfile

import pytest
import torch
from checkpoints import Bomb, load, parts, refused, rezipped, weights_file
from sparse_transcoder.formats.archive import check_storages
from test_dictionary_learning import dictionary_learning_case
from test_qwen_scope import qwen_scope


@pytest.mark.parametrize("write", [dictionary_learning_case("AutoEncoder"), qwen_scope])
@pytest.mark.parametrize("missing", [4, 100, None])
def test_a_storage_shorter_than_its_tensors(tmp_path, write, missing):
    """One record is cut at a time. torch would read what follows it in the file."""
    write(tmp_path, 0, 30, 8)
    path = weights_file(tmp_path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if "/data/" in name]
    assert len(names) == 4
    for cut in names:
        path.write_bytes(whole)
        rezipped(
            path,
            lambda name, record, cut=cut: (
                record[: len(record) - missing if missing and len(record) > missing else 0]
                if name == cut
                else record
            ),
        )
        refused(tmp_path, path.name, cut[cut.index("data/") :], "bytes for the tensors that stand")


def test_records_that_are_absent_or_there_twice(tmp_path):
    qwen_scope(tmp_path, 0, 30, 8)
    path = weights_file(tmp_path)
    with zipfile.ZipFile(path) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    name = next(name for name, _ in records if name.endswith("data/2"))
    with zipfile.ZipFile(path, "w") as archive:
        for other, record in records:
            if other != name:
                archive.writestr(other, record)
    refused(tmp_path, "storage data/2 must have", "got none")
    with zipfile.ZipFile(path, "w") as archive:
        for other, record in records:
            archive.writestr(other, record)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, b"")
    refused(tmp_path, "data/2 is there twice")


def test_tensors_that_share_a_storage(tmp_path):
    """Views and other dtypes load as before, and what is unused is not looked at."""
    both = torch.arange(2 * 30 * 8, dtype=torch.float32).view(2, 30, 8)
    p = parts(30, 8)
    folder = tmp_path / "x-W1K-L0_4"
    folder.mkdir()
    state = {"W_enc": both[0], "W_dec": both[1].T, "b_enc": p["b_enc"].half(), "b_dec": p["b_dec"]}
    torch.save(state, folder / "layer2.sae.pt")
    weights = load(tmp_path)[2]
    assert torch.equal(weights.W_enc, both[0]) and torch.equal(weights.W_dec, both[1].T)
    assert weights.b_enc.dtype == torch.float16


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.int8, torch.uint8, torch.int64, torch.bool]
)
def test_names_and_storages(tmp_path, dtype):
    content = {"state_dict": {"a": torch.ones(3, dtype=dtype), "b": torch.ones(2, 5).bfloat16()}}
    torch.save(content, tmp_path / "x.pt")
    assert check_storages(tmp_path / "x.pt") == ["a", "b"]


def test_nothing_of_the_file_is_run(tmp_path):
    marker = tmp_path / "ran"
    for content in (Bomb(marker), {"state_dict": {"a": Bomb(marker)}}, [Bomb(marker)]):
        torch.save(content, tmp_path / "x.pt")
        check_storages(tmp_path / "x.pt")
    assert not marker.exists()
    buffer = io.BytesIO()
    torch.save(torch.ones(3), buffer)
    (tmp_path / "y.pt").write_bytes(buffer.getvalue())
    assert check_storages(tmp_path / "y.pt") == []
