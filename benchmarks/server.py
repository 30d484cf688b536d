"""What the feature server costs, written to benchmarks/results/server.json: tokens per second and
CPU time with features off and on, latency of topk-by-token, bytes on the wire, memory.

    make server-bench BENCH="--tokens 48 --rounds 3"

CPU time is the server's own, which other work on the machine changes less than it does the clock's.
Off and on take turns, so that both meet the same neighbours.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import http.client
import json
import os
import re
import statistics
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LAYERS = [5, 10, 15, 20]
SETS = {"off": [], "1 layer": [10], "4 layers": LAYERS}
STREAMS = [1, 4, 8, 16]
LATENCIES = {64: 30, 256: 12, 1024: 6}  # tokens of a prompt: requests
PROMPT = "The history of the lighthouse begins with"
HIDDEN_SIZE = 576


class Server:
    def __init__(self, program, model, threads):
        command = [program, "--model", model, "--transcoders", ROOT / "examples" / "transcoders"]
        command += ["--port", 0, "--sequences", max(STREAMS), "--threads", threads]
        self.process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.PIPE, text=True
        )
        self.port = int(self.process.stdout.readline().rsplit(":", 1)[1])

    def ask(self, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        with contextlib.closing(connection):
            connection.request("POST" if body else "GET", path, body and json.dumps(body))
            response = connection.getresponse()
            text = response.read()
            assert response.status == 200, text
            return text

    def cpu_s(self):
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")  # in nanoseconds
        return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9

    def resident_bytes(self):
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")

    def metrics(self):
        lines = self.ask("/metrics").decode().splitlines()
        return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def completion(layers, tokens, seed, stream=False):
    body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 1.0, "seed": seed}
    return {**body, "stream": stream} | ({"features": {"layers": layers}} if layers else {})


def generate(server, streams, layers, tokens):
    """Seconds, CPU seconds and tokens of as many completions at once."""
    bodies = [completion(layers, tokens, seed) for seed in range(streams)]
    cpu, start = server.cpu_s(), time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(streams) as pool:
        answers = list(pool.map(lambda body: server.ask("/v1/completions", body), bodies))
    took, used = time.perf_counter() - start, server.cpu_s() - cpu
    return took, used, sum(json.loads(a)["usage"]["completion_tokens"] for a in answers)


def speeds(server, tokens, rounds):
    records = []
    for streams in STREAMS:
        runs = {name: [] for name in SETS}
        for _ in range(rounds):
            for name, layers in SETS.items():
                runs[name].append(generate(server, streams, layers, max(tokens, 200 // streams)))
        for name in SETS:
            records.append(
                {
                    "streams": streams,
                    "features": name,
                    "tokens_per_s": statistics.median(n / took for took, _, n in runs[name]),
                    "cpu_ms_per_token": statistics.median(1e3 * u / n for _, u, n in runs[name]),
                }
            )
        print(json.dumps(records[-len(SETS) :]), flush=True)
    return records


def share(server, streams, tokens):
    """The engine's time over the model's, by the server's own clocks."""
    names = (
        'sparse_transcoder_encode_duration_seconds_sum{phase="wall"}',
        "sparse_transcoder_decode_duration_seconds_sum",
    )
    before = server.metrics()
    generate(server, streams, LAYERS, tokens)
    after = server.metrics()
    encode, decode = (float(after[name]) - float(before.get(name, 0)) for name in names)
    return encode / decode


def shares(server, tokens, rounds):
    return [
        {
            "streams": streams,
            "encode_over_decode": statistics.median(
                share(server, streams, max(tokens, 200 // streams)) for _ in range(rounds)
            ),
        }
        for streams in STREAMS
    ]


def latencies(server):
    records = []
    for tokens, repeats in LATENCIES.items():
        prompt = " ".join(["word"] * tokens)
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            body = {"prompt": prompt, "source": "10-transcoders", "topK": 5}
            answer = json.loads(server.ask("/v1/activation/topk-by-token", body))
            times.append(1e3 * (time.perf_counter() - start))
        assert len(answer["tokens"]) == tokens
        times.sort()
        at = {p: times[min(repeats - 1, repeats * p // 100)] for p in (50, 95, 99)}
        records.append({"tokens": tokens, "repeats": repeats} | {f"p{p}_ms": at[p] for p in at})
        print(json.dumps(records[-1]), flush=True)
    return records


def wire(server, tokens=64):
    """Bytes of a streamed token with features of four layers, and what its hidden states are."""
    plain = len(server.ask("/v1/completions", completion([], tokens, 1, stream=True)))
    full = len(server.ask("/v1/completions", completion(LAYERS, tokens, 1, stream=True)))
    body = completion(LAYERS, tokens, 1, stream=True)
    body["features"]["topK"] = 8
    eight = len(server.ask("/v1/completions", body))
    row = len(base64.b64encode(bytes(4 * HIDDEN_SIZE)))
    return {
        "text alone": plain / tokens,
        "top 8 of 4 layers": eight / tokens,
        "top 32 of 4 layers": full / tokens,
        "hidden states of 4 layers, base64 float32": 4 * row + plain / tokens,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    model = Path(os.environ["MODEL"])
    server = Server(os.environ["FEATURE_SERVER"], model, args.threads)
    load = os.getloadavg()
    generate(server, 16, LAYERS, 8)  # warm-up
    results = {
        "machine": {
            "cpu": re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1],
            "cores": os.cpu_count(),
            "load_before": load,
        },
        "model": model.name,
        "threads": args.threads,
        "tokens": args.tokens,
        "rounds": args.rounds,
        "speeds": speeds(server, args.tokens, args.rounds),
        "shares": shares(server, args.tokens, args.rounds),
        "latencies": latencies(server),
        "wire_bytes_per_token": wire(server),
    }
    metrics = server.metrics()
    kinds = ("declared", "gates", "screening")
    results["memory"] = {
        "resident": server.resident_bytes(),
        "model_file": model.stat().st_size,
        "workspace": float(metrics["sparse_transcoder_workspace_bytes"]),
    } | {k: float(metrics[f'sparse_transcoder_weight_bytes{{kind="{k}"}}']) for k in kinds}
    results["machine"]["load_after"] = os.getloadavg()
    server.process.terminate()
    assert server.process.wait() == 0
    path = ROOT / "benchmarks" / "results" / "server.json"
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
