"""Time the encoder against dense pipelines: check equality, time in alternating rounds, compare.

    python benchmarks/bench.py [--quick] [--only TEXT[,TEXT]] [--seconds S] [--out FILE]

A case is T rows through each of L layers of hidden size H and F features: top_k 50 (real: 32),
threshold 1, float32 weights and rows unless it says bf16. inputs.py says what `planted`, `hard`,
`gaussian`, `dense` and `real` rows are. bfloat16 baselines get the same numbers in bfloat16. For
each contender of a case:

    ms       wall time of a call: min, median and max. Contenders take turns, round after round. A
             turn is one call, or many for a short one, after a call that is not timed. Rounds in
             which other processes took more than 3 % of the machine are repeated, at most as many
             again, and the quietest are kept. A baseline slower than 2 s is timed once. Weights
             exceed the caches, so that layers are read from memory in each call, as in a model.
    extra    what the first call adds to the process's resident memory at its peak, without its
             result; for ours also what a new encoder keeps beside its screening copies.

The exit status is 1 when a result differs from the references: float32 for all rows of up to 4096,
float64 for a sample.
"""

import argparse
import atexit
import collections
import contextlib
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
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch
from baselines import (
    circuit_tracer_step,
    linear_topk,
    over_layers,
    product,
    reference_pipeline,
    sparsify_step,
)
from inputs import ACTIVE, KINDS, THRESHOLD, Case, made, make_inputs, real_cases
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights, cpu_instruction_set

HERE = Path(__file__).resolve().parent
BURST_S = 0.1  # a turn
ONCE_S = 2  # a baseline slower than this is timed once
LIMIT_S = 20  # one predicted to be slower than this is left out
QUIET = 0.03  # share of the machine that others may take in a round
CHECKED_FP32, CHECKED_FP64 = 4096, 16  # rows a case compared with the references
OURS = "sparse_transcoder"
SCREENS = ("int8", "int16", "off")
PHASES = ("prepare", "screen", "rescreen", "compute", "finish")
PEAK_ROUNDS = 11  # about a second each
PEAK_FLAGS = "avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512vnni"
FLAGS = "avx2 fma f16c avx_vnni avx512f avx512_vnni avx512_bf16 amx_int8 amx_bf16".split()
MIB = 1 << 20

CASES = [  # those that share weights stand together
    *(Case(256, 2048, 16384, kind=kind, screens=True) for kind in KINDS if kind != "real"),
    Case(256, 2048, 16384, dtype="bfloat16"),
    Case(2048, 2048, 16384),
    Case(1024, 2048, 16384, brief=True),
    *(Case(T, 2048, 16384, layers=23, brief=T == 16) for T in (1, 4, 8, 16, 64)),
    Case(1, 2048, 16384, layers=23, dtype="bfloat16"),
    Case(1, 5120, 40960, screens=True),
    *(Case(T, 5120, 40960, brief=True) for T in (4, 16, 64)),
    Case(256, 5120, 40960),
    *(Case(T, 576, 4608, layers=30, brief=True) for T in (1, 4, 16, 64, 256, 1024, 2048)),
    Case(4096, 512, 32768),
    Case(32768, 512, 32768),
]
QUICK = [
    *(Case(64, 512, 4096, kind=kind, screens=True) for kind in KINDS if kind != "real"),
    Case(64, 512, 4096, dtype="bfloat16"),
    Case(1, 512, 4096, layers=4),
    Case(2048, 128, 4096, brief=True),
]


# Equality


def check(case, layer, result, x, W, b, dtype, tolerance):
    """The result of rows x against the dense one in dtype: values by tolerance, sets by k-th."""
    for first in range(0, x.shape[0], 256):
        part = slice(first, first + 256)
        pre = torch.empty(x[part].shape[0], W.shape[0], dtype=dtype, device=x.device)
        for f in range(0, W.shape[0], 8192):  # a slice of the weights at a time is widened
            pre[:, f : f + 8192] = x[part].to(dtype) @ W[f : f + 8192].to(dtype).T + b[
                f : f + 8192
            ].to(dtype)
        values, indices, sparsity = (
            result[key][part] for key in ("activations", "indices", "sparsity")
        )
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
            rows = f"{wrong.sum()} rows of {len(wrong)}"
            raise SystemExit(f"{place}: the result differs from {dtype}, as in {rows}")


