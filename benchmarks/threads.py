"""What torch's threads are worth to a call that comes right after work of torch's.

    python benchmarks/threads.py [--seconds 2] [--out FILE]

Calls of the main thread run on torch's threads, unless Options::lanes says how many threads of its
own the engine uses. Both are timed in turns, right after a product of torch's, and after a pause in
which all threads fall asleep. A record has the medians, in ms. Results are compared first, bit for
bit.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from bench import describe_machine, spread_threads
from inputs import THRESHOLD, Case, make_inputs, real_cases
from sparse_transcoder import _C, TranscoderWeights
from sparse_transcoder.weights import to_native

HERE = Path(__file__).resolve().parent
PAUSE_S = 0.03
CASES = [
    Case(1, 576, 4608, layers=30),
    Case(16, 576, 4608, layers=30),
    Case(1, 2048, 16384, layers=23),
    Case(256, 2048, 16384),
]


def timed(call):
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def measure(case, seconds):
    rows, layers = make_inputs(case)
    weights = {i: to_native(i, TranscoderWeights(W, b, layer=i)) for i, (W, b) in enumerate(layers)}
    hidden, a = dict(enumerate(rows)), torch.randn(512, 512)

    def engine(lanes):
        return _C.Engine(
            weights,
            top_k=case.top_k,
            activation_threshold=THRESHOLD,
            chunk_size=512,
            lanes=lanes,
            screening=_C.Screening.auto,
            use_graphs=True,
            device_weight_bytes=-1,
        )

    engines = {"torch's threads": engine(0), "own threads": engine(torch.get_num_threads())}
    with spread_threads():
        first, other = (one.encode_all(hidden) for one in engines.values())
        for layer, result in first.items():
            for name in ("activations", "indices", "sparsity"):
                if not torch.equal(getattr(result, name), getattr(other[layer], name)):
                    raise SystemExit(f"{case.name}: layer {layer}: results differ")
        times = {(when, name): [] for when in ("after torch", "after a pause") for name in engines}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            for (when, name), taken in times.items():
                torch.mm(a, a)
                if when == "after a pause":
                    time.sleep(PAUSE_S)
                taken.append(timed(lambda name=name: engines[name].encode_all(hidden)))
    medians = {key: statistics.median(taken) for key, taken in times.items()}
    record = {"case": case.name, "calls": len(times["after torch", "own threads"])}
    for when, name in times:
        record.setdefault(when, {})[name] = round(medians[when, name], 3)
    return record


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=4, help="of a case")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "threads.json")
    options = parser.parse_args()
    machine = describe_machine()
    real = real_cases()
    records = []
    for case in CASES + ([] if isinstance(real, str) else real[:1]):
        records.append(measure(case, options.seconds))
        print(json.dumps(records[-1]), flush=True)
    keys = ("cpu", "threads", "torch", "sparse_transcoder", "instruction_set")
    report = {"machine": {key: machine[key] for key in keys if key in machine}, "cases": records}
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
