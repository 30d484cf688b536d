"""Train the transcoders of this folder: SmolLM2-135M-Instruct, MLP input to MLP output.

Each layer gets its own transcoder, y ~ relu(x @ W_enc.T + b_enc) @ W_dec + b_dec. It is trained on
two CPU cores, with BatchTopK and an auxiliary loss for dead features. At the end each encoder is
rescaled so that a feature counts as active from 1.0 on (`activation_threshold=1.0`), and everything
is stored in bfloat16. metrics.json is measured on those stored weights, on documents that were not
trained on.

The text is whatever --text names: files or folders of plain text (.txt .md .rst .pod, or no
suffix). The default is English from three Debian packages, in equal amounts while each lasts:

    apt-get install fortunes perl-doc python3-doc
"""

import argparse
import glob
import json
import random
import time
from pathlib import Path

import torch
from language_model import MLP_HOOKS, load_language_model, mlp_traffic
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
DEFAULT_TEXT = [
    "/usr/share/games/fortunes",
    "/usr/share/perl/*/pod",
    "/usr/share/doc/python3*/html/_sources",
]
SUFFIXES = {"", ".txt", ".md", ".rst", ".pod"}


def progress(name, done, total, start, note=""):
    left = (time.time() - start) / max(done, 1) * (total - done)
    bar = "#" * (30 * done // total)
    print(
        f"\r{name} [{bar:<30}] {done}/{total}, {left:4.0f} s left  {note:<32}",
        end="\n" if done == total else "",
        flush=True,
    )


def read_windows(sources, tokenizer, tokens, held_out, window, rng):
    """Token ids [n, window] to train on and [m, window] to measure on, m about n * held_out.

    Each window starts with BOS. No document gives to both: a document is a file, or one quotation
    of a fortune file. Every source gives an equal share while it lasts.
    """
    gap = tokenizer("\n\n").input_ids

    def cut(texts, share):
        ids = []
        for i in range(0, len(texts), 256):
            ids += [t for text in tokenizer(texts[i : i + 256]).input_ids for t in text + gap]
            if len(ids) >= share:
                break
        starts = range(0, min(share, len(ids)) - window, window - 1)
        return [[tokenizer.bos_token_id, *ids[i : i + window - 1]] for i in starts]

    streams = []
    for source in sources:
        found = [Path(path) for path in glob.glob(source)]
        files = sorted(
            {f.resolve() for path in found for f in (path, *path.rglob("*")) if f.is_file()}
        )
        parts = []  # (document, text)
        for file in files:
            text = (
                file.read_text(encoding="utf-8", errors="replace")
                if file.suffix in SUFFIXES
                else "\0"
            )
            if "\0" not in text:
                quotations = "\n%\n" in text
                parts += [
                    (p if quotations else file, p)
                    for p in text.replace("\n%\n", "\n\n\n").split("\n\n\n")
                ]
        rng.shuffle(parts)
        streams.append(parts)
    streams.sort(key=lambda parts: sum(len(text) for _, text in parts))

    train, test = [], []
    for n, parts in enumerate(streams):
        documents = list(dict.fromkeys(document for document, _ in parts))
        kept = set(documents[int(len(documents) * (1 - held_out)) :])  # the last to appear
        share = (tokens - len(train) * window) // (len(streams) - n)
        train += cut([text for document, text in parts if document not in kept], share)
        test += cut([text for document, text in parts if document in kept], int(share * held_out))
    if not train or not test:
        raise SystemExit(
            f"two documents of text or more are needed in {', '.join(sources)}, got {len(train)} "
            f"windows to train on and {len(test)} to measure on; install the packages named above "
            "or give --text"
        )
    rng.shuffle(train)
    return torch.tensor(train), torch.tensor(test)


def collect(name, model, windows, layers, batch=16):
    """{layer: (MLP inputs [N, H], MLP outputs [N, H])} in bfloat16.

    The first position of each window is left out.
    """
    parts, start = {i: ([], []) for i in layers}, time.time()
    for at in range(0, len(windows), batch):
        for i, pair in mlp_traffic(model, windows[at : at + batch], layers).items():
            for store, values in zip(parts[i], pair, strict=True):
                store.append(values[:, 1:].flatten(0, 1).bfloat16())
        progress(name, min(at + batch, len(windows)), len(windows), start)
    return {i: (torch.cat(x), torch.cat(y)) for i, (x, y) in parts.items()}


def train_layer(name, x, y, args):
    """Weights {W_enc [F,H], b_enc [F], W_dec [F,H], b_dec [H]} for x [N,H] and targets y [N,H]."""
    torch.manual_seed(args.seed)
    n, hidden = x.shape
    # Centred and scaled to one per dimension while training; folded into the weights at the end.
    pick = torch.randperm(n)[:65536]
    some_x, some_y = x[pick].float(), y[pick].float()
    mean_x, mean_y = some_x.mean(0), some_y.mean(0)
    scale_x, scale_y = ((v - v.mean(0)).square().mean().rsqrt() for v in (some_x, some_y))

    # A feature starts as one training pair: it reads the direction of x and writes that of y.
    W_enc = torch.nn.functional.normalize(some_x[: args.features] - mean_x) * 0.1
    W_dec = torch.nn.functional.normalize(some_y[: args.features] - mean_y)
    b_enc, b_dec = torch.zeros(args.features), torch.zeros(hidden)
    params = [p.requires_grad_() for p in (W_enc, W_dec, b_enc, b_dec)]
    optimizer = torch.optim.Adam(params, lr=args.lr, betas=(0.9, 0.99), foreach=True)
    warm, decay = args.steps // 20 + 1, args.steps // 3 + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, 1.0, (args.steps - s) / decay)
    )
    idle, cut, order, start = torch.zeros(args.features), 0.0, torch.randperm(n), time.time()
    for step in range(args.steps):
        take = torch.arange(step * args.batch, (step + 1) * args.batch) % n
        xb, yb = (
            (x[order[take]].float() - mean_x) * scale_x,
            (y[order[take]].float() - mean_y) * scale_y,
        )
        act = torch.relu(xb @ W_enc.T + b_enc)
        active = act.detach()[act.detach() > 0]
        spare = len(active) - args.k * args.batch
        floor = active.kthvalue(spare).values if spare > 0 else 0.0
        kept = act * (act.detach() > floor)
        error = yb - kept @ W_dec - b_dec
        loss = error.square().sum(1).mean() / hidden

        idle = torch.where((kept.detach() > 0).any(0), 0.0, idle + args.batch)
        dead = (idle > args.dead_after).nonzero().flatten()
        if len(dead):  # the strongest dead features learn to explain what is still missing
            pre = xb @ W_enc[dead].T + b_enc[dead]
            top = pre.topk(min(len(dead), args.k_aux), dim=1)
            part = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()) @ W_dec[dead]
            loss = loss + (error.detach() - part).square().sum(1).mean() / hidden / 32

        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            W_dec.copy_(torch.nn.functional.normalize(W_dec))
            smallest = torch.where(kept > 0, kept, torch.inf).min().item()
            cut = smallest if step == 0 else 0.98 * cut + 0.02 * smallest
        if (step + 1) % 10 == 0 or step + 1 == args.steps:
            fvu = (error.square().sum() / (yb - yb.mean(0)).square().sum()).item()
            progress(
                name,
                step + 1,
                args.steps,
                start,
                f"FVU {fvu:.3f}, dead {len(dead) / args.features:.1%}",
            )

    # Raw inputs in, raw outputs out, and one threshold of 1.0.
    with torch.no_grad():
        stored_enc = (W_enc * (scale_x / cut)).bfloat16()
        return {
            "W_enc": stored_enc,
            "b_enc": (b_enc / cut - stored_enc.float() @ mean_x).bfloat16(),
            "W_dec": (W_dec * (cut / scale_y)).bfloat16(),
            "b_dec": (b_dec / scale_y + mean_y).bfloat16(),
        }


