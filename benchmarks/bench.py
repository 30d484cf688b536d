"""Time the encoder against dense pipelines: check equality, then time in alternating rounds, then compare.

    python benchmarks/bench.py [--quick] [--only NAME[,NAME]] [--no-bf16] [--out FILE]

A case is T rows through L layers of F features and hidden size H, top_k 50, threshold 1, float32 weights and rows unless it
says otherwise. Rows are `planted` (sparse combinations of encoder directions, about 30 active features a row), `gaussian`
(dense: thousands active) or `real` (a language model's MLP inputs through the transcoders in examples/transcoders).
For each contender of a case:

    ms       wall time of a call after a warm-up call: min, median and max over rounds in which the contenders take turns.
             Weights exceed the caches, so layers are read from memory in each call, as in a model.
    growth   what the first call adds to the process's resident memory at its peak, its result included; for ours also what
             a new encoder keeps, so that its workspace and per-feature vectors are in it.

Exit status 1 when a result differs from the references: float32 for all rows of up to 4096, float64 for a sample.
"""

import argparse
import ctypes
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import statistics
import time
from pathlib import Path

import torch
from baselines import circuit_tracer_step, linear_topk, over_layers, product, reference_pipeline, sparsify_step
from inputs import PLANTED, THRESHOLD, Case, make_inputs, random_weights, real_case
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights

HERE = Path(__file__).resolve().parent
TOP_K = 50
ONCE_S = 4  # a baseline slower than this is timed once
LIMIT_S = 20  # a bfloat16 baseline predicted to be slower than this is left out
CHECKED_FP32, CHECKED_FP64 = 4096, 16  # rows a case compared with the references
OURS, OURS_BF16 = "sparse_transcoder", "sparse_transcoder, bfloat16 weights"
FLAGS = "avx2 fma f16c avx512f avx512_vnni avx512_bf16 avx_vnni amx_int8 amx_bf16".split()


CASES = [  # those that share weights stand together
    Case(256, 2048, 16384),
    Case(256, 2048, 16384, kind="gaussian"),
    Case(2048, 2048, 16384),
    *(Case(T, 2048, 16384, layers=23) for T in (1, 4, 8, 64)),
    Case(1, 5120, 40960),
    Case(256, 5120, 40960),
    Case(4096, 512, 32768),
    Case(32768, 512, 32768),
]
QUICK = [Case(64, 512, 4096), Case(64, 512, 4096, kind="gaussian"), Case(1, 512, 4096, layers=4), Case(2048, 128, 4096)]


# Equality


def check(case, layer, result, x, W, b, dtype, tolerance):
    """The result of rows x against the dense computation in dtype, values by tolerance and sets by the k-th value."""
    for first in range(0, x.shape[0], 256):
        part = slice(first, first + 256)
        pre = torch.empty(x[part].shape[0], W.shape[0], dtype=dtype)
        for f in range(0, W.shape[0], 8192):  # a slice of the weights at a time is widened
            pre[:, f : f + 8192] = x[part].to(dtype) @ W[f : f + 8192].to(dtype).T + b[f : f + 8192].to(dtype)
        values, indices, sparsity = (result[key][part] for key in ("activations", "indices", "sparsity"))
        best = pre.topk(values.shape[1], dim=-1).values
        own = pre.gather(-1, indices)
        slack = tolerance * best.abs().clamp(min=1)
        kept = values > 0
        wrong = torch.where(kept, (values - best).abs() > slack, best >= THRESHOLD + slack).any(-1)
        wrong |= torch.where(kept, (values - own).abs() > slack, own >= THRESHOLD + slack).any(-1)
        wrong |= (kept & (values < THRESHOLD)).any(-1)
        wrong |= (indices.sort(-1).values.diff(dim=-1) == 0).any(-1)
        count = (sparsity.double() * W.shape[0]).round()
        wrong |= count < (pre >= THRESHOLD + tolerance).sum(-1)
        wrong |= count > (pre >= THRESHOLD - tolerance).sum(-1)
        if wrong.any():
            row = first + wrong.nonzero()[0].item()
            place = f"{case.name}: layer {layer}, row {row}"
            raise SystemExit(f"{place}: the result differs from {dtype}, as in {wrong.sum()} rows of {len(wrong)}")


def spread(rows, count):
    """Up to count row numbers, evenly spaced."""
    return torch.linspace(0, rows - 1, min(rows, count)).long()


