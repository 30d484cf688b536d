"""Times the screens of up to 64 rows on a GPU, in turns in one process.

    python benchmarks/gpu_screens.py [--seconds 60] [--out FILE]

Device times of a call, in microseconds: medians over sets of weights that together exceed the L2
cache, of calls that the host put into the queue before the first began. Results of all screens are
compared first, bit for bit. `host` is the time that a call takes the host.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from gpu import Cuda
from inputs import THRESHOLD, Case, make_inputs
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights

HERE = Path(__file__).resolve().parent
SCREENS = ("auto", "int8", "int16")
ROWS = (1, 2, 4, 8, 9, 16, 32, 48, 64)
SHAPES = ((5120, 40960, 2), (2048, 131072, 2), (2048, 16384, 8))  # H, F, sets of weights
KINDS = ("planted", "gaussian", "dense")
WAIT_CYCLES = 6_000_000  # in which the host gets ahead


def device_us(calls, count):
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 2)]
    torch.cuda.synchronize()
    torch.cuda._sleep(WAIT_CYCLES)
    for n in range(count + 1):
        events[n].record()
        calls[n % len(calls)]()
    events[-1].record()
    torch.cuda.synchronize()
    # The first call waited for the host.
    return [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(events[1:])]


def host_us(calls):
    times = []
    for call in calls * 3:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return times


def measure(case, encoders, rows):
    calls = {
        name: [
            lambda encoder=encoder, i=i: encoder.encode_layer(i, rows[i][: case.T])
            for i in range(len(rows))
        ]
        for name, encoder in encoders.items()
    }
    want = [call() for call in calls["int16"]]
    for name, some in calls.items():
        for _ in range(3):  # the third one replays a graph
            for call, expected in zip(some, want, strict=True):
                got = call()
                for key in ("activations", "indices", "sparsity"):
                    if not torch.equal(got[key], expected[key]):
                        raise SystemExit(f"{case.name}, {name}: {key} differ")
    device, host = ({name: [] for name in calls} for _ in range(2))
    for _ in range(3):
        for name, some in calls.items():
            device[name] += device_us(some, 8 if case.kind == "dense" else 15)
            host[name] += host_us(some)
    return {
        key: {name: round(statistics.median(times), 1) for name, times in found.items()}
        for key, found in (("us", device), ("host", host))
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="no case begins later")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu_screens.json")
    options = parser.parse_args()
    end = time.perf_counter() + options.seconds
    report = {"machine": Cuda(torch.device("cuda", 0)).describe(), "screens": [], "left_out": []}
    with torch.inference_mode():
        for H, F, sets in SHAPES:
            for kind in KINDS:
                case = Case(max(ROWS), H, F, layers=sets, kind=kind, dtype="bfloat16")
                rows, layers = make_inputs(case, "cuda")
                make = {i: TranscoderWeights(W, b, layer=i) for i, (W, b) in enumerate(layers)}
                encoders = {
                    name: SparseTranscoderEncoder(make, case.top_k, THRESHOLD, screening=name)
                    for name in SCREENS
                }
                for T in ROWS:
                    named = {"T": T, "H": H, "F": F, "kind": kind, "dtype": "bfloat16"}
                    if time.perf_counter() > end:
                        report["left_out"].append(named)
                        continue
                    one = Case(T, H, F, layers=sets, kind=kind, dtype="bfloat16")
                    report["screens"].append(named | measure(one, encoders, rows))
                    print(json.dumps(report["screens"][-1]), flush=True)
                    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
                del encoders, make, rows, layers
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
