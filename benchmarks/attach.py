"""What reading features costs while a model generates: tokens per second with and without a
monitor on four layers.

    python benchmarks/attach.py [--tokens 64] [--turns 9] [--out benchmarks/results/attach.json]

SmolLM2-135M-Instruct generates with its KV cache, greedily; the two ways take turns, and the
result holds the median time per token of each. First it is checked that the tokens are the same
and that the features equal those of the same rows encoded afterwards.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from language_model import load_causal_model  # noqa: E402
from sparse_transcoder import SparseTranscoderEncoder, load_transcoders  # noqa: E402

PROMPT = "When the Eiffel Tower opened in Paris in 1889, no building in the world was taller."


def processor():
    lines = (
        Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return next(
        (line.split(": ", 1)[1] for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "attach.json")
    args = parser.parse_args()

    model, tokenizer = load_causal_model()
    transcoders = load_transcoders(HERE.parent / "examples" / "transcoders", device="cpu")
    encoder = SparseTranscoderEncoder(transcoders, top_k=64)
    inputs = tokenizer([PROMPT] * args.batch, return_tensors="pt")
    options = {
        "max_new_tokens": args.tokens,
        "min_new_tokens": args.tokens,
        "do_sample": False,
        "pad_token_id": 0,
    }

    def plain():
        return model.generate(**inputs, **options)

    def monitored():
        with encoder.attach(model) as monitor:
            return model.generate(**inputs, **options), monitor

    rows = {layer: [] for layer in transcoders}
    handles = [
        model.model.layers[layer].mlp.register_forward_pre_hook(
            lambda _, given, layer=layer: rows[layer].append(given[0].clone())
        )
        for layer in rows
    ]
    tokens = plain()
    for handle in handles:
        handle.remove()
    generated, monitor = monitored()
    assert torch.equal(generated, tokens), "a monitor must not change what is generated"
    for layer, features in monitor.features().items():
        afterwards = encoder.encode_layer(
            layer, torch.cat([part.flatten(0, 1) for part in rows[layer]])
        )
        assert torch.equal(features["activations"], afterwards["activations"]), f"layer {layer}"
        assert torch.equal(features["indices"], afterwards["indices"]), f"layer {layer}"

    times = {"plain": [], "attached": []}
    for _ in range(args.turns):
        for name, run in (("plain", plain), ("attached", monitored)):
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3 / args.tokens)
    ratios = [b / a - 1 for a, b in zip(times["plain"], times["attached"], strict=True)]
    result = {
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "model": "SmolLM2-135M-Instruct, float32",
        "layers": list(transcoders),
        "features": [weights.W_enc.shape[0] for weights in transcoders.values()],
        "batch": args.batch,
        "tokens": args.tokens,
        "turns": args.turns,
        "plain_ms_per_token": round(statistics.median(times["plain"]), 3),
        "attached_ms_per_token": round(statistics.median(times["attached"]), 3),
        "overhead": round(statistics.median(ratios), 4),
        "overhead_quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)[::2]],
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
