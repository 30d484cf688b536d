"""From a corpus to features: tokens per second and peak memory against delphi's LatentCache and a
careful dense loop, on the same model, text and machine.

    python benchmarks/corpus.py [--windows 16] [--turns 3] [--memory 100000,400000] [--out FILE]

SmolLM2-135M-Instruct reads Python's own documentation topics in windows of 256 tokens. Every way
encodes four layers of 2,304 features and writes what it found; the ways take turns, and what they
found is compared first. The time of the model's forward pass is told apart from all else. Memory is
the peak of a process of its own with a tiny model, over the number of tokens. delphi is measured
where eai-delphi is installed.
"""

import argparse
import json
import os
import pydoc_data.topics
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "examples"), str(HERE.parent / "tests"), str(HERE)]

from attach import processor  # noqa: E402
from bench import spread_threads  # noqa: E402
from sparse_transcoder import (  # noqa: E402
    SparseTranscoderEncoder,
    TranscoderWeights,
    encode_corpus,
    load_transcoders,
)
from sparse_transcoder.corpus import Run  # noqa: E402

THRESHOLD, CTX, BATCH = 1.0, 256, 8


def dense_of(weights):
    """What is usually written, with the weights widened once."""
    W_enc, b_enc = weights.W_enc.float(), weights.b_enc.float()

    def encode(hidden):
        act = torch.addmm(b_enc, hidden.reshape(-1, hidden.shape[-1]), W_enc.T).relu_()
        return act.masked_fill_(act < THRESHOLD, 0).view(*hidden.shape[:-1], -1)

    return encode


class ModelClock:
    """The seconds that a model's forward passes take."""

    def __init__(self, model):
        self.seconds = 0.0
        self._hooks = [
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._end),
        ]

    def _begin(self, *_):
        self._start = time.perf_counter()

    def _end(self, *_):
        self.seconds += time.perf_counter() - self._start

    def close(self):
        for hook in self._hooks:
            hook.remove()


def ours(model, tokenizer, text, encoder, out):
    run = Run(
        model,
        tokenizer,
        [text],
        encoder,
        out,
        ctx=CTX,
        batch_size=BATCH,
        keep="all",
        exclude=None,
        part_tokens=1 << 16,
    )
    start = time.perf_counter()
    run.write_parts(range(run.corpus.part_count), progress=False)
    total = time.perf_counter() - start
    found = {
        layer: sum(len(part.layers[layer].features) for part in run.corpus)
        for layer in run.corpus.layers
    }
    return total, run.model_seconds, found


def dense_loop(model, tokens, weights, out):
    """Hooks, a product per layer, nonzero, small types, one file per layer and batch."""
    inner = model.model
    last = max(weights)
    layers, inner.layers = inner.layers, inner.layers[: last + 1]
    encoders = {layer: dense_of(one) for layer, one in weights.items()}
    seen, found = {}, dict.fromkeys(weights, 0)
    hooks = [
        inner.layers[layer].mlp.register_forward_pre_hook(
            lambda _, x, layer=layer: seen.update({layer: x[0]})
        )
        for layer in weights
    ]
    clock = ModelClock(inner)
    start = time.perf_counter()
    with torch.inference_mode():
        for i in range(0, len(tokens), BATCH):
            inner(tokens[i : i + BATCH], use_cache=False)
            for layer, encode in encoders.items():
                act = encode(seen[layer]).view(-1, weights[layer].W_enc.shape[0])
                rows, features = act.nonzero(as_tuple=True)
                counts = torch.bincount(rows, minlength=len(act))
                values = act[rows, features].half()
                found[layer] += len(values)
                with open(out / f"{layer}-{i}.bin", "wb") as file:
                    for part in (counts.int(), features.to(torch.uint16), values):
                        file.write(part.numpy().data)
                    os.fsync(file.fileno())
    total = time.perf_counter() - start
    clock.close()
    for hook in hooks:
        hook.remove()
    inner.layers = layers
    return total, clock.seconds, found


def delphi(model, tokens, weights, out):
    """Its LatentCache, with the model cut after the last layer, and its shards."""
    from delphi.latents.cache import LatentCache

    inner = model.model
    last = max(weights)
    layers, inner.layers = inner.layers, inner.layers[: last + 1]
    hooks = {f"layers.{layer}.mlp": dense_of(one) for layer, one in weights.items()}
    cache = LatentCache(inner, hooks, batch_size=BATCH, transcode=True)
    clock = ModelClock(inner)
    start = time.perf_counter()
    cache.run(tokens.numel(), tokens)
    cache.save_splits(5, out)
    total = time.perf_counter() - start
    clock.close()
    inner.layers = layers
    found = {int(n.split(".")[1]): len(a) for n, a in cache.cache.latent_activations.items()}
    return total, clock.seconds, found


