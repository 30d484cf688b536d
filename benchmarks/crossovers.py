"""Time each choice of a screen against its alternative, also on rows and weights made to hurt.

    python benchmarks/crossovers.py [--only dense,planes,rows,adverse] [--out FILE]

dense    the int8 screen with what follows it, over the screen that panels with many survivors take,
         by the share that survives
planes   one int8 plane over two, by the rows of a call
rows     the int8 screen over the float32 product, by the rows of a call
adverse  screening="auto" over "off"

All run on one thread and one core. Every pair of variants takes turns in one process, which encodes
the same bits with both. force_screen.cpp, preloaded, makes the choice in the library's place, and
SPARSE_TRANSCODER_CPU that of the instruction set. Times are bench.py's: medians of alternating
rounds.
"""

import argparse
import ctypes
import functools
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from bench import check_same, describe_machine, first_call, time_rounds
from inputs import THRESHOLD, Case, made, make_inputs, random_weights
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
FLOAT32, INT16, INT8 = 0, 1, 2  # Arithmetic
NEVER = 2.0  # a share that no panel has
TOP_K = 50
T, H, F = 256, 2048, 8192
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
# The choices on each instruction set: dtype of the weights, screening, dense arithmetic.
DENSE = {
    "avx512vnni": [
        ("float32", "auto", INT16),
        ("float32", "int8", FLOAT32),
        ("bfloat16", "auto", FLOAT32),
    ],
    "avx2vnni": [("float32", "auto", FLOAT32), ("bfloat16", "auto", FLOAT32)],
    "avx2": [("float32", "auto", FLOAT32), ("bfloat16", "auto", FLOAT32)],
}
ROWS = {"portable": (1, 2, 4, 8), "avx2": (1, 4, 16, 64, 256), "avx2vnni": (1, 16, 256)}


def coders(layers, **fields):
    return {i: TranscoderWeights(W, b, layer=i, **fields) for i, (W, b) in enumerate(layers)}


def encoders(layers, top_k=TOP_K, **options):
    return SparseTranscoderEncoder(coders(layers), top_k, THRESHOLD, **options)


def times(name, variants):
    """{variant: ms}, after a check that all give the same bits, of {name: (prepare, call)}."""
    results, seconds, calls = {}, {}, {}
    for variant, (prepare, call) in variants.items():

        def run(prepare=prepare, call=call):
            prepare()
            return call()

        calls[variant] = run
        results[variant], seconds[variant], _ = first_call(run)
    first = next(iter(results))
    for variant, result in results.items():
        check_same(argparse.Namespace(name=name), variant, result, results[first])
    timed, _ = time_rounds(calls, seconds, 1)
    return {variant: round(statistics.median(samples), 3) for variant, samples in timed.items()}


def dense(force, cpu):
    """Gaussian rows, whose bias lets a given share survive the int8 screen."""
    x = torch.randn(T, H, generator=torch.Generator().manual_seed(1))
    for dtype, screening, arithmetic in DENSE.get(cpu, []):
        (W,) = random_weights(H, F, 1)
        W = W.to(getattr(torch, dtype))
        scores = (x[:64] @ W.float().T).flatten().sort().values

        def made_for(bias, W=W, screening=screening):
            return encoders([(W, torch.full((F,), bias, dtype=torch.float32))], screening=screening)

        def survive(encoder, arithmetic=arithmetic):
            force(INT8, arithmetic, 1, NEVER)
            told = encoder.explain(0, x)
            return told["survivors"] / told["pairs_int8"]

        # Those survive whose score is over the gate less the margin.
        gate = scores[int(0.95 * len(scores))].item()
        margin = gate - scores[int((1 - survive(made_for(THRESHOLD - gate))) * len(scores))].item()
        for share in SHARES:
            encoder = made_for(THRESHOLD - margin - scores[int((1 - share) * len(scores))].item())
            share = survive(encoder)
            call = functools.partial(encoder.encode_all_layers, {0: x})
            record = {
                "cpu": cpu,
                "weights": dtype,
                "dense": "int16" if arithmetic == INT16 else "float32",
            }
            record["survive"] = round(share, 4)
            record["ms"] = times(
                f"dense {cpu} {dtype} {share}",
                {
                    "int8": (lambda a=arithmetic: force(INT8, a, 1, NEVER), call),
                    "dense": (lambda a=arithmetic: force(a, a, 1, NEVER), call),
                },
            )
            yield record


def planes(force, cpu):
    for kind in ("planted", "gaussian"):
        rows, layers = make_inputs(Case(8, H, 16384, layers=4, kind=kind))
        encoder = encoders(layers)
        for count in range(1, 9):
            hidden = {i: x[:count] for i, x in enumerate(rows)}
            call = functools.partial(encoder.encode_all_layers, hidden)
            ms = times(
                f"planes {cpu} {kind} {count}",
                {str(n): (lambda n=n: force(INT8, INT8, n, NEVER), call) for n in (1, 2)},
            )
            yield {"cpu": cpu, "kind": kind, "T": count, "ms": ms}
    made.clear()


def rows(force, cpu):
    for kind in ("planted", "gaussian"):
        rows, layers = make_inputs(Case(max(ROWS[cpu]), H, 16384, layers=4, kind=kind))
        encoder = encoders(layers, screening="int8")
        for count in ROWS[cpu]:
            hidden = {i: x[:count] for i, x in enumerate(rows)}
            call = functools.partial(encoder.encode_all_layers, hidden)
            ms = times(
                f"rows {cpu} {kind} {count}",
                {
                    "int8": (lambda: force(INT8, FLOAT32, 1, NEVER), call),
                    "float32": (lambda: force(FLOAT32, FLOAT32, 1, NEVER), call),
                },
            )
            yield {"cpu": cpu, "kind": kind, "T": count, "ms": ms}
    made.clear()


def adverse_cases():
    """name -> (rows [T, H], W, b, top_k, threshold); ordinary ones have ACTIVE features per row."""
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
            variants[screening] = (
                lambda: None,
                functools.partial(encoder.encode_all_layers, {0: x}),
            )
        yield {"cpu": cpu, "case": name, "ms": times(f"adverse {name}", variants)}


def build_forcing(folder):
    """The library that takes choose_screen's place."""
    path = Path(folder) / "force_screen.so"
    include = [
        HERE.parent / "csrc",
        HERE.parent / "csrc" / "include",
        *cpp_extension.include_paths(),
    ]
    flags = [f"-I{each}" for each in include] + [f"-I{sysconfig.get_paths()['include']}"]
    subprocess.run(
        [
            "g++",
            "-std=c++20",
            "-O1",
            "-shared",
            "-fPIC",
            *flags,
            HERE / "force_screen.cpp",
            "-o",
            path,
        ],
        check=True,
    )
    return path


def measure(part, cpu, library):
    """In a process of its own, where `library` is preloaded: records, one JSON line each."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    with torch.inference_mode():
        if part == "adverse":
            found = adverse(cpu)
        else:
            force = ctypes.CDLL(library).force
            force.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_double]
            found = {"dense": dense, "planes": planes, "rows": rows}[part](force, cpu)
        for record in found:
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
    with tempfile.TemporaryDirectory() as folder:
        library = build_forcing(folder)
        for part in options.only.split(","):
            results[part] = []
            for cpu in PLAN[part]:
                environment = {**os.environ, "SPARSE_TRANSCODER_CPU": cpu}
                if part != "adverse":
                    environment["LD_PRELOAD"] = str(library)
                code = f"import crossovers; crossovers.measure({part!r}, {cpu!r}, {str(library)!r})"
                command = [sys.executable, "-c", code]
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
