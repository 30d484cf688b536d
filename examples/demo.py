"""See what a language model's MLPs react to: a text in, its active features out.

    python examples/demo.py [--text "..."] [--out demo.html]

SmolLM2-135M-Instruct reads the text offline. `encode_model` encodes the MLP inputs of all layers
that have a transcoder, `capture` reads what is compared, and `decode` reconstructs the MLP outputs.
The features are compared with the float64 reference, timed, and shown as a table and a web page.
`train_transcoders.py` made the transcoders and the index of feature labels.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from language_model import load_causal_model
from sparse_transcoder import SparseTranscoderEncoder, capture, load_transcoders, reference

HERE = Path(__file__).resolve().parent
THRESHOLD = 1.0  # The transcoders were rescaled so that a feature is active from 1.0 on.
STEERED = (20, 1431, 30.0)  # Layer, feature, and what is added to the feature.
STEERED_TEXT = "The most important thing to know is that"
DEFAULT_TEXT = (
    "When the Eiffel Tower opened in Paris in 1889, no building in the world was taller. Painters "
    "and poets had called it useless; within a week, twelve thousand people a day were climbing "
    "its stairs. “I ought to be jealous of the tower,” said Gustave Eiffel. “She is more famous "
    "than I am.” Today you can print its 18,038 parts with a loop: for part in tower: "
    "print(part.name). My doctor, who never drinks coffee, paid $4.50 for a cup at the top and "
    "asked if I would marry her."
)


def step(text):
    print(f"[{time.perf_counter() - START:5.1f} s] {text}", flush=True)


def check(result, hidden, weights, top_k):
    """Largest error against the float64 reference; a wrong value, feature or count raises."""
    every = weights.W_enc.shape[0]
    values, indices, _ = reference.encode(hidden, weights, every, THRESHOLD, dtype=torch.float64)
    truth = torch.zeros_like(values).scatter(-1, indices, values)
    best = values[..., :top_k]
    error = (result["activations"] - truth.gather(-1, result["indices"])).abs() / best.clamp(min=1)
    order = (result["activations"] - best).abs() / best.clamp(min=1)
    on_the_edge = ((truth >= THRESHOLD) & (truth < THRESHOLD + 1e-5)).sum(-1)
    count = result["sparsity"].double() * every
    miscounted = (count - (truth > 0).sum(-1)).abs() > on_the_edge + 1e-3
    largest = max(error.max().item(), order.max().item())
    if largest > 1e-5 or miscounted.any():
        raise SystemExit(
            f"layer {result['layer']} differs from the reference: error {largest:.1e}, "
            f"{miscounted.sum()} rows miscounted"
        )
    return largest


def dense_pipeline(hidden, dense, top_k):
    """What is usually written: a dense [rows, features] matrix per layer, its threshold, topk."""
    results = {}
    for i, x in hidden.items():
        W_enc, b_enc = dense[i]
        act = torch.relu(x @ W_enc.T + b_enc)
        kept = act >= THRESHOLD
        values, indices = torch.where(kept, act, 0.0).topk(top_k)
        results[i] = values, indices, kept.float().mean(-1)
    return results


def median_times(calls, runs=11, seconds=10):
    """Median milliseconds of each call, the calls taking turns, after one untimed turn."""
    times, end = [[] for _ in calls], time.perf_counter() + seconds
    for run in range(runs + 1):
        for call, store in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            store.append((time.perf_counter() - start) * 1e3)
        if run > 2 and time.perf_counter() > end:
            break
    return [statistics.median(t[1:]) for t in times]


def token_texts(ids, tokenizer):
    """The text of each token. A character of several tokens stands with the last of them."""
    texts, pending = [], []
    for t in ids:
        pending.append(t)
        text = tokenizer.decode(pending)
        whole = not text.endswith("\ufffd") or len(pending) == 4
        texts.append(text if whole else "")
        pending = [] if whole else pending
    return texts


def visible(token):
    shown = token.strip(" ").replace("\n", "⏎").replace("\t", "⇥")
    return shown or "␣" * max(len(token), 1)


def label(top_tokens):
    """The one or two most characteristic tokens of a feature, spelling variants taken together."""
    names = dict.fromkeys(visible(token).casefold() for token, _ in top_tokens)
    return " · ".join(list(names)[:2]) or "(rare)"


def strongest(result, index):
    """Features of one layer, strongest first: id, label, training tokens, and where they fire."""
    fired = {}
    rows = zip(result["activations"].tolist(), result["indices"].tolist(), strict=True)
    for position, row in enumerate(rows):
        for value, feature in zip(*row, strict=True):
            if value > 0 and position > 0:  # Position 0 holds the BOS token.
                fired.setdefault(feature, []).append((position - 1, round(value, 2)))
    features = []
    for f, at in fired.items():
        top = index.get(str(f), [])
        features.append({"id": f, "label": label(top), "top": top, "at": at})
    return sorted(features, key=lambda f: (-max(v for _, v in f["at"]), f["id"]))


def steered(model, tokenizer, encoder):
    """How STEERED_TEXT goes on, plain and with STEERED added in every forward pass: two texts."""
    layer, feature, strength = STEERED
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(STEERED_TEXT).input_ids]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(ids, pad_token_id=0, **options)
    with encoder.intervene(model, {layer: {feature: strength}}):
        changed = model.generate(ids, pad_token_id=0, **options)
    texts = (tokenizer.decode(tokens[0, ids.shape[1] :]) for tokens in (plain, changed))
    return [" ".join(text.split()) for text in texts]


def write_page(path, tokens, layers):
    data = json.dumps(
        {"tokens": tokens, "layers": layers}, ensure_ascii=False, separators=(",", ":")
    )
    page = (HERE / "page.html").read_text(encoding="utf-8")
    path.write_text(page.replace("{{data}}", data.replace("<", "\\u003c")), encoding="utf-8")


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--text", default=DEFAULT_TEXT)
    parser.add_argument("--out", type=Path, default=Path("demo.html"), help="the web page to write")
    parser.add_argument("--transcoders", type=Path, default=HERE / "transcoders")
    parser.add_argument(
        "--top-k",
        type=int,
        default=64,
        help="features per token; the transcoders keep 32 on average",
    )
    args = parser.parse_args()
    if not args.text.strip():
        parser.error("--text is empty")

    transcoders = load_transcoders(args.transcoders, device="cpu")
    index = json.loads((args.transcoders / "features.json").read_text(encoding="utf-8"))
    encoder = SparseTranscoderEncoder(transcoders, top_k=args.top_k, activation_threshold=THRESHOLD)
    names = ", ".join(map(str, transcoders))
    step(f"transcoders of layers {names} loaded; now the language model, its tokenizer first")

    model, tokenizer = load_causal_model()
    step("SmolLM2-135M-Instruct loaded")

    whole = [tokenizer.bos_token_id, *tokenizer(args.text).input_ids]
    ids = whole[: model.config.max_position_embeddings]
    tokens = token_texts(ids[1:], tokenizer)
    batch = torch.tensor([ids])
    results = encoder.encode_model(model, batch)
    cut = f", the model takes no more of the {len(whole) - 1}" if whole != ids else ""
    step(f"{len(tokens)} tokens read and encoded in {len(results)} layers{cut}")

    hidden = capture(model, batch, results).hidden
    outputs = capture(model, batch, results, hook="mlp.hook_out").hidden
    largest = max(check(results[i], hidden[i], transcoders[i], args.top_k) for i in results)
    step(f"compared with the float64 reference, largest error {largest:.1e}")

    repeated = {i: x.repeat(-(-1024 // len(x)), 1) for i, x in hidden.items()}
    dense = {i: (w.W_enc.float(), w.b_enc.float()) for i, w in transcoders.items()}
    ours, theirs = median_times(
        [
            lambda: encoder.encode_all_layers(repeated),
            lambda: dense_pipeline(repeated, dense, args.top_k),
        ]
    )
    rows = len(next(iter(repeated.values())))
    ratio = f"{theirs / ours:.1f} times faster than the dense pipeline ({theirs:.1f} ms)"
    step(f"{len(hidden)} layers x {rows} tokens in {ours:.1f} ms, {ratio}")

    layers = []
    for i, result in results.items():
        output = outputs[i][1:]
        error = output - encoder.decode(i, result)[1:]
        fvu = (error.square().sum() / (output - output.mean(0)).square().sum()).item()
        l0 = result["sparsity"][1:].mean().item() * transcoders[i].W_enc.shape[0]
        features = strongest(result, index[str(i)])
        layers.append({"layer": i, "l0": round(l0, 1), "fvu": round(fvu, 3), "features": features})
        print(f"\nlayer {i}: {l0:.1f} active features per token, reconstruction FVU {fvu:.3f}")
        for f in features[:6]:
            at = sorted(f["at"], key=lambda pv: -pv[1])[:4]
            fires = "  ".join(f"{visible(tokens[p])} {v:.1f}" for p, v in at)
            print(f"  {f['id']:>5}  {f['label']:<28}  {fires}")

    if args.transcoders == HERE / "transcoders":  # In others, a feature means something else.
        layer, feature, strength = STEERED
        plain, changed = steered(model, tokenizer, encoder)
        name = label(index[str(layer)][str(feature)])
        print(f"\n{STEERED_TEXT} ...\n  {plain}\n  {changed}")
        print(
            f"  (the latter with {strength:g} added to feature {feature} of layer {layer}, {name})"
        )

    write_page(args.out, tokens, layers)
    page = args.out.resolve().as_uri()
    print(
        f"\n{len(tokens)} tokens encoded exactly in {len(layers)} layers of a real language model; "
        f"open {page}"
    )


START = time.perf_counter()
if __name__ == "__main__":
    main()