def encode(weights, x):
    act = torch.relu(x.float() @ weights["W_enc"].float().T + weights["b_enc"].float())
    return act * (act >= 1.0)


def measure(weights, x, y, args):
    """What the stored weights do on text they have not seen."""
    fired, active, missing = torch.zeros(args.features, dtype=torch.bool), 0, 0.0
    for at in range(0, len(x), args.batch):
        act = encode(weights, x[at : at + args.batch])
        error = (
            y[at : at + args.batch].float()
            - act @ weights["W_dec"].float()
            - weights["b_dec"].float()
        )
        fired |= (act > 0).any(0)
        active += (act > 0).sum().item()
        missing += error.square().sum().item()
    total = (y.float() - y.float().mean(0)).square().sum().item()
    return {
        "FVU": round(missing / total, 4),
        "L0": round(active / len(x), 2),
        "dead": round(1 - fired.float().mean().item(), 4),
    }


def describe(weights, x, tokens, tokenizer, args):
    """{feature: [[token, largest activation], ...]} of the four tokens that activate it most."""
    vocabulary = int(tokens.max()) + 1
    mass, peak = (torch.zeros(vocabulary * args.features) for _ in range(2))
    for at in range(0, len(x), args.batch):
        act = encode(weights, x[at : at + args.batch])
        row, feature = act.nonzero(as_tuple=True)
        entry, value = feature * vocabulary + tokens[at + row], act[row, feature]
        mass.index_add_(0, entry, value)
        peak.scatter_reduce_(0, entry, value, "amax")
    best = mass.view(args.features, vocabulary).topk(4)
    largest = peak.view(args.features, vocabulary).gather(1, best.indices)
    rows = zip(best.values.tolist(), best.indices.tolist(), largest.tolist(), strict=True)
    return {
        f: [[tokenizer.decode([t]), round(p, 1)] for m, t, p in zip(*row, strict=True) if m > 0]
        for f, row in enumerate(rows)
        if row[0][0] > 0
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--text",
        nargs="+",
        default=DEFAULT_TEXT,
        help="text files or folders, shell patterns allowed",
    )
    parser.add_argument("--out", type=Path, default=HERE / "transcoders")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="train nothing; measure the transcoders in --out anew",
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 10, 15, 20])
    parser.add_argument("--features", type=int, default=2304)
    parser.add_argument(
        "--k", type=int, default=32, help="features kept per token, on average over a batch"
    )
    parser.add_argument(
        "--k-aux", type=int, default=128, help="dead features per token that learn from the error"
    )
    parser.add_argument(
        "--dead-after",
        type=int,
        default=100_000,
        help="a feature is dead after that many idle tokens",
    )
    parser.add_argument("--tokens", type=int, default=520_000, help="tokens of text to read")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument(
        "--held-out", type=float, default=0.06, help="part of the documents kept for metrics.json"
    )
    parser.add_argument("--steps", type=int, default=480)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start = time.time()
    model, tokenizer = load_language_model(last_layer=max(args.layers))
    rng = random.Random(args.seed)
    windows, unseen = read_windows(
        args.text, tokenizer, args.tokens, args.held_out, args.window, rng
    )
    if windows[:, 1:].numel() < args.features and not args.measure:
        raise SystemExit(
            f"at least as many tokens to train on as --features {args.features} are needed, "
            f"got {windows[:, 1:].numel()}"
        )
    held_out = collect("reading held-out text", model, unseen, args.layers)
    metrics, metrics_file = {}, args.out / "metrics.json"

    def measure_layer(i, weights):
        metrics[i] = measure(weights, *held_out[i], args)
        print(f"layer {i} on {len(held_out[i][0])} tokens of held-out documents: {metrics[i]}")

    if args.measure:
        summary = json.loads(metrics_file.read_text())
        for i in args.layers:
            measure_layer(i, load_file(args.out / f"layer_{i}.safetensors"))
    else:
        args.out.mkdir(parents=True, exist_ok=True)
        data = collect("reading text", model, windows, args.layers)
        index = {}
        for i in args.layers:
            x, y = data.pop(i)
            weights = train_layer(f"layer {i}", x, y, args)
            save_file(weights, args.out / f"layer_{i}.safetensors")
            measure_layer(i, weights)
            index[i] = describe(weights, x, windows[:, 1:].flatten(), tokenizer, args)
        summary = {
            "model": "SmolLM2-135M-Instruct",
            "features": args.features,
            "training_tokens": len(x),
            "steps": args.steps,
            "tokens_per_step": args.batch,
        }
        hooks = "".join(f"{key}: {value}\n" for key, value in MLP_HOOKS.items())
        (args.out / "config.yaml").write_text(
            f"model_name: SmolLM2-135M-Instruct\nmodel_kind: transcoder_set\n{hooks}"
        )
        (args.out / "features.json").write_text(
            json.dumps(index, ensure_ascii=False, separators=(",", ":")) + "\n"
        )

    summary |= {"held_out_tokens": unseen[:, 1:].numel(), "layers": metrics}
    metrics_file.write_text(json.dumps(summary, indent=2) + "\n")
    done = "measured" if args.measure else "trained"
    minutes = (time.time() - start) / 60
    print(f"{len(args.layers)} transcoders in {args.out} {done}, {minutes:.0f} minutes")


if __name__ == "__main__":
    main()
