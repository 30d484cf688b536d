"""SAELens: cfg.json beside sae_weights.safetensors, W_enc stored [H, F].

``architecture`` declares the activation. The layout is that of
https://github.com/jbloomAus/SAELens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..weights import TranscoderWeights
from .files import Config, Loading, Tensors, layer_in, read_safetensors, short_hook
from .layout import Layout, one_file

# architecture -> (has thresholds, has a skip connection)
ARCHITECTURES = {
    "standard": (False, False),
    "jumprelu": (True, False),
    "topk": (False, False),
    "gated": (False, False),
    "transcoder": (False, False),
    "jumprelu_transcoder": (True, False),
    "skip_transcoder": (False, True),
    "jumprelu_skip_transcoder": (True, True),
}

# What says where and on what a coder was trained, in metadata since version 6.
KNOWN_METADATA = frozenset(
    "context_size dataset_path dataset_trust_remote_code exclude_special_tokens hf_hook_name "
    "hf_hook_name_out hook_head_index hook_head_index_out hook_layer hook_layer_out hook_name "
    "hook_name_out hook_point hook_point_head_index hook_point_layer model_class_name "
    "model_from_pretrained_kwargs model_name neuronpedia_id prepend_bos sae_lens_training_version "
    "sae_lens_version seqpos_slice sequence_separator_token".split()
)
KNOWN = KNOWN_METADATA | frozenset(
    "activation_fn activation_fn_kwargs activation_fn_str apply_b_dec_to_input architecture d_in "
    "d_out d_sae device dtype finetuning_scaling_factor from_pretrained_path k metadata "
    "normalize_activations rescale_acts_by_decoder_norm reshape_activations".split()
)
# Arguments of from_pretrained that leave the model's function as it is.
HARMLESS = ("n_devices", "device", "dtype", "trust_remote_code")


def layer_of(path: Path) -> int | None:
    config = Config(path.with_name("cfg.json"))
    layer = layer_in(
        _declared(config, "hook_name", str) or _declared(config, "hook_point", str) or ""
    )
    if layer is None:
        layer = _declared(config, "hook_layer", int)
    return layer if layer is None or layer >= 0 else None


def _declared(config: Config, name: str, kind: type) -> Any:
    """A value of metadata. Files older than version 6 have it beside the other options."""
    return config.within("metadata").get(name, kind, config.get(name, kind, None))


def load(layer: int, path: Path, loading: Loading) -> TranscoderWeights:
    config = Config(path.with_name("cfg.json"))
    architecture = config.get("architecture", str, "standard")
    k = None
    activation = config.get("activation_fn", str, config.get("activation_fn_str", str, "relu"))
    if activation == "topk" and architecture in ("standard", "topk"):  # Files older than version 6.
        architecture, k = "topk", config.within("activation_fn_kwargs").k()
    else:
        config.only("activation_fn", activation, ("relu",))
    config.only("architecture", architecture, tuple(ARCHITECTURES))
    has_threshold, has_skip = ARCHITECTURES[architecture]
    if architecture == "topk" and k is None:
        k = loading.k_of(config.path, config.k() if "k" in config.values else None)
    rescaled = config.get("rescale_acts_by_decoder_norm", bool, False)
    if architecture != "topk":
        config.must_be_off("rescale_acts_by_decoder_norm")
    config.must_be_off("finetuning_scaling_factor")
    normalize = config.values.get("normalize_activations")
    config.only(
        "normalize_activations", "none" if normalize in (None, False) else normalize, ("none",)
    )
    transcoder = "transcoder" in architecture
    centred = config.get("apply_b_dec_to_input", bool, not transcoder)
    if transcoder and centred:
        raise config.refuse(f"apply_b_dec_to_input of architecture {architecture} is not supported")

    tensors = read_safetensors(path)
    W_enc, W_dec = tensors.take("W_enc", 2).T, tensors.take("W_dec", 2).T
    threshold = tensors.take("threshold", 1) if has_threshold else None
    if architecture == "gated":
        W_enc, b_enc, threshold = _gated(W_enc, tensors)
    else:
        b_enc = tensors.take("b_enc", 1)
    if rescaled:
        W_enc, b_enc, W_dec = _rescaled(W_enc, b_enc, W_dec)
    b_dec = tensors.take("b_dec", 1)
    W_skip = tensors.take("W_skip", 2) if has_skip else None
    tensors.finish()
    config.sizes(d_in=W_enc.shape[1], d_sae=W_enc.shape[0])
    if transcoder:
        config.sizes(d_out=W_dec.shape[0])
    _tell(layer, config, loading)
    hook_in = _declared(config, "hook_name", str) or _declared(config, "hook_point", str) or ""
    hook_out = _declared(config, "hook_name_out", str) or ("" if transcoder else hook_in)
    return loading.weights(
        layer,
        path,
        W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        threshold=threshold,
        k=k,
        W_skip=W_skip,
        input_bias=b_dec if centred else None,
        hook_in=short_hook(hook_in, layer),
        hook_out=short_hook(hook_out, layer),
    )


def _gated(
    W_enc: torch.Tensor, tensors: Tensors
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W_enc [F, H], b_enc [F] and threshold [F] of the same coder as jumprelu.

    A gated coder is active where x @ w + b_gate > 0, with the value relu(r * (x @ w) + b_mag) for
    r = exp(r_mag) > 0. Both are affine in x @ w: with pre = r * (x @ w) + b_mag, the gate is
    pre > b_mag - r * b_gate.
    """
    b_gate, b_mag, r_mag = (tensors.take(name, 1) for name in ("b_gate", "b_mag", "r_mag"))
    if not b_gate.shape == b_mag.shape == r_mag.shape == W_enc.shape[:1]:
        return W_enc, b_gate, b_mag  # Their shapes are refused later.
    r = r_mag.double().exp()
    threshold = (b_mag.double() - r * b_gate.double()).float()
    return (W_enc.double() * r[:, None]).float(), b_mag, threshold