def check_all(case, encoded, rows, layers):
    for layer, (x, (W, b)) in enumerate(zip(rows, layers, strict=True)):
        sample = max(1, CHECKED_FP64 // case.layers)
        for dtype, tolerance, count in ((torch.float32, 1e-4, CHECKED_FP32), (torch.float64, 1e-5, sample)):
            some = spread(case.T, count)
            result = {key: encoded[layer][key][some] for key in ("activations", "indices", "sparsity")}
            check(case, layer, result, x[some], W, b, dtype, tolerance)


# Measurement


def resident(key):
    """Bytes of this process: VmRSS now, or VmHWM, the most since the last reset."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(key))


def first_call(call, kept=False):
    """(result, seconds, growth of resident memory: at its peak, or kept when the call is over; None where nothing tells)."""
    trim = ctypes.CDLL(None).malloc_trim  # freed memory goes back, or it would hide the call's own
    trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    except OSError:
        before = None
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    if before is None:
        return result, seconds, None
    if kept:
        trim(0)
    return result, seconds, max(0, resident("VmRSS" if kept else "VmHWM") - before)


def tensor_bytes(result):
    if isinstance(result, torch.Tensor):
        return result.nbytes if result.layout == torch.strided else 0
    items = result.values() if isinstance(result, dict) else result if isinstance(result, list | tuple) else ()
    return sum(tensor_bytes(item) for item in items)


def time_rounds(calls, seconds):
    """{name: samples in ms}; for slow baselines one sample, the first call's. Contended rounds are repeated."""
    slow = {name for name in calls if name != OURS and seconds[name] > ONCE_S}
    samples = {name: [seconds[name] * 1e3] if name in slow else [] for name in calls}
    turn = [name for name in calls if name not in slow]
    rounds = min(15, max(3, math.ceil(10 / sum(seconds[name] for name in turn))))
    for done in range(2 * rounds):
        if done >= rounds and all(max(samples[name]) < 1.3 * min(samples[name]) for name in turn):
            break
        turn = turn[1:] + turn[:1]
        for name in turn:
            start = time.perf_counter()
            calls[name]()
            samples[name].append((time.perf_counter() - start) * 1e3)
    return samples


def contenders(case, rows, layers, machine, bf16):
    """Our encoder and what building it took, {name: call}, ours first, and {name left out: reason}."""

    def encoder_of(dtype):
        coders = {i: TranscoderWeights(W.to(dtype), b, layer=i) for i, (W, b) in enumerate(layers)}
        encoder, _, growth = first_call(lambda: SparseTranscoderEncoder(coders, TOP_K, THRESHOLD), kept=True)
        hidden = dict(enumerate(rows))
        if case.layers > 1:
            return encoder, growth, lambda: encoder.encode_all_layers(hidden)
        return encoder, growth, lambda: {0: encoder.encode_layer(0, rows[0])}

    encoder, growth, ours = encoder_of(torch.float32)
    calls, left_out = {OURS: ours}, {}
    dense = functools.partial(over_layers, rows=rows, layers=layers, k=TOP_K, threshold=THRESHOLD)
    calls["reference fp32"], calls["product fp32"] = dense(reference_pipeline), dense(product)
    if case.T <= 8:
        calls[OURS_BF16] = encoder_of(torch.bfloat16)[2]
    predicted = case.flop / machine["product_bf16_gflops"] / 1e9 if bf16 else 0
    names = {"reference bf16": reference_pipeline, "linear+topk bf16": linear_topk, "product bf16": product}
    if bf16 and predicted < LIMIT_S:
        half = {"rows": [x.bfloat16() for x in rows], "layers": [(W.bfloat16(), b.bfloat16()) for W, b in layers]}
        calls |= {name: dense(step, **half) for name, step in names.items()}
    else:
        left_out |= dict.fromkeys(names, f"predicted {predicted:.0f} s a call" if bf16 else "--no-bf16")
    peers = {"sparsify": sparsify_step(), "circuit-tracer": circuit_tracer_step(layers, THRESHOLD)}
    for name, step in peers.items():
        if step is None:
            left_out[name] = "not installed"
        elif name == "circuit-tracer" and (case.kind == "gaussian" or case.T * PLANTED * case.H * 4 > 1 << 30):
            left_out[name] = "would copy more than 1 GiB of encoder rows"
        else:
            calls[name] = dense(step)
    return encoder, growth, calls, left_out


def run_case(case, rows, layers, machine, bf16):
    """Check and time one case: a record for the JSON file."""
    encoder, building, calls, left_out = contenders(case, rows, layers, machine, bf16)
    seconds, measured = {}, {}
    for name, call in calls.items():
        result, seconds[name], growth = first_call(call)
        measured[name] = {"growth_bytes": growth, "result_bytes": tensor_bytes(result)}
        if name == OURS and growth is not None:
            measured[name]["growth_bytes"] += building
        if name in (OURS, OURS_BF16):
            check_all(case, result, rows, layers)
            active = statistics.mean(result[i]["sparsity"].mean().item() * case.F for i in result)
        del result
    for name, samples in time_rounds(calls, seconds).items():
        ms = {"min": min(samples), "median": statistics.median(samples), "max": max(samples)}
        measured[name] |= {"ms": {key: round(value, 3) for key, value in ms.items()}, "samples": len(samples)}
    ours = measured[OURS]["ms"]["median"] / 1e3
    rate = case.flop / ours / 1e9
    record = {
        "case": case.name,
        **dataclasses.asdict(case),
        "top_k": TOP_K,
        "threshold": THRESHOLD,
        "active_per_row": round(active, 1),
        "checked_rows_fp32": min(case.T, CHECKED_FP32),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gflops": round(rate, 1),
        "share_of_product_fp32": round(rate / machine["product_fp32_gflops"], 3),
        "workspace_bytes": encoder.workspace_bytes,
    }
    if case.T <= 8:
        record["weight_gb_per_s"] = round(sum(W.nbytes for W, _ in layers) / ours / 1e9, 1)
    return record | {"contenders": measured, "left_out": left_out}


def best_rate(call, work, seconds=2.0):
    """The best of a few calls, in units of work a second."""
    call()
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return round(work / best / 1e9, 1)


def describe_machine(bf16):
    """What the numbers stand on: the processor, the versions, and torch's own rates."""
    lines = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    info = {key.strip(): value.strip() for key, value in lines}
    machine = {
        "cpu": " ".join(f"{key} {info[key]}" for key in ("model name", "cpu family", "model") if key in info),
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in info.get("flags", "").split()],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for name in ("sparse_transcoder", "eai-sparsify", "circuit-tracer"):
        if importlib.util.find_spec(name.replace("eai-", "").replace("-", "_")):
            machine[name] = importlib.metadata.version(name)
    a, w, big = torch.randn(1024, 2048), torch.randn(4096, 2048), torch.ones(1 << 27)
    machine["product_fp32_gflops"] = best_rate(lambda: torch.nn.functional.linear(a, w), 2 * 1024 * 2048 * 4096)
    machine["read_gb_per_s"] = best_rate(big.sum, big.nbytes)
    if bf16:
        a, w = a[:256].bfloat16(), w.bfloat16()
        machine["product_bf16_gflops"] = best_rate(lambda: torch.nn.functional.linear(a, w), 2 * 256 * 2048 * 4096)
    return machine


# Report

RATIOS = {
    "reference fp32": "ref fp32",
    "reference bf16": "ref bf16",
    "linear+topk bf16": "lin+topk",
    "product fp32": "product",
    "product bf16": "prd bf16",
    "sparsify": "sparsify",
    "circuit-tracer": "circuit-t",
}
TITLES = ["case", "ms", "ms bf16 W", *RATIOS.values(), "GFLOP/s", "share", "GB/s", "extra MiB", "ref extra", "work MiB"]


def table_line(record):
    """Ratios are the other's median over ours: above 1 we are faster. Extra: growth of the first call without its result."""
    of = record["contenders"]
    ours = of[OURS]["ms"]["median"]

    def extra(name):
        growth = of[name]["growth_bytes"]
        return "" if growth is None else f"{max(0, growth - of[name]['result_bytes']) / 2**20:.1f}"

    cells = [record["case"], f"{ours:.1f}", f"{of[OURS_BF16]['ms']['median']:.1f}" if OURS_BF16 in of else ""]
    cells += [f"{of[name]['ms']['median'] / ours:.2f}" if name in of else "" for name in RATIOS]
    cells += [f"{record['gflops']:.0f}", f"{record['share_of_product_fp32']:.2f}"]
    cells += [str(record.get("weight_gb_per_s", ""))]
    return [*cells, extra(OURS), extra("reference fp32"), f"{record['workspace_bytes'] / 2**20:.1f}"]


def print_line(cells):
    widths = [29, *(max(7, len(title)) for title in TITLES[1:])]
    print(cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:]), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes; writes no file unless --out is given")
    parser.add_argument("--only", default="", help="cases whose names contain one of these, separated by commas")
    parser.add_argument("--no-bf16", action="store_true", help="leave the bfloat16 baselines out")
    parser.add_argument("--out", type=Path, help="results file; cases that were not run keep their records in it")
    options = parser.parse_args()
    out = options.out or (None if options.quick else HERE / "results" / "cpu.json")

    machine = describe_machine(not options.no_bf16)
    print(", ".join(f"{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in machine.items()))
    print_line(TITLES)
    wanted = options.only.split(",")
    records = {}

    def run(case, rows, layers):
        records[case.name] = run_case(case, rows, layers, machine, not options.no_bf16)
        print_line(table_line(records[case.name]))

    with torch.inference_mode():
        for case in QUICK if options.quick else CASES:
            if any(part in case.name for part in wanted):
                run(case, *make_inputs(case))
        random_weights.cache_clear()
        if any(part in "real" for part in wanted):
            made = real_case(256 if options.quick else 2048)
            if isinstance(made, str):
                print(f"real: skipped: {made}")
            else:
                run(*made)
    if out:
        before = json.loads(out.read_text()) if options.only and out.exists() else {"machine": {}, "cases": []}
        same = all(
            before["machine"].get(key) == machine[key] for key in ("cpu", "threads", "torch", "sparse_transcoder")
        )
        kept = before["cases"] if same else []
        merged = {record["case"]: record for record in kept} | records
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine, "cases": list(merged.values())}, indent=1) + "\n")
        print(f"written: {out}")
    print(f"{len(records)} cases equal to the references")


if __name__ == "__main__":
    main()
