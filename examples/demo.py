"""See what a language model's MLPs react to: a text in, its active transcoder features out, as a table and a web page.

    python examples/demo.py [--text "..."] [--out demo.html]

SmolLM2-135M-Instruct reads the text offline; the MLP inputs of all layers with a transcoder are encoded in one call,
compared with the float64 reference, timed, and printed. `train_transcoders.py` made the transcoders and the index of
feature labels.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from language_model import load_causal_model, mlp_traffic
from sparse_transcoder import SparseTranscoderEncoder, load_transcoders, reference

HERE = Path(__file__).resolve().parent
THRESHOLD = 1.0  # the transcoders were rescaled so that a feature is active from 1.0 on
STEERED = (20, 1431, 30.0)  # layer, feature and what is added to it
STEERED_TEXT = "The most important thing to know is that"
DEFAULT_TEXT = (
    "When the Eiffel Tower opened in Paris in 1889, no building in the world was taller. Painters and poets had called "
    "it useless; within a week, twelve thousand people a day were climbing its stairs. “I ought to be jealous of the "
    "tower,” said Gustave Eiffel. “She is more famous than I am.” Today you can print its 18,038 parts with a loop: "
    "for part in tower: print(part.name). My doctor, who never drinks coffee, paid $4.50 for a cup at the top and "
    "asked if I would marry her."
)


def step(text):
    print(f"[{time.perf_counter() - START:5.1f} s] {text}", flush=True)


def check(result, hidden, weights, top_k):
    """Largest error against the float64 reference; a wrong value, feature or count raises."""
    every = weights.W_enc.shape[0]
    values, indices, _ = reference.encode(hidden, weights, every, THRESHOLD, dtype=torch.float64)
    truth = torch.zeros_like(values).scatter(-1, indices, values)
    error = (result["activations"] - truth.gather(-1, result["indices"])).abs() / values[..., :top_k].clamp(min=1)
    order = (result["activations"] - values[..., :top_k]).abs() / values[..., :top_k].clamp(min=1)
    on_the_edge = ((truth >= THRESHOLD) & (truth < THRESHOLD + 1e-5)).sum(-1)
    miscounted = (result["sparsity"].double() * every - (truth > 0).sum(-1)).abs() > on_the_edge + 1e-3
    worst = max(error.max().item(), order.max().item())
    if worst > 1e-5 or miscounted.any():
        raise SystemExit(
            f"layer {result['layer']} differs from the reference: error {worst:.1e}, {miscounted.sum()} rows miscounted"
        )
    return worst


def reconstruct(result, weights):
    """[T, H]: the MLP output that the returned features explain."""
    rows = weights.W_dec.float().T[result["indices"]]  # [T, k, H]
    return (result["activations"].unsqueeze(-1) * rows).sum(-2) + weights.b_dec.float()


def dense_pipeline(hidden, dense, top_k):
    """What is usually written: every layer's full [rows, features] matrix, thresholded, then topk."""
    results = {}
    for i, x in hidden.items():
        W_enc, b_enc = dense[i]
        act = torch.relu(x @ W_enc.T + b_enc)
        kept = act >= THRESHOLD
        values, indices = torch.where(kept, act, 0.0).topk(top_k)
        results[i] = values, indices, kept.float().mean(-1)
    return results


def median_times(calls, runs=15, seconds=10):
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
    """The text of each token; a character spread over several tokens stands with the last of them."""
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
    """Features of one layer, strongest first: id, label, training tokens, and where in the text they fire."""
    fired = {}
    rows = zip(result["activations"].tolist(), result["indices"].tolist(), strict=True)
    for position, row in enumerate(rows):
        for value, feature in zip(*row, strict=True):
            if value > 0 and position > 0:  # position 0 holds the BOS token
                fired.setdefault(feature, []).append((position - 1, round(value, 2)))
    features = [
        {"id": f, "label": label(index.get(str(f), [])), "top": index.get(str(f), []), "at": at}
        for f, at in fired.items()
    ]
    return sorted(features, key=lambda f: (-max(v for _, v in f["at"]), f["id"]))


def steered(causal, tokenizer, encoder):
    """How STEERED_TEXT goes on, and how it does while STEERED is added in every forward pass: two texts."""
    layer, feature, strength = STEERED
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(STEERED_TEXT).input_ids]])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    plain = causal.generate(ids, **options)
    with encoder.intervene(causal, {layer: {feature: strength}}):
        changed = causal.generate(ids, **options)
    return [" ".join(tokenizer.decode(tokens[0, ids.shape[1] :]).split()) for tokens in (plain, changed)]