def _rescaled(
    W_enc: torch.Tensor, b_enc: torch.Tensor, W_dec: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W_enc [F, H], b_enc [F] and W_dec [d_out, F] with unit decoder directions.

    The project multiplies pre-activations by the lengths of the decoder directions before the
    top-k, and divides the activations by them where it decodes. A direction of length 0 is never
    active.
    """
    if W_dec.shape[1] != W_enc.shape[0] or b_enc.shape != W_enc.shape[:1]:
        return W_enc, b_enc, W_dec  # Its shape is refused later.
    norm = torch.linalg.vector_norm(W_dec, dim=0, dtype=torch.float32)
    unit = W_dec / torch.where(norm > 0, norm, 1.0)
    return W_enc * norm[:, None], b_enc * norm, unit


def _tell(layer: int, config: Config, loading: Loading) -> None:
    """What only the caller can do, and what is not known."""
    metadata = config.within("metadata")
    changes = _declared(config, "model_from_pretrained_kwargs", dict) or {}
    changes = {name: v for name, v in changes.items() if v and name not in HARMLESS}
    if changes:
        asked = ", ".join(f"{name}={value!r}" for name, value in sorted(changes.items()))
        loading.tell(
            layer,
            "model_from_pretrained_kwargs says that the coder was trained on a changed model: take "
            f"hidden states from TransformerLens' from_pretrained_no_processing(.., {asked}), not "
            "from the model as it is published",
        )
    head = _declared(config, "hook_head_index", int)
    if head is not None:
        loading.tell(layer, f"the coder reads head {head} of its hook point alone: pass that part")
    loading.tell_unknown(layer, config, KNOWN)
    loading.tell_unknown(layer, metadata, KNOWN_METADATA)


LAYOUT = Layout("SAELens", one_file("sae_weights.safetensors", "cfg.json"), layer_of, load)
