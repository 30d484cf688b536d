"""Time the encoder on a CUDA device beside dense pipelines, after checking that results are equal.

    python benchmarks/gpu.py [--out FILE] [--seconds S] [--only TEXT[,TEXT]]
    python benchmarks/gpu.py --device cpu --shrink 64   # tries the script; the numbers mean nothing

inputs.py says what `planted` and `gaussian` rows are. Weights and rows are bfloat16 unless a case
says float32. Weights exceed the L2 cache in every case: a call reads many layers, or calls take
turns among enough of them. For each contender:

    ms       device time of a call, from events around each of many calls enqueued in a row. Where
             the host is slower than the device it is the host's. Each contender takes turns with
             ours, and `ours` beside it is what ours took in those turns.
    host_ms  time until a call returns, nothing pending before it
    extra    the most that a call holds beyond what is there before it and its result; `memory`
             says what ours planned
    kernels  of ours: microseconds and launches per call of each kernel, as torch's profiler sees
             them in calls of their own

A roof is the time that the card's own bfloat16 product, or its own copy of as many bytes, takes for
what a case cannot avoid: the product; and reading rows, and weights as bfloat16, once and writing
the result. The file is written after every case. Exit status 1 when a case failed or a result
differs from the float32 and float64 references.
"""

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import math
import re
import signal
import statistics
import time
import traceback
from pathlib import Path

import torch
from baselines import flashinfer_step, linear_topk, over_layers, product, reference_pipeline
from bench import HERE, OURS, check_all, check_same, tensor_bytes
from inputs import THRESHOLD, Case, made, make_inputs
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights
from torch.profiler import ProfilerActivity, profile

MATMUL = torch.backends.cuda.matmul
COLD_BYTES = 1 << 30  # of weights that calls take turns in
TURN_S = 0.02
ROUNDS = 5
CASE_S = 4  # about how long a case is timed
BRIEF_S = 0.8  # and a brief one
COMPILE_S = 40  # for one contender
RESERVE_S = 15  # with less time than this no case is begun
PREPARE_S = 60
PREPARE = 3  # calls before the first that counts: the second of a shape may be captured


@dataclasses.dataclass
class Job:
    case: Case
    compiled: bool = False  # also the compiled reference
    streamed: bool = False  # weights on the host
    chunk_size: int | None = None

    @property
    def name(self):
        chunk = f" chunk {self.chunk_size}" if self.chunk_size else ""
        return self.case.name + (" streamed" if self.streamed else "") + chunk


def bf16(*shape, **options):
    return Case(*shape, dtype="bfloat16", **options)


# Those that share weights stand together, and the first matter most. A brief case has the bare
# product beside it.
JOBS = [
    *(Job(bf16(T, 5120, 40960), compiled=T in (1, 256)) for T in (1, 256, 2048, 8)),
    *(Job(bf16(T, 5120, 40960, brief=True)) for T in (2, 4, 16, 32, 64)),
    *(Job(bf16(2048, 5120, 40960, brief=True), chunk_size=chunk) for chunk in (512, 1024, 2048)),
    *(Job(bf16(T, 5120, 40960, kind="gaussian")) for T in (1, 256)),
    *(Job(Case(T, 5120, 40960)) for T in (1, 256)),
    *(Job(bf16(T, 5120, 40960, layers=4), streamed=True) for T in (1, 256)),
    *(Job(bf16(T, 2048, 16384, layers=23)) for T in (1, 64)),
    *(Job(bf16(T, 2048, 131072)) for T in (1, 256, 2048)),
    *(Job(bf16(T, 5120, 163840)) for T in (1, 256, 2048, 8)),
]


class Cuda:
    """What the CPU, in a dry run, has another word for."""

    def __init__(self, device):
        self.device = device

    def sync(self):
        torch.cuda.synchronize(self.device)

    def spans(self, calls):
        """Device ms of each call; they are enqueued one after the other."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
        self.sync()
        return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]

    def extra(self, call):
        """Bytes at the call's peak beyond what was there and its result."""
        self.sync()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_stats(self.device)["requested_bytes.all.current"]
        result = call()
        self.sync()
        peak = torch.cuda.memory_stats(self.device)["requested_bytes.all.peak"]
        return max(0, peak - before - tensor_bytes(result))

    def kernels(self, calls):
        """{kernel: [microseconds, launches] per call}, the longest first."""
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
            for call in calls:
                call()
            self.sync()
        times = {}
        for event in seen.key_averages():
            name = kernel_name(event.key)
            total, count = times.get(name, (0, 0))
            if event.device_time_total > 0:
                times[name] = (total + event.device_time_total, count + event.count)
        longest = sorted(times, key=lambda name: -times[name][0])
        return {name: [round(value / len(calls), 2) for value in times[name]] for name in longest}

    def free(self):
        torch.cuda.empty_cache()

    def pinned(self, count):
        return torch.zeros(count, dtype=torch.uint8, pin_memory=True)

    def describe(self):
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "card": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
        }