def write_page(path, tokens, layers):
    data = json.dumps({"tokens": tokens, "layers": layers}, ensure_ascii=False, separators=(",", ":"))
    page = (HERE / "page.html").read_text(encoding="utf-8")
    path.write_text(page.replace("{{data}}", data.replace("<", "\\u003c")), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=DEFAULT_TEXT)
    parser.add_argument("--out", type=Path, default=Path("demo.html"), help="the web page to write")
    parser.add_argument("--transcoders", type=Path, default=HERE / "transcoders")
    parser.add_argument("--top-k", type=int, default=64, help="features a token; the transcoders keep 32 on average")
    args = parser.parse_args()
    if not args.text.strip():
        parser.error("--text is empty")

    transcoders = load_transcoders(args.transcoders, device="cpu")
    index = json.loads((args.transcoders / "features.json").read_text(encoding="utf-8"))
    encoder = SparseTranscoderEncoder(transcoders, top_k=args.top_k, activation_threshold=THRESHOLD)
    names = ", ".join(map(str, transcoders))
    step(f"transcoders of layers {names} loaded; now the language model, its tokenizer first")

    causal, tokenizer = load_causal_model()
    model = causal.model
    step("SmolLM2-135M-Instruct loaded")

    whole = [tokenizer.bos_token_id, *tokenizer(args.text).input_ids]
    ids = whole[: model.config.max_position_embeddings]
    tokens = token_texts(ids[1:], tokenizer)
    traffic = mlp_traffic(model, torch.tensor([ids]), list(transcoders))
    hidden = {i: x[0] for i, (x, _) in traffic.items()}
    step(f"{len(tokens)} tokens read" + (f", the model takes no more of the {len(whole) - 1}" if whole != ids else ""))

    results = encoder.encode_all_layers(hidden)
    worst = max(check(results[i], hidden[i], transcoders[i], args.top_k) for i in hidden)
    step(f"{len(hidden)} layers encoded in one call; largest error against the float64 reference {worst:.1e}")

    repeated = {i: x.repeat(-(-1024 // len(x)), 1) for i, x in hidden.items()}
    dense = {i: (w.W_enc.float(), w.b_enc.float()) for i, w in transcoders.items()}
    ours, theirs = median_times(
        [lambda: encoder.encode_all_layers(repeated), lambda: dense_pipeline(repeated, dense, args.top_k)]
    )
    rows = len(next(iter(repeated.values())))
    ratio = f"{theirs / ours:.1f} times faster than the dense pipeline ({theirs:.1f} ms)"
    step(f"{len(hidden)} layers x {rows} tokens in {ours:.1f} ms, {ratio}")

    layers = []
    for i, result in results.items():
        output = traffic[i][1][0, 1:]
        error = output - reconstruct(result, transcoders[i])[1:]
        fvu = (error.square().sum() / (output - output.mean(0)).square().sum()).item()
        l0 = result["sparsity"][1:].mean().item() * transcoders[i].W_enc.shape[0]
        features = strongest(result, index[str(i)])
        layers.append({"layer": i, "l0": round(l0, 1), "fvu": round(fvu, 3), "features": features})
        print(f"\nlayer {i}: {l0:.1f} active features a token, reconstruction FVU {fvu:.3f}")
        for f in features[:6]:
            at = sorted(f["at"], key=lambda pv: -pv[1])[:4]
            fires = "  ".join(f"{visible(tokens[p])} {v:.1f}" for p, v in at)
            print(f"  {f['id']:>5}  {f['label']:<28}  {fires}")

    if STEERED[0] in transcoders and args.transcoders == HERE / "transcoders":  # the features of others mean something else
        plain, changed = steered(causal, tokenizer, encoder)
        name = label(index[str(STEERED[0])][str(STEERED[1])])
        print(f"\n{STEERED_TEXT} ...\n  {plain}\n  {changed}   [feature {STEERED[1]} of layer {STEERED[0]}, {name}, +{STEERED[2]:g}]")

    write_page(args.out, tokens, layers)
    page = args.out.resolve().as_uri()
    print(f"\n{len(tokens)} tokens encoded exactly in {len(layers)} layers of a real language model; open {page}")


START = time.perf_counter()
if __name__ == "__main__":
    main()