def measure(args):
    from language_model import load_causal_model

    model, tokenizer = load_causal_model()
    weights = load_transcoders(HERE.parent / "examples" / "transcoders", device="cpu")
    encoder = SparseTranscoderEncoder(weights, 32, THRESHOLD)
    topics = "\n\n".join(pydoc_data.topics.topics.values())
    ids = tokenizer(topics, add_special_tokens=False).input_ids
    count = args.windows * (CTX - 1)  # whole windows, so that every way reads the same batches
    cuts = (tokenizer.decode(ids[:end]) for end in range(count, count + 100))
    text = next(t for t in cuts if len(tokenizer(t, add_special_tokens=False).input_ids) == count)
    with tempfile.TemporaryDirectory() as folder:
        packed = Run(model, tokenizer, [text], encoder, folder, ctx=CTX).corpus.tokens()
        tokens = torch.from_numpy(packed.astype(np.int64))
    ways = {
        "sparse_transcoder": lambda out: ours(model, tokenizer, text, encoder, out),
        "dense loop": lambda out: dense_loop(model, tokens, weights, out),
    }
    if has_delphi():
        ways["delphi"] = lambda out: delphi(model, tokens, weights, out)
    turns = {name: [] for name in ways}
    for turn in range(args.turns + 1):  # the first one warms up and is compared
        kept = {}
        for name, way in ways.items():
            with tempfile.TemporaryDirectory() as folder, spread_threads():
                total, forward, kept[name] = way(Path(folder))
            if turn:
                turns[name].append((total, forward))
        first = kept["sparse_transcoder"]
        for name, found in kept.items():
            for layer, entries in found.items():
                # Products in float32 differ at the gate.
                if abs(entries - first[layer]) > 0.001 * first[layer]:
                    raise SystemExit(f"{name}, layer {layer}: {entries} entries, {first[layer]}")
    report = {}
    for name, pairs in turns.items():
        total, forward, beyond = (
            statistics.median(values)
            for values in ([t for t, _ in pairs], [f for _, f in pairs], [t - f for t, f in pairs])
        )
        report[name] = {
            "seconds": total,
            "model_seconds": forward,
            "beyond_model_seconds": beyond,
            "tokens_per_second": tokens.numel() / total,
        }
        print(f"{name:18} {total:7.2f} s, the model {forward:7.2f} s, beyond it {beyond:7.3f} s")
    return {"tokens": tokens.numel(), "entries": sum(first.values()), "ways": report}


def has_delphi():
    try:
        import delphi.latents.cache  # noqa: F401
    except ImportError:
        return False
    return True


def one_peak(way, tokens):
    """The peak memory of this process after a run with a tiny model, in MiB."""
    import tiny_corpus as tiny

    model, tokenizer = tiny.model(), tiny.tokenizer()
    features = 2304
    torch.manual_seed(1)
    weights = {
        layer: TranscoderWeights(torch.randn(features, tiny.H) / 8, torch.full((features,), -0.6))
        for layer in (0, 2)
    }
    windows = tokens // CTX
    with tempfile.TemporaryDirectory() as folder:
        if way == "delphi":
            from delphi.latents.cache import LatentCache

            hooks = {f"layers.{layer}.mlp": dense_of(one) for layer, one in weights.items()}
            cache = LatentCache(model.model, hooks, batch_size=BATCH, transcode=True)
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(3, 300, (windows, CTX), generator=generator)
            cache.run(ids.numel(), ids)
            cache.save_splits(5, Path(folder))
        else:
            encoder = SparseTranscoderEncoder(weights, 32, THRESHOLD)
            once = len(tokenizer(tiny.TEXTS[4]).input_ids) + 1
            texts = (tiny.TEXTS[4] for _ in range(tokens // once))
            encode_corpus(
                model,
                tokenizer,
                texts,
                encoder,
                folder,
                ctx=CTX,
                batch_size=64,
                keep="all",
                hook="mlp.hook_in",
                part_tokens=1 << 15,
                progress=False,
            )
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def memory(args):
    rows = []
    for way in ["sparse_transcoder"] + ["delphi"] * has_delphi():
        for tokens in map(int, args.memory.split(",")):
            if way == "delphi" and tokens > args.most_for_delphi:
                continue
            command = [sys.executable, __file__, "--peak", way, str(tokens)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(
                {"way": way, "tokens": tokens, "peak_mib": float(done.stdout.splitlines()[-1])}
            )
            print(f"{way:18} {tokens:9,} tokens: peak {rows[-1]['peak_mib']:,.0f} MiB")
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, default=16, help="0 keeps the speeds of the file")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--memory", default="100000,200000,400000", help="'' keeps the file's")
    parser.add_argument("--most-for-delphi", type=int, default=400_000)
    parser.add_argument("--note", default="", help="what else the machine did")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "corpus.json")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(one_peak(args.peak[0], int(args.peak[1])))
        return
    report = json.loads(args.out.read_text()) if args.out.exists() else {"memory": []}
    if args.windows:
        machine = {"machine": processor(), "threads": torch.get_num_threads()}
        report |= {**machine, "torch": torch.__version__, "note": args.note}
        report["speed"] = measure(args)
    if args.memory:
        kept = {(row["way"], row["tokens"]): row for row in report["memory"] + memory(args)}
        report["memory"] = sorted(
            kept.values(), key=lambda row: (row["way"] == "delphi", row["tokens"])
        )
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