class Cpu(Cuda):
    def sync(self):
        pass

    def spans(self, calls):
        return [1e3 * seconds(call) for call in calls]

    def extra(self, call):
        call()

    def kernels(self, calls):
        return {}

    def free(self):
        pass

    def pinned(self, count):
        return torch.zeros(count, dtype=torch.uint8)

    def describe(self):
        return {"card": "none, a dry run on the CPU", "cuda": None}


def kernel_name(signature):
    """A kernel's name and template arguments, without namespaces and parameters."""
    plain = re.sub(r"^void |\(anonymous namespace\)::|\b\w+::", "", signature)
    return plain.split("(")[0][:80]


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# The card


def rate(clock, call, work):
    """Work a second, from the median of many calls."""
    clock.spans([call] * 3)
    return work / statistics.median(clock.spans([call] * 20)) * 1e3


def measure_roofs(clock, shrink):
    size = max(64, 8192 // shrink)
    a, b = (torch.randn(size, size, device=clock.device).bfloat16() for _ in range(2))
    roofs = {"bf16_tflops": rate(clock, lambda: a @ b, 2 * size**3) / 1e12}
    source = torch.ones(
        max(1 << 16, (1 << 31) // shrink**2), dtype=torch.uint8, device=clock.device
    )
    target = torch.empty_like(source)
    roofs["copy_gb_per_s"] = (
        rate(clock, lambda: target.copy_(source), 2 * source.nbytes) / 1e9
    )  # read + written
    host = clock.pinned(source.numel() // 4)
    part = target[: host.numel()]
    roofs["pinned_gb_per_s"] = (
        rate(clock, lambda: part.copy_(host, non_blocking=True), host.nbytes) / 1e9
    )
    return {name: float(f"{value:.4g}") for name, value in roofs.items()}


# Contenders: {name: calls that take turns}


def with_tf32(call):
    def run():
        MATMUL.allow_tf32 = True
        try:
            return call()
        finally:
            MATMUL.allow_tf32 = False

    return run


@contextlib.contextmanager
def time_limit(limit):
    """TimeoutError in the main thread after so many seconds."""

    def stop(*_):
        raise TimeoutError(f"took longer than {limit:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def dense_calls(job, groups, rows, layers, run):
    """{name: a function that makes the calls}.

    What a contender needs beyond the inputs exists only while it is used.
    """
    case = job.case

    def calls(step, dtype=None, wrap=lambda call: call):
        def make():
            x, w = rows, layers
            if dtype is not None and rows[0].dtype != dtype:
                x, w = (
                    [one.to(dtype) for one in rows],
                    [(W.to(dtype), b.to(dtype)) for W, b in layers],
                )
            return [
                wrap(
                    over_layers(
                        step, [x[i] for i in group], [w[i] for i in group], case.top_k, THRESHOLD
                    )
                )
                for group in groups
            ]

        return make

    made_calls = {
        "product bf16": calls(product, torch.bfloat16),
        "linear+topk bf16": calls(linear_topk, torch.bfloat16),
        "reference bf16": calls(reference_pipeline, torch.bfloat16),
        "reference tf32": calls(reference_pipeline, torch.float32, with_tf32),
        "reference fp32": calls(reference_pipeline, torch.float32),
    }
    if case.brief:
        return {"product bf16": made_calls["product bf16"]}
    step = flashinfer_step()
    if step is not None:
        made_calls["linear+flashinfer bf16"] = calls(step, torch.bfloat16)
    if job.compiled and run.compile_s > 0:
        step = torch.compile(reference_pipeline, dynamic=False)
        made_calls["reference bf16 compiled"] = calls(step, torch.bfloat16)
        made_calls["reference tf32 compiled"] = calls(step, torch.float32, with_tf32)
    return made_calls


def encoder_calls(encoder, groups, rows):
    def one(group):
        if len(group) > 1:
            hidden = {i: rows[i] for i in group}
            return lambda: encoder.encode_all_layers(hidden)
        return lambda: encoder.encode_layer(group[0], rows[group[0]])

    return [one(group) for group in groups]


def encode_every(encoder, rows):
    """{layer: result}, each layer by a call of its own."""
    return {i: encoder.encode_layer(i, x) for i, x in enumerate(rows)}


def measure(clock, calls, limit):
    """Prepare one contender, within limit seconds: what it holds and how long it keeps the host."""
    with time_limit(limit):
        for _ in range(PREPARE):
            for call in calls:
                call()
        clock.sync()
    extra = clock.extra(calls[0])
    host = []
    for i in range(10):
        clock.sync()
        host.append(1e3 * seconds(calls[i % len(calls)]))
    clock.sync()
    return {"host_ms": round(statistics.median(host), 4), "extra_bytes": extra}


def time_in_turns(clock, contenders, budget):
    """{name: samples in ms}: every contender's turn in every round, over its calls in order."""
    first = {name: statistics.median(clock.spans(calls)) for name, calls in contenders.items()}
    turn_s = min(TURN_S, budget / ROUNDS / len(contenders))
    counts = {
        name: min(200, max(3, math.ceil(1e3 * turn_s / max(first[name], 1e-3))))
        for name in contenders
    }
    samples = {name: [] for name in contenders}
    names, until = list(contenders), time.perf_counter() + 2 * budget
    for number in range(ROUNDS):
        if number and time.perf_counter() > until:
            break
        names = names[1:] + names[:1]
        for name in names:
            calls = contenders[name]
            # The first call of a turn follows another contender's and is not counted.
            samples[name] += clock.spans([calls[i % len(calls)] for i in range(counts[name] + 1)])[
                1:
            ]
    return samples


def summary(samples):
    values = {"min": min(samples), "median": statistics.median(samples), "max": max(samples)}
    return {"ms": {key: round(value, 4) for key, value in values.items()}, "samples": len(samples)}


# Cases


def shrunk(job, shrink):
    if shrink == 1:
        return job
    case = job.case
    small = {
        "T": max(1, case.T // shrink),
        "H": max(32, case.H // shrink),
        "F": max(256, case.F // shrink),
    }
    return dataclasses.replace(
        job, case=dataclasses.replace(case, **small, layers=min(case.layers, 3))
    )


def run_job(job, clock, roofs, run):
    case = job.case
    if case.layers > 1:
        groups = [list(range(case.layers))]
    else:
        sets = math.ceil(COLD_BYTES / run.shrink**2 / (2 * case.F * case.H))
        groups = [[i] for i in range(sets)]
    every = dataclasses.replace(case, layers=max(case.layers, len(groups)))
    rows, layers = make_inputs(every, clock.device.type)
    make = {i: TranscoderWeights(W, b, layer=i) for i, (W, b) in enumerate(layers)}
    start = time.perf_counter()
    chunk = {"chunk_size": job.chunk_size} if job.chunk_size else {}
    encoder = SparseTranscoderEncoder(make, case.top_k, THRESHOLD, **chunk)
    clock.sync()
    build_s = time.perf_counter() - start
    result = encode_every(encoder, rows)
    check_all(every, result, rows, layers)
    active = statistics.mean(one["sparsity"].mean().item() * case.F for one in result.values())
    if job.streamed:
        del encoder, make
        make = {i: TranscoderWeights(W.cpu(), b.cpu(), layer=i) for i, (W, b) in enumerate(layers)}
        layers.clear()
        made.clear()
        clock.free()
        place = {"device_weight_bytes": 0} if clock.device.type == "cuda" else {}
        encoder = SparseTranscoderEncoder(make, case.top_k, THRESHOLD, **place)
    measured, left_out, timed = {}, {}, {}
    calls = encoder_calls(encoder, groups, rows)
    for _ in range(PREPARE):  # what is replayed is checked as well
        again = [call() for call in calls]
    again = again[0] if case.layers > 1 else dict(enumerate(again))
    check_same(every, "another call", again, result)
    del again, result
    measured[OURS] = measure(clock, calls, PREPARE_S)
    others = {} if job.streamed else dense_calls(job, groups, rows, layers, run)
    case_s = min(run.case_s, BRIEF_S) if case.brief else run.case_s
    timed[OURS] = time_in_turns(clock, {OURS: calls}, case_s / 4)[OURS]
    for name, make_calls in others.items():
        # One at a time beside ours: the others' copies of the weights may not fit at once.
        try:
            theirs = make_calls()
            measured[name] = measure(
                clock, theirs, run.compile_s if "compiled" in name else PREPARE_S
            )
            samples = time_in_turns(clock, {OURS: calls, name: theirs}, case_s / len(others))
            timed[name] = samples[name]
            measured[name]["ours"] = summary(samples[OURS])  # in turns with this one
        except Exception as error:
            measured.pop(name, None)
            left_out[name] = one_line(error)
        theirs = None
        clock.free()
    if job.compiled and run.compile_s > 0:
        torch._dynamo.reset()
    for name, samples in timed.items():
        measured[name] |= summary(samples)
    measured[OURS]["kernels"] = clock.kernels(calls)
    return record_of(job, roofs, encoder, build_s, active, len(groups), measured, left_out)


def record_of(job, roofs, encoder, build_s, active, sets, measured, left_out):
    case = job.case
    ours_s = measured[OURS]["ms"]["median"] / 1e3
    element = 4 if case.dtype == "float32" else 2  # of rows
    weights = case.layers * case.F * case.H * 2
    moved = weights + case.layers * case.T * (case.H * element + 12 * case.top_k + 4)
    product_s, memory_s = (
        case.flop / roofs["bf16_tflops"] / 1e12,
        moved / roofs["copy_gb_per_s"] / 1e9,
    )
    record = {
        "case": job.name,
        **dataclasses.asdict(case),
        "streamed": job.streamed,
        "chunk_size": encoder.chunk_size,
        "threshold": THRESHOLD,
        "weight_sets": sets,
        "active_per_row": round(active, 1),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "build_s": round(build_s, 3),
        "memory": encoder.memory(),
        "product_roof_ms": round(1e3 * product_s, 4),
        "memory_roof_ms": round(1e3 * memory_s, 4),
        "share_of_roof": round(max(product_s, memory_s) / ours_s, 3),
        "tflops": round(case.flop / ours_s / 1e12, 3),
        "gb_per_s": round(moved / ours_s / 1e9, 3),
        "contenders": measured,
        "left_out": left_out,
    }
    if job.streamed:
        record["share_of_pinned_copy"] = round(weights / ours_s / 1e9 / roofs["pinned_gb_per_s"], 3)
    return record


def one_line(error):
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:300]


# Report


def print_record(record):
    of = record["contenders"]
    print(
        f"{record['case']}: {of[OURS]['ms']['median']:.3f} ms, host {of[OURS]['host_ms']:.3f} ms,",
        end=" ",
    )
    print(f"{record['share_of_roof']:.0%} of the roof,", end=" ")
    if record["streamed"]:
        print(f"{record['share_of_pinned_copy']:.0%} of the pinned copy,", end=" ")
    print(f"{record['tflops']:.1f} TFLOP/s, {record['gb_per_s']:.0f} GB/s", end="")
    for name, one in of.items():
        if name != OURS:
            print(f"; {name} {one['ms']['median'] / one['ours']['ms']['median']:.2f}", end="")
    for name, reason in record["left_out"].items():
        print(f"; no {name}: {reason}", end="")
    print()
    for name, (microseconds, launches) in of[OURS]["kernels"].items():
        print(f"    {microseconds:9.1f} us x {launches:5.1f}  {name}")
    print(end="", flush=True)


class Run:
    """The options, and the time that is left."""

    def __init__(self, options):
        self.start, self.budget, self.shrink = time.perf_counter(), options.seconds, options.shrink
        self.case_s = CASE_S if options.shrink == 1 else 0.05
        self.compile_s = options.compile_seconds

    def seconds_left(self):
        return self.budget - (time.perf_counter() - self.start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / "gpu.json", help="results file"
    )
    parser.add_argument(
        "--seconds", type=float, default=240, help="cases that would begin too late are skipped"
    )
    parser.add_argument(
        "--only",
        default="",
        help="cases whose names contain one of these texts, separated by commas",
    )
    parser.add_argument(
        "--compile-seconds", type=float, default=COMPILE_S, help="for each torch.compile; 0: none"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a dry run")
    parser.add_argument("--shrink", type=int, default=1, help="divide every size, for a dry run")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "torch sees no CUDA device; --device cpu --shrink 64 tries the script without one"
        )
    clock = Cuda(device) if device.type == "cuda" else Cpu(device)
    run = Run(options)
    jobs = [
        job for job in JOBS if any(part.strip() in job.name for part in options.only.split(","))
    ]
    machine = clock.describe() | {"torch": torch.__version__}
    report = {"machine": machine, "cases": [], "failed": {}, "skipped": []}

    def write():
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")

    with torch.inference_mode():
        machine |= measure_roofs(clock, options.shrink)
        print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
        write()
        for job in jobs:
            if run.seconds_left() < (RESERVE_S if options.shrink == 1 else 0):
                report["skipped"].append(job.name)
                write()
                continue
            try:
                record = run_job(shrunk(job, options.shrink), clock, machine, run)
                report["cases"].append(record)
                print_record(record)
            except (Exception, SystemExit) as error:  # SystemExit: a result differs
                report["failed"][job.name] = one_line(error)
                traceback.print_exc()
                print(f"{job.name}: FAILED: {one_line(error)}", flush=True)
            write()
            clock.free()
    for name in report["skipped"]:
        print(f"{name}: skipped: no time left of {options.seconds:.0f} s")
    print(
        f"{len(report['cases'])} cases, {len(report['failed'])} failed, "
        f"{len(report['skipped'])} skipped: {options.out}"
    )
    raise SystemExit(1 if report["failed"] or not report["cases"] else 0)


if __name__ == "__main__":
    main()
