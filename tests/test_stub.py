"""The committed type stub is what the compiled module says."""

from pathlib import Path

import pytest
import sparse_transcoder
from stub import generate


def test_stub_is_current():
    pytest.importorskip("pybind11_stubgen", reason="pybind11-stubgen is not installed")
    committed = Path(sparse_transcoder.__file__).with_name("_C.pyi").read_text()
    assert generate() == committed, "run `make stub` and commit the result"
