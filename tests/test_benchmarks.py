"""What the documents say in numbers is what the benchmark measured."""

import json
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_documents_hold_the_results(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import table

    results, crossovers = (json.loads(path.read_text()) for path in (table.RESULTS, table.CROSSOVERS))
    for path, text in table.written(results, crossovers).items():
        assert path.read_text() == text, f"{path.name}: python benchmarks/table.py --write"
    assert table.measured(results) in table.README.read_text()