def spread(rows, count):
    """Up to count row numbers, evenly spaced."""
    return torch.linspace(0, rows - 1, min(rows, count)).long()


def check_all(case, encoded, rows, layers):
    for layer, (x, (W, b)) in enumerate(zip(rows, layers, strict=True)):
        sample = max(1, CHECKED_FP64 // case.layers)
        for dtype, tolerance, count in (
            (torch.float32, 1e-4, CHECKED_FP32),
            (torch.float64, 1e-5, sample),
        ):
            some = spread(case.T, count)
            result = {
                key: encoded[layer][key][some] for key in ("activations", "indices", "sparsity")
            }
            check(case, layer, result, x[some], W, b, dtype, tolerance)


def check_same(case, name, result, ours):
    for layer in ours:
        for key in ("activations", "indices", "sparsity"):
            if not torch.equal(result[layer][key], ours[layer][key]):
                where = f"{case.name}: layer {layer}"
                raise SystemExit(f"{where}: {key} of {name} are not bit for bit those of {OURS}")


# Memory


def resident(key):
    """Bytes of this process: VmRSS now, or VmHWM, the most since the last reset."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(key))


def first_call(call, kept=False):
    """(result, seconds, growth of resident memory at its peak or kept after the call, or None)."""
    trim = ctypes.CDLL(None).malloc_trim  # Freed memory goes back, or it would hide the call's.
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
    items = (
        result.values()
        if isinstance(result, dict)
        else result
        if isinstance(result, list | tuple)
        else ()
    )
    return sum(tensor_bytes(item) for item in items)


# Time


def others_seconds():
    """Processor time of all other processes so far, with stolen time; 0 where nothing tells."""
    try:
        fields = [
            int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        ]
    except OSError:
        return 0.0
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK") - time.process_time()


CPUS = sorted(os.sched_getaffinity(0))


def place_threads(mine, others):
    for thread in map(int, os.listdir("/proc/self/task")):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread, mine if thread == threading.get_native_id() else others)


@contextlib.contextmanager
def spread_threads():
    """Gives this thread one processor and the process's other threads the rest.

    The kernels of some virtual machines pack threads onto few processors: two that compute then
    take turns on one, while another is idle.
    """
    place_threads(CPUS[:1], CPUS[1:] or CPUS)
    try:
        yield
    finally:
        place_threads(CPUS, CPUS)


def turn(call, expected):
    """Samples in ms. The call before a burst of short ones warms caches and threads up."""
    if expected < BURST_S:
        call()
    samples, until = [], time.perf_counter() + BURST_S
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        samples.append((now - start) * 1e3)
        if now >= until:
            return samples


def time_rounds(calls, seconds, budget):
    """({name: samples in ms}, the largest share that others took in a round that counts)."""
    once = {name for name in calls if name != OURS and seconds[name] > ONCE_S}
    turns = [name for name in calls if name not in once]
    rounds = min(
        9, max(3, math.ceil(budget / sum(max(2 * BURST_S, seconds[name]) for name in turns)))
    )
    done = []
    while len(done) < rounds or (
        len(done) < 2 * rounds and sorted(share for share, _ in done)[rounds - 1] > QUIET
    ):
        turns = turns[1:] + turns[:1]
        start, others = time.perf_counter(), others_seconds()
        with spread_threads():
            samples = {name: turn(calls[name], seconds[name]) for name in turns}
        elapsed = time.perf_counter() - start
        done.append((max(0.0, others_seconds() - others) / elapsed / os.cpu_count(), samples))
    kept = sorted(done, key=lambda one: one[0])[:rounds]
    merged = {name: [seconds[name] * 1e3] for name in once}
    return merged | {
        name: [ms for _, samples in kept for ms in samples[name]] for name in turns
    }, kept[-1][0]


# Cases


def encode(encoder, rows):
    return (
        encoder.encode_all_layers(dict(enumerate(rows)))
        if len(rows) > 1
        else {0: encoder.encode_layer(0, rows[0])}
    )


def contenders(case, rows, layers, machine):
    """Our encoder, what building it took, {name: call}, ours first, and {name left out: reason}."""
    coders = {i: TranscoderWeights(W, b, layer=i) for i, (W, b) in enumerate(layers)}
    make = functools.partial(SparseTranscoderEncoder, coders, case.top_k, THRESHOLD)
    encoder, seconds, growth = first_call(make, kept=True)
    calls, left_out = {OURS: functools.partial(encode, encoder, rows)}, {}
    if case.screens:
        for screening in SCREENS:
            calls[f"screening {screening}"] = functools.partial(
                encode, make(screening=screening), rows
            )
    dense = functools.partial(
        over_layers, rows=rows, layers=layers, k=case.top_k, threshold=THRESHOLD
    )
    wide = case.dtype == "float32"
    half = dense
    if wide:
        calls["reference fp32"] = dense(reference_pipeline)
        if not case.brief:
            calls["product fp32"] = dense(product)
    names = {
        "reference bf16": reference_pipeline,
        "linear+topk bf16": linear_topk,
        "product bf16": product,
    }
    if case.brief:
        names = {"linear+topk bf16": linear_topk}
    predicted = case.flop / machine["product_bf16_gflops"] / 1e9
    if predicted > LIMIT_S:
        left_out |= dict.fromkeys(names, f"predicted {predicted:.0f} s per call")
    else:
        if wide:
            cast = {
                "rows": [x.bfloat16() for x in rows],
                "layers": [(W.bfloat16(), b.bfloat16()) for W, b in layers],
            }
            half = functools.partial(dense, **cast)
        calls |= {name: half(step) for name, step in names.items()}
    if wide and not case.brief:
        peers = {
            "sparsify": sparsify_step(),
            "circuit-tracer": circuit_tracer_step(layers, THRESHOLD),
        }
        for name, step in peers.items():
            if step is None:
                left_out[name] = "not installed"
            elif name == "circuit-tracer" and (
                case.kind == "dense" or case.T * ACTIVE * case.H * 4 > 1 << 30
            ):
                left_out[name] = "would copy more than 1 GiB of encoder rows"
            else:
                calls[name] = dense(step)
    return encoder, seconds, growth, calls, left_out


def explain(encoder, rows):
    """Encoder.explain, summed over layers."""
    total = collections.Counter()
    for layer, x in enumerate(rows):
        explained = encoder.explain(layer, x)
        del explained["instruction_set"]
        total.update(explained)
    return {key: round(value, 3) for key, value in total.items()} | {
        "features": total["features"] // len(rows)
    }


def explain_in_turns(encoder, rows, seconds, threads, rounds):
    """[(Encoder.explain of a turn's median call, peaks() right before)]: the clock drifts."""
    turns = []
    for _ in range(rounds):
        most, calls = peaks(threads), []
        with spread_threads():
            if seconds < BURST_S:
                explain(encoder, rows)
            until = time.perf_counter() + BURST_S
            while time.perf_counter() < until:
                calls.append(explain(encoder, rows))
        turns.append((sorted(calls, key=phases_ms)[(len(calls) - 1) // 2], most))
    return turns


def phases_ms(explained):
    return sum(explained[f"{phase}_ms"] for phase in PHASES)


def medians(records):
    """Of what all records have."""
    keys = [key for key in records[0] if all(key in record for record in records)]
    return {key: round(statistics.median(r[key] for r in records), 3) for key in keys}


def shares_of_peak(case, explained, most, threads):
    """{phase: its multiplications over the most that the processor does in the phase's time}.

    `screen_loop`: over what the screen does on L1.
    """
    work = {
        "screen": ("int8_peak_gops", "screen", explained["pairs_int8"]),
        "screen_loop": ("int8_tile_gops", "screen", explained["pairs_int8"]),
        "rescreen": ("int16_peak_gops", "rescreen", explained["survivors"]),
        "compute": ("float64_peak_gflops", "compute", explained["computed"]),
    }
    if explained["pairs_int16"] + explained["pairs_float32"]:
        del work["screen"], work["screen_loop"]  # other instructions had a part in it
    if case.dtype != "float32":
        del work["rescreen"]  # there is none
    return {
        name: 2 * case.H * pairs / explained[f"{phase}_ms"] * threads / 1e6 / most[peak]
        for name, (peak, phase, pairs) in work.items()
        if pairs > 0 and explained[f"{phase}_ms"] > 0
    }


def run_case(case, machine, budget):
    """Check and time one case: a record for the JSON file."""
    rows, layers = make_inputs(case)
    encoder, build_s, kept, calls, left_out = contenders(case, rows, layers, machine)
    seconds, measured = {}, {}
    ours = None
    for name, call in calls.items():
        result, seconds[name], growth = first_call(call)
        extra = None if growth is None else max(0, growth - tensor_bytes(result))
        if name == OURS:
            check_all(case, result, rows, layers)
            ours = result
            active = statistics.mean(ours[i]["sparsity"].mean().item() * case.F for i in ours)
            if extra is not None:
                extra += max(0, kept - encoder.memory()["screening_bytes"])
        elif name.startswith("screening "):
            check_same(case, name, result, ours)
            extra = None
        measured[name] = {"extra_bytes": extra}
        del result
    timed, others = time_rounds(calls, seconds, budget)
    for name, samples in timed.items():
        ms = {"min": min(samples), "median": statistics.median(samples), "max": max(samples)}
        measured[name] |= {
            "ms": {key: round(value, 3) for key, value in ms.items()},
            "samples": len(samples),
        }
    ours_s = measured[OURS]["ms"]["median"] / 1e3
    rounds = 3 if budget < 2 else PEAK_ROUNDS
    turns = explain_in_turns(encoder, rows, ours_s, machine["threads"], rounds)
    explained = sorted((call for call, _ in turns), key=phases_ms)[len(turns) // 2]
    record = {
        "case": case.name,
        **dataclasses.asdict(case),
        "threshold": THRESHOLD,
        "active_per_row": round(active, 1),
        "checked_rows_fp32": min(case.T, CHECKED_FP32),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "others_share": round(others, 3),
        "gflops": round(case.flop / ours_s / 1e9, 1),
        "build_s": round(build_s, 3),
        "memory": encoder.memory(),
        "explain": explained,
    }
    for precision in ("fp32", "bf16"):
        record[f"share_of_product_{precision}"] = round(
            record["gflops"] / machine[f"product_{precision}_gflops"], 3
        )
    if case.T <= 8:
        record["int8_gb_per_s"] = round(case.layers * case.F * case.H / ours_s / 1e9, 1)
    if explained["pairs_int8"] and not explained["pairs_int16"] + explained["pairs_float32"]:
        seconds = explained["screen_ms"] / machine["threads"] / 1e3
        record["int8_gops"] = round(2 * case.H * explained["pairs_int8"] / seconds / 1e9)
    if peak_program() is not None:
        record["peaks"] = medians([most for _, most in turns])
        record["share_of_peak"] = medians(
            [shares_of_peak(case, call, most, machine["threads"]) for call, most in turns]
        )
    return record | {"contenders": measured, "left_out": left_out}


# The machine


def best_rate(call, work, seconds=1.5):
    """The best of a few calls, in units of work a second."""
    call()
    best, until = math.inf, time.perf_counter() + seconds
    with spread_threads():
        while time.perf_counter() < until:
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
    return round(work / best / 1e9, 1)


def describe_machine():
    """What the numbers stand on: the processor, the versions, and torch's own rates."""
    lines = [
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line
    ]
    info = {key.strip(): value.strip() for key, value in lines}
    parts = [
        f"{key.removeprefix('cpu ')} {info[key]}" for key in ("cpu family", "model") if key in info
    ]
    machine = {
        "cpu": f"{info.get('model name', 'unknown')} ({', '.join(parts)})",
        "cores": os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in info.get("flags", "").split()],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for name in ("sparse_transcoder", "eai-sparsify", "circuit-tracer"):
        if importlib.util.find_spec(name.replace("eai-", "").replace("-", "_")):
            machine[name] = importlib.metadata.version(name)
    big = torch.ones(1 << 27)
    machine["read_gb_per_s"] = best_rate(big.sum, big.nbytes)
    x, W = torch.randn(1024, 2048), torch.randn(8192, 2048)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, w = x.to(dtype), W.to(dtype)
        rate = best_rate(
            lambda a=a, w=w: torch.nn.functional.linear(a, w), 2 * a.numel() * w.shape[0]
        )
        machine[f"product_{precision}_gflops"] = rate
    return machine | peaks(machine["threads"])


@functools.cache
def peak_program():
    """peak.cpp's program, in a folder that lasts as long as this process, or None.

    None unless AVX-512 VNNI encodes, whose instructions it measures.
    """
    if cpu_instruction_set() != "avx512vnni":
        return None
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    program = Path(folder.name) / "peak"
    flags = [f"-m{name}" for name in PEAK_FLAGS.split()]
    source = [HERE / "peak.cpp", f"-I{HERE.parent / 'csrc'}"]
    command = ["g++", "-std=c++20", "-O3", "-w", "-pthread", *flags, *source, "-o", program]
    subprocess.run(command, check=True)
    return program


def peaks(threads):
    """What the processor's multiplications do at most, of peak.cpp; {} where it cannot be told."""
    if peak_program() is None:
        return {}
    done = subprocess.run([peak_program(), str(threads)], check=True, capture_output=True)
    return json.loads(done.stdout)


# Report

RATIOS = {
    "reference fp32": "ref fp32",
    "product fp32": "prd fp32",
    "reference bf16": "ref bf16",
    "linear+topk bf16": "lin+topk",
    "product bf16": "prd bf16",
    "sparsify": "sparsify",
    "circuit-tracer": "circuit-t",
}
TITLES = ["case", "ms", *RATIOS.values(), "GFLOP/s", "GB/s", "extra MiB", "ref extra", "others"]


def print_line(cells):
    widths = [44, *(max(7, len(title)) for title in TITLES[1:])]
    print(cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:]), flush=True)


def print_record(record):
    """Ratios are the other's median over ours: above 1 we are faster."""
    of = record["contenders"]
    ours = of[OURS]["ms"]["median"]

    def extra(name):
        return (
            ""
            if of.get(name, {}).get("extra_bytes") is None
            else f"{of[name]['extra_bytes'] / MIB:.1f}"
        )

    ratios = [f"{of[name]['ms']['median'] / ours:.2f}" if name in of else "" for name in RATIOS]
    rates = [f"{record['gflops']:.0f}", str(record.get("int8_gb_per_s", ""))]
    memory = [extra(OURS), extra("reference fp32")]
    print_line(
        [record["case"], f"{ours:.2f}", *ratios, *rates, *memory, f"{record['others_share']:.0%}"]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--quick", action="store_true", help="small shapes; writes no file unless --out is given"
    )
    parser.add_argument(
        "--only",
        default="",
        help="cases whose names contain one of these texts, separated by commas",
    )
    parser.add_argument(
        "--seconds", type=float, default=6, help="about how long a case is timed, beside its phases"
    )
    parser.add_argument(
        "--out", type=Path, help="results file; cases that were not run keep their records in it"
    )
    options = parser.parse_args()
    out = options.out or (None if options.quick else HERE / "results" / "cpu.json")

    start = time.perf_counter()
    machine = describe_machine()
    print(
        ", ".join(
            f"{key} {' '.join(value) if isinstance(value, list) else value}"
            for key, value in machine.items()
        )
    )
    real = real_cases()
    if isinstance(real, str):
        print(f"real: skipped: {real}")
        real = []
    cases = QUICK + real[:1] if options.quick else CASES + real
    print_line(TITLES)
    records = {}
    with torch.inference_mode():
        for case in cases:
            if any(part.strip() in case.name for part in options.only.split(",")):
                if case.kind == "real":
                    made.clear()
                records[case.name] = run_case(
                    case, machine, 1 if options.quick else options.seconds
                )
                print_record(records[case.name])
    if out:
        before = (
            json.loads(out.read_text())
            if options.only and out.exists()
            else {"machine": {}, "cases": []}
        )
        same = all(
            before["machine"].get(key) == machine[key]
            for key in ("cpu", "threads", "torch", "sparse_transcoder")
        )
        kept = {record["case"]: record for record in before["cases"]} if same else {}
        merged = [(kept | records)[case.name] for case in cases if case.name in kept | records]
        for record in merged:
            for name, rate in record.get("peaks", {}).items():
                machine[name] = max(machine.get(name, 0), rate)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"machine": machine, "cases": merged}, indent=1) + "\n")
        print(f"written: {out}")
    print(f"{len(records)} cases equal to the references, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
