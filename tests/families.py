"""Tiny random models of every family that AutoModelForCausalLM of the installed transformers
makes."""

import warnings

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

H, VOCAB, LAYERS = 32, 97, 4
FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

WORDS = [
    (
        H,
        "hidden_size d_model n_embd dim embed_dim model_dim emb_dim decoder_hidden_size "
        "embedding_size",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
        "num_decoder_layers depth",
    ),
    (
        4,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads "
        "encoder_attention_heads",
    ),
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim"),
    (
        2,
        "num_key_value_heads num_kv_heads multi_query_group_num num_experts_per_tok moe_topk moe_k "
        "num_experts_per_token",
    ),
    (2, "top_k_experts"),
    (
        8,
        "head_dim attention_head_size global_head_dim swa_head_dim q_lora_rank kv_lora_rank "
        "o_lora_rank index_head_dim",
    ),
    (8, "qk_nope_head_dim v_head_dim rotary_dim hidden_size_per_layer_input linear_head_dim"),
    (
        64,
        "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff d_inner decoder_ffn_dim "
        "encoder_ffn_dim intermediate_size_mlp",
    ),
    (
        64,
        "moe_intermediate_size shared_expert_intermediate_size dense_intermediate_size "
        "expert_ffn_hidden_size dff",
    ),
    (
        64,
        "feed_forward_size block_ff_dim dim_ff shared_intermediate_size max_position_embeddings "
        "n_positions max_seq_len n_ctx",
    ),
    (64, "max_sequence_length"),
    (1, "n_group topk_group"),
    (VOCAB, "vocab_size vocab_size_per_layer_input"),
]
SIZES = {word: size for size, words in WORDS for word in words.split()}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# What the words above leave too large, or what a family asks to be consistent.
MLA = {"head_dim": 4, "num_key_value_heads": 4, "index_n_heads": 4, "index_topk": 4}
MORE = dict.fromkeys(
    "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa "
    "kimi_linear longcat_flash minicpm3 "
    "youtu".split(),
    MLA | {"num_experts_per_tok": 2},
)
MORE |= {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": {"head_dim": 8, "num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local"] * LAYERS},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "bailing_hybrid": MLA | {"n_group": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "xmod": {"default_language": "en_XX"},
    "kimi_linear": MLA | {"num_experts_per_tok": 2, "linear_num_heads": 4},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "falcon_h1": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_ssm": 64,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "chunk_size": 8, "n_groups": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "roc_bert": {"pronunciation_vocab_size": 97, "shape_vocab_size": 97},
}
# Not made: why.
SKIPPED = {
    "blt": "its layers are sized by several configurations that must fit one another",
    "cohere_compass_text": "its configuration makes no rotary embedding for its own layer types",
    "dots3_note": "its image part asks for sizes of its own",
    "gemma3n": "needs timm",
    "gemma4_assistant": "reads another model's hidden states",
    "gemma4_unified_assistant": "reads another model's hidden states",
    "musicgen": "AutoModelForCausalLM does not make it from its own configuration",
    "musicgen_melody": "AutoModelForCausalLM does not make it from its own configuration",
    "qwen4_exp": "its sparse attention asks for sizes of its own",
    "qwen4_exp_text": "its sparse attention asks for sizes of its own",
    "zamba": "its shared layers ask for more layers than a tiny model has",
    "zamba2": "its shared layers ask for more layers than a tiny model has",
}
if transformers.__version__.startswith("4."):
    SKIPPED |= dict.fromkeys(
        "emu3 llama4 mllama phi4_multimodal transfo-xl".split(),
        "its configuration of 4.x cannot be made small by these words",
    )
    SKIPPED |= {
        "granitemoehybrid": "needs layer types in 4.x",
        "qdqbert": "needs pytorch-quantization",
        "recurrent_gemma": "4.x keeps the state of the last batch in its modules, and fails for a "
        "batch of another size",
        "speech_to_text_2": "fails in its own initialisation in 4.x",
    }


def small(config):
    """{option: small value} of a configuration, and of those inside it."""
    found = {}
    for name, value in config.to_dict().items():
        inner = vars(config).get(name)
        if isinstance(inner, transformers.PretrainedConfig):
            found[name] = small(inner)
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif name in SIZES:
            found[name] = SIZES[name]
        elif name.endswith(("_token_id", "_token_index")):
            found[name] = TOKENS.get(name, VOCAB - 1)
    return found


def merged(one, other):
    both = dict(one)
    for name, value in other.items():
        both[name] = (
            merged(both[name], value)
            if isinstance(value, dict) and isinstance(both.get(name), dict)
            else value
        )
    return both


def made(kind):
    """A model in eval mode whose every weight is away from its start, so that no two places are
    equal by chance."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config_class = CONFIG_MAPPING[kind]
        config = config_class(**merged(small(config_class()), MORE.get(kind, {})))
        model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):  # Gemma 4 multiplies a layer's output by it
                buffer.mul_(0.7)
    return model.eval()
