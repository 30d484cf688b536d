"""The documents hold what was measured; the GPU benchmark runs, as far as a CPU tells."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_documents_hold_the_results(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import table

    for path, text in table.written().items():
        assert path.read_text() == text, f"{path.name}: python benchmarks/table.py --write"


def dry_run(out, *options):
    command = [
        sys.executable,
        BENCHMARKS / "gpu.py",
        "--device",
        "cpu",
        "--shrink",
        "64",
        "--out",
        out,
        *options,
    ]
    done = subprocess.run(
        [*map(str, command), "--compile-seconds", "0"], capture_output=True, text=True
    )
    return done, json.loads(out.read_text())


def test_gpu_benchmark_runs_its_cases(tmp_path):
    done, report = dry_run(tmp_path / "gpu.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert report["failed"] == {} and report["skipped"] == [] and len(report["cases"]) >= 26
    assert report["machine"].keys() >= {
        "card",
        "torch",
        "cuda",
        "bf16_tflops",
        "copy_gb_per_s",
        "pinned_gb_per_s",
    }
    for record in report["cases"]:
        assert record["left_out"] == {}
        wanted = {"product bf16"} if record["brief"] else {"reference bf16", "reference fp32"}
        assert record["streamed"] or wanted <= record["contenders"].keys()
        assert all(
            one["ms"]["median"] > 0 and one["host_ms"] > 0 for one in record["contenders"].values()
        )


def test_gpu_benchmark_says_what_it_skips(tmp_path):
    done, report = dry_run(tmp_path / "gpu.json", "--seconds", "-1", "--only", "1 x 5120 x 40960")
    assert done.returncode == 1 and report["cases"] == []
    assert report["skipped"] and all(
        "1 x 5120 x 40960" in name and f"{name}: skipped" in done.stdout
        for name in report["skipped"]
    )


def test_cpu_benchmark_runs_a_case(tmp_path):
    out = tmp_path / "cpu.json"
    options = ["--quick", "--only", "64 x 512 x 4096 hard", "--out", out]
    command = [sys.executable, BENCHMARKS / "bench.py", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["machine"]["threads"] > 0 and len(report["cases"]) == 1
    assert {"reference fp32", "linear+topk bf16"} <= report["cases"][0]["contenders"].keys()
    explained = report["cases"][0]["explain"]
    assert explained["survivors"] >= explained["ambiguous"] > 0
