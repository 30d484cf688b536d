"""SAELens: cfg.json beside sae_weights.safetensors, W_enc stored [H, F].

``architecture`` declares the activation. The layout is that of
https://github.com/jbloomAus/SAELens.
"""

from __future__ import annotations

from pathlib import Path

from ..weights import TranscoderWeights
from .files import Config, Loading, layer_in, read_safetensors, short_hook
from .layout import Layout, one_file

# architecture -> (has thresholds, has a skip connection)
ARCHITECTURES = {
    "standard": (False, False),
    "jumprelu": (True, False),
    "topk": (False, False),
    "transcoder": (False, False),
    "jumprelu_transcoder": (True, False),
    "skip_transcoder": (False, True),
    "jumprelu_skip_transcoder": (True, True),
}


def layer_of(path: Path) -> int | None:
    return layer_in(_hook_name(Config(path.with_name("cfg.json"))))


def _hook_name(config: Config) -> str:
    """Where the hidden states come from. Older files have it beside the other options."""
    old = config.get("hook_name", str, config.get("hook_point", str, ""))
    name: str = config.within("metadata").get("hook_name", str, old)
    return name


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
    if architecture == "topk":
        k = k or config.k()
    config.must_be_off("rescale_acts_by_decoder_norm", "finetuning_scaling_factor")
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
    b_enc, b_dec = tensors.take("b_enc", 1), tensors.take("b_dec", 1)
    threshold = tensors.take("threshold", 1) if has_threshold else None
    W_skip = tensors.take("W_skip", 2) if has_skip else None
    tensors.finish()
    metadata = config.within("metadata")
    hook_out = metadata.get("hook_name_out", str, config.get("hook_name_out", str, ""))
    hook_in = _hook_name(config)
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
        hook_in=short_hook(hook_in),
        hook_out=short_hook(hook_out or ("" if transcoder else hook_in)),
    )


LAYOUT = Layout("SAELens", one_file("sae_weights.safetensors", "cfg.json"), layer_of, load)
