"""Time each choice of a screen against its alternative, also on rows and weights made to hurt.

    python benchmarks/crossovers.py [--only dense,planes,rows,adverse] [--out FILE]

dense    the int8 screen with what follows it, over the screen that panels with many survivors take,
         by the share that survives
planes   one int8 plane over two, by the rows of a call
rows     the int8 screen over the float32 product, by the rows of a call
adverse  screening="auto" over "off"

All run on one thread and one core. Every pair of variants takes turns in one process, which encodes
the same bits with both. SPARSE_TRANSCODER_CPU chooses the instruction set, and
SPARSE_TRANSCODER_CROSSOVERS, which an encoder reads when it is built, forces the screen. Times are
bench.py's: medians of alternating rounds.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from bench import check_same, describe_machine, first_call, time_rounds
from inputs import THRESHOLD, Case, made, make_inputs, random_weights
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights

HERE = Path(__file__).resolve().parent
ALL, NEVER = 1 << 40, 2  # more rows, and a larger share of a panel, than any call has
INT8 = {
    "int8_rows": ALL,
    "two_planes_rows": 0,
    "max_share_float32": NEVER,
    "max_share_int16": NEVER,
}
TWO_PLANES = {**INT8, "two_planes_rows": ALL}
DENSE = {"int8_rows": 0}
TOP_K = 50
T, H, F = 256, 2048, 8192
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
# The choices on each instruction set: dtype of the weights, screening, dense arithmetic.
CHOICES = {
    "avx512vnni": [
        ("float32", "auto", "int16"),
        ("float32", "int8", "float32"),
        ("bfloat16", "auto", "float32"),
    ],
    "avx2vnni": [("float32", "auto", "float32"), ("bfloat16", "auto", "float32")],
    "avx2": [("float32", "auto", "float32"), ("bfloat16", "auto", "float32")],
}
ROWS = {"portable": (1, 2, 4, 8), "avx2": (1, 4, 16, 64, 256), "avx2vnni": (1, 16, 256)}


def coders(layers, **fields):
    return {i: TranscoderWeights(W, b, layer=i, **fields) for i, (W, b) in enumerate(layers)}


def encoders(layers, crossovers, top_k=TOP_K, **options):
    """An encoder whose screens are chosen by these crossovers."""
    os.environ["SPARSE_TRANSCODER_CROSSOVERS"] = " ".join(
        f"{name}={value}" for name, value in crossovers.items()
    )
    try:
        return SparseTranscoderEncoder(coders(layers), top_k, THRESHOLD, **options)
    finally:
        del os.environ["SPARSE_TRANSCODER_CROSSOVERS"]


def times(name, calls):
    """{variant: ms}, after a check that all give the same bits. calls: variant -> call."""
    results, seconds = {}, {}
    for variant, call in calls.items():
        results[variant], seconds[variant], _ = first_call(call)
    first = next(iter(results))
    for variant, result in results.items():
        check_same(argparse.Namespace(name=name), variant, result, results[first])
    timed, _ = time_rounds(calls, seconds, 1)
    return {variant: round(statistics.median(samples), 3) for variant, samples in timed.items()}


def compare(name, layers, variants, hidden, **options):
    """As times, of encoders whose screens are forced. variants: name -> crossovers."""
    built = {
        variant: encoders(layers, crossovers, **options) for variant, crossovers in variants.items()
    }
    return times(
        name,
        {variant: functools.partial(e.encode_all_layers, hidden) for variant, e in built.items()},
    )


def dense(cpu):
    """Gaussian rows, whose bias lets a given share survive the int8 screen."""
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(1))
    for dtype, screening, arithmetic in CHOICES.get(cpu, []):
        (W,) = random_weights(H, F, 1)
        W = W.to(getattr(torch, dtype))
        scores = (x[:64] @ W.float().T).flatten().sort().values

        def layers(bias, W=W):
            return [(W, torch.full((F,), bias, dtype=torch.float32))]

        def survive(bias, layers=layers, screening=screening):
            told = encoders(layers(bias), INT8, screening=screening).explain(0, x)
            return told["survivors"] / told["pairs_int8"]

        told = encoders(layers(0.0), DENSE, screening=screening).explain(0, x)
        assert told[f"pairs_{arithmetic}"] == T * F, (
            f"{cpu}, {dtype} weights: the dense screen is not {arithmetic}"
        )
        # Those survive whose score is over the gate less the margin.
        gate = scores[int(0.95 * len(scores))].item()
        margin = gate - scores[int((1 - survive(THRESHOLD - gate)) * len(scores))].item()
        for share in SHARES:
            bias = THRESHOLD - margin - scores[int((1 - share) * len(scores))].item()
            record = {
                "cpu": cpu,
                "weights": dtype,
                "dense": arithmetic,
                "survive": round(survive(bias), 4),
            }
            variants = {"int8": INT8, "dense": DENSE}
            record["ms"] = compare(
                f"dense {record}", layers(bias), variants, {0: x}, screening=screening
            )
            yield record


def planes(cpu):
    for kind in ("planted", "gaussian"):
        rows, layers = make_inputs(Case(8, H, 16384, layers=4, kind=kind))
        for count in range(1, 9):
            hidden = {i: x[:count] for i, x in enumerate(rows)}
            ms = compare(
                f"planes {cpu} {kind} {count}", layers, {"1": INT8, "2": TWO_PLANES}, hidden
            )
            yield {"cpu": cpu, "kind": kind, "T": count, "ms": ms}
    made.clear()


def rows(cpu):
    for kind in ("planted", "gaussian"):
        rows, layers = make_inputs(Case(max(ROWS[cpu]), H, 16384, layers=4, kind=kind))
        for count in ROWS[cpu]:
            hidden = {i: x[:count] for i, x in enumerate(rows)}
            variants = {"int8": INT8, "float32": DENSE}
            ms = compare(f"rows {cpu} {kind} {count}", layers, variants, hidden, screening="int8")
            yield {"cpu": cpu, "kind": kind, "T": count, "ms": ms}
    made.clear()


def adverse_cases():
    """name -> (rows [T, H], W, b, top_k, threshold); ordinary ones have ACTIVE features a row."""
    (x,), ((W, b),) = make_inputs(Case(T, H, F, kind="gaussian"))
    zero, k = torch.zeros(F), TOP_K
    yield "ordinary", (x, W, b, k, THRESHOLD)
    large = x.clone()
    large[::8] *= 1e4
    yield "rows 1e4 times the others", (large, W, b, k, THRESHOLD)
    one = x.clone()
    one[:, 5] = 1e18
    yield "one element 1e18", (one, W, b, k, THRESHOLD)
    blind = W.clone()
    blind[:, 5] = 0
    yield "one element 1e18 that no feature sees", (one, blind, b, k, THRESHOLD)
    yield "rows whose square overflows", (x * 1e20, W * 1e-20, b, k, THRESHOLD)
    yield "too large to screen", (x * 1e37, W, b, k, THRESHOLD)
    yield "denormal rows", (x * 1e-40, W, zero, k, 0.0)
    yield "denormal weights", (x, W * 1e-40, zero, k, 0.0)
    yield "zero rows", (torch.zeros(T, H), W, b, k, THRESHOLD)
    yield "zero rows, all active", (torch.zeros(T, H), W, zero + 2, k, THRESHOLD)
    yield "zero weights", (x, torch.zeros(F, H), b, k, THRESHOLD)
    yield "duplicate features", (x, W[:64].repeat(F // 64, 1), b, k, THRESHOLD)
    yield "all features alike", (x.abs(), torch.full((F, H), 0.02), zero, k, THRESHOLD)
    norms = torch.logspace(-6, 6, F)[torch.randperm(F, generator=torch.Generator().manual_seed(1))]
    yield "weight norms over twelve decades", (x, W * norms[:, None], zero, k, THRESHOLD)
    yield "nearly all survive", (x, W, zero + 3 * H**0.5 / 40, k, 0.0)
    yield "half are active, k 1", (x, W, zero, 1, 0.0)
    yield "k is F", (x, W, zero, F, 0.0)
    yield "bf16, nearly all survive", (x, W.bfloat16(), (zero + 3 * H**0.5 / 40).bfloat16(), k, 0.0)
    yield "bf16, half are active", (x, W.bfloat16(), zero.bfloat16(), k, 0.0)


def adverse(cpu):
    for name, (x, W, b, k, threshold) in adverse_cases():
        variants = {}
        for screening in ("auto", "off"):
            encoder = SparseTranscoderEncoder(coders([(W, b)]), k, threshold, screening=screening)
            variants[screening] = functools.partial(encoder.encode_all_layers, {0: x})
        yield {"cpu": cpu, "case": name, "ms": times(f"adverse {name}", variants)}


def measure(part, cpu):
    """In a process of its own: records, one JSON line each."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with torch.inference_mode():
        for record in {"dense": dense, "planes": planes, "rows": rows, "adverse": adverse}[part](
            cpu
        ):
            print(json.dumps(record), flush=True)


PLAN = {
    "dense": ("avx512vnni", "avx2vnni", "avx2"),
    "planes": ("avx512vnni", "avx2vnni", "avx2"),
    "rows": tuple(ROWS),
    "adverse": ("avx512vnni",),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only",
        default=",".join(PLAN),
        help="parts, separated by commas; the others keep their records",
    )
    parser.add_argument("--out", type=Path, default=HERE / "results" / "crossovers.json")
    options = parser.parse_args()
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    results["machine"] = describe_machine()
    for part in options.only.split(","):
        results[part] = []
        for cpu in PLAN[part]:
            environment = {**os.environ, "SPARSE_TRANSCODER_CPU": cpu}
            command = [
                sys.executable,
                "-c",
                f"import crossovers; crossovers.measure({part!r}, {cpu!r})",
            ]
            with subprocess.Popen(
                command, env=environment, cwd=HERE, stdout=subprocess.PIPE, text=True
            ) as run:
                for line in run.stdout:
                    print(part, line, end="", flush=True)
                    results[part].append(json.loads(line))
            if run.returncode:
                raise SystemExit(f"{part} on {cpu} failed")
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written: {options.out}")


if __name__ == "__main__":
    main()
