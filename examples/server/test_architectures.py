"""The places of every architecture, against Hugging Face: a tiny random model of each is written as
a float32 GGUF, and what the server reads of it is compared with `capture`.
"""

import os

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from sparse_transcoder import capture
from test_server import MODEL, PROMPTS, Server, rows_of

H, LAYERS, HEADS, HEAD_DIM, MLP = 64, 3, 4, 16, 128
SIZES = {
    "hidden_size": H,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "intermediate_size": MLP,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 0,
}
GPT2 = {"n_embd": H, "n_layer": LAYERS, "n_head": HEADS, "n_inner": MLP, "n_positions": 256}
GEMMA = {**SIZES, "head_dim": HEAD_DIM, "hidden_act": "gelu_pytorch_tanh"}
GEMMA2 = {**GEMMA, "query_pre_attn_scalar": HEAD_DIM, "sliding_window": 128}
MINISTRAL3 = {
    **SIZES,
    "head_dim": HEAD_DIM,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 256,
        "llama_4_scaling_beta": 0.0,  # no scaling of queries by their positions
    },
}
PLACES = ["mlp.hook_in", "hook_resid_mid", "hook_resid_post"]
# {architecture: (Hugging Face's configuration, its arguments, places)}
ARCHITECTURES = {
    "llama": ("LlamaConfig", SIZES, PLACES),
    "qwen2": ("Qwen2Config", SIZES, PLACES),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": HEAD_DIM}, PLACES),
    "smollm3": ("SmolLM3Config", {**SIZES, "no_rope_layers": [1, 1, 1]}, PLACES),
    "gpt2": ("GPT2Config", GPT2, PLACES),
    "mistral3": ("Ministral3Config", MINISTRAL3, PLACES),
    "phi3": ("Phi3Config", {**SIZES, "sliding_window": 128}, ["mlp.hook_in", "hook_resid_post"]),
    "gemma": ("GemmaConfig", GEMMA, PLACES),
    "gemma2": ("Gemma2Config", GEMMA2, PLACES),
    "gemma3": ("Gemma3TextConfig", GEMMA2, PLACES),
}
GELU = {"gpt2", "gemma", "gemma2", "gemma3"}  # which ggml reads from a table of float16
ROPE_PAIRS_APART = {
    "llama",
    "mistral3",
    "smollm3",
}  # llama.cpp pairs neighbours


def tiny_model(architecture, vocabulary):
    """A model whose weights and norms are all random, so that no two places are alike."""
    name, arguments, _ = ARCHITECTURES[architecture]
    config = getattr(transformers, name)(vocab_size=vocabulary, **arguments)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            values = torch.randn(weight.shape, generator=generator)
            if "norm" in name or "ln_" in name:
                values = values / 4 + (0 if architecture.startswith("gemma") else 1)
            elif weight.dim() == 2 and "embed" not in name and "wte" not in name:
                values = values / weight.shape[-1] ** 0.5
            weight.copy_(values)
    return model


def write_gguf(model, architecture, path):
    """The model and SmolLM2's tokenizer in one float32 file."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in gguf.GGUFReader(MODEL).fields.items():
        if name.startswith("tokenizer."):
            item = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], item)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_context_length(256)
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(H)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(model.config.layer_norm_epsilon)
    else:
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_dimension_count(HEAD_DIM)
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
        rope = model.config.rope_parameters
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if getattr(model.config, "sliding_window", None):
        writer.add_sliding_window(model.config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(model.config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(model.config.final_logit_softcapping)
    kind = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, LAYERS)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        values = weight.float()
        if architecture == "gpt2" and name.endswith(
            ("c_attn.weight", "c_proj.weight", "c_fc.weight")
        ):
            values = values.T
        if architecture.startswith("gemma") and "norm" in name:
            values = values + 1
        if architecture in ROPE_PAIRS_APART and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = values.view(-1, 2, HEAD_DIM // 2, H).transpose(1, 2).reshape(-1, H)
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target, f"{architecture}: no name for {name}"
        writer.add_tensor(target, np.ascontiguousarray(values.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_transcoders(folder, place):
    folder.mkdir()
    W = torch.randn(32, H, generator=torch.Generator().manual_seed(2))
    for layer in range(LAYERS):
        tensors = {"W_enc": W, "b_enc": torch.zeros(32), "W_dec": W * 1, "b_dec": torch.zeros(H)}
        save_file(tensors, folder / f"layer_{layer}.safetensors")
    (folder / "config.yaml").write_text(
        f"model_kind: transcoder_set\nfeature_input_hook: {place}\nfeature_output_hook: {place}\n"
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_places_are_those_of_hugging_face(architecture, tmp_path):
    file = os.path.split(MODEL)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file[0], gguf_file=file[1])
    model = tiny_model(architecture, len(tokenizer))
    path = tmp_path / "tiny.gguf"
    write_gguf(model, architecture, path)
    ids = torch.tensor([tokenizer(PROMPTS[0]).input_ids])
    tolerance = 1e-3 if architecture in GELU else 1e-5
    for place in ARCHITECTURES[architecture][2]:
        expected = capture(model, ids, range(LAYERS), place).hidden
        transcoders = tmp_path / place
        write_transcoders(transcoders, place)
        dump = tmp_path / f"{place}-rows"
        dump.mkdir()
        with Server("--dump", dump, model=path, transcoders=transcoders) as server:
            body = {"prompt": PROMPTS[0], "max_tokens": 0, "features": {"prompt": True}}
            _, headers = server.post("/v1/completions", body)
            for layer in range(LAYERS):
                rows = rows_of(dump, headers["X-Request-Id"], layer, H)
                error = (rows - expected[layer]).norm(dim=1) / expected[layer].norm(dim=1)
                assert error.max() <= tolerance, f"{place}, layer {layer}: {error.max()}"
