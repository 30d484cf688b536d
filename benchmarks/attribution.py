"""What an attribution run's feature step takes: circuit-tracer's own code, and the same on the
engine.

    python benchmarks/attribution.py [--turns 5] [--shared]

The step is compute_attribution_components: active features of all layers, their encoder and decoder
vectors, and the reconstruction. The two ways take turns on the same random transcoders, after their
results were compared. Time is the median of the turns. Memory is the most that a process of its own
holds beyond its transcoders and inputs, engine included. --shared records that other work ran on
the machine meanwhile.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from attach import processor
from circuit_tracer.transcoder.activation_functions import JumpReLU
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from sparse_transcoder.integrations.circuit_tracer import on_engine

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
# kind, layers, tokens, hidden size, features, active features per row
CASES = [
    ("set", 4, 64, 768, 16384, 30),
    ("set", 4, 64, 768, 16384, 400),
    ("cross-layer", 4, 64, 768, 16384, 30),
    ("cross-layer", 4, 64, 768, 16384, 400),
]


def make(kind, layers, tokens, hidden, features, active):
    """Random transcoders whose thresholds let `active` features of a row pass, and their inputs."""
    torch.manual_seed(0)
    inputs = torch.randn(layers, tokens, hidden)
    gate = torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - active / features)).item()
    if kind == "set":
        singles = {
            layer: SingleLayerTranscoder(
                hidden, features, JumpReLU(torch.full((features,), gate)), layer, device=CPU,
                dtype=torch.float32,
            )
            for layer in range(layers)
        }  # fmt: skip
        made = TranscoderSet(singles, "mlp.hook_in", "mlp.hook_out")
    else:
        made = CrossLayerTranscoder(
            layers, features, hidden, "jump_relu", lazy_decoder=False, device=CPU,
            dtype=torch.float32,
        )  # fmt: skip
        made.activation_function.threshold.data.fill_(gate)
    for name, parameter in made.named_parameters():
        if "W_" in name:
            parameter.data.normal_(std=hidden**-0.5)
    return made, inputs


@torch.no_grad()
def compare(got, expected):
    """The same features, within rounding at the thresholds, and the same values."""
    mine, theirs = (one["activation_matrix"].to_dense() for one in (got, expected))
    different = (mine > 0) != (theirs > 0)
    assert different.sum() <= 1e-5 * (theirs > 0).sum() + 2, int(different.sum())
    torch.testing.assert_close(
        got["reconstruction"], expected["reconstruction"], rtol=1e-3, atol=1e-2
    )
    if not different.any():
        for key in ("encoder_vecs", "decoder_vecs"):
            torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def timed(case, turns):
    theirs, inputs = make(*case)
    ways = {"circuit-tracer": theirs, "on the engine": on_engine(theirs)}
    results = {name: way.compute_attribution_components(inputs) for name, way in ways.items()}
    compare(results["on the engine"], results["circuit-tracer"])
    active = results["circuit-tracer"]["activation_matrix"]._nnz() / (case[1] * (case[2] - 1))
    del results
    seconds = {name: [] for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            begin = time.perf_counter()
            way.compute_attribution_components(inputs)
            seconds[name].append(time.perf_counter() - begin)
    return active, {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def resident(field):
    """MiB of this process: VmRSS now, VmHWM the most so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if field in line) / 1024


@torch.no_grad()
def measured(case, engine):
    """MiB beyond what is held before, in this process."""
    way, inputs = make(*case)
    torch.nn.functional.linear(inputs[0], torch.zeros(8, case[3]))  # the threads of torch
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = resident("VmRSS")
    if engine:
        way = on_engine(way)
    way.compute_attribution_components(inputs)
    return resident("VmHWM") - before


def in_process(number, engine):
    command = [sys.executable, __file__, "--measure", str(number), *(["--engine"] * engine)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "attribution.json")
    args = parser.parse_args()
    if args.measure is not None:
        print(measured(CASES[args.measure], args.engine))
        return
    cases = []
    for number, case in enumerate(CASES):
        kind, layers, tokens, hidden, features, _ = case
        active, ms = timed(case, args.turns)
        mib = {
            name: in_process(number, engine)
            for name, engine in (("circuit-tracer", False), ("on the engine", True))
        }
        name = f"{kind}: {layers} layers, {tokens} x {hidden} x {features}"
        cases.append({"name": name, "active_per_row": active, "ms": ms, "mib": mib})
        print(cases[-1], flush=True)
    machine = {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shared": args.shared,
    }
    args.out.write_text(json.dumps({"machine": machine, "cases": cases}, indent=2) + "\n")


if __name__ == "__main__":
    main()
