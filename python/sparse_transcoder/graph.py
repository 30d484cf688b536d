"""Attribution graphs in the JSON that circuit-tracer's viewer and Neuronpedia read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from . import _arguments as check
from .prompts import Exclude, excluded

VIEWER_LAYERS = 27
"""The layers that circuit-tracer's viewer has rows for in a graph without a logit node."""

FEATURE_TYPE = "cross layer transcoder"
"""The viewer's name for a transcoder's feature, also of a transcoder that writes to one layer."""


def node_id(layer: int, feature: int, ctx_idx: int, batch_idx: int | None = None) -> str:
    """The id of a feature's node; with ``batch_idx`` where features of several prompts meet."""
    batch = "" if batch_idx is None else f"{batch_idx}_"
    return f"{layer}_{batch}{feature}_{ctx_idx}"


def attribution_feature(
    layer: int, feature: int, ctx_idx: int, batch_idx: int, activation: float, *, many_prompts: bool
) -> dict[str, Any]:
    """One entry of :meth:`SparseTranscoderEncoder.extract_attribution_features`."""
    return {
        "node_id": node_id(layer, feature, ctx_idx, batch_idx if many_prompts else None),
        "feature": feature,
        "layer": str(layer),
        "batch_idx": batch_idx,
        "ctx_idx": ctx_idx,
        "feature_type": FEATURE_TYPE,
        "influence": activation,
        "activation": activation,
    }


def graph_json(
    features: Iterable[Mapping[str, Any]],
    tokens: Sequence[str],
    *,
    slug: str = "graph",
    scan: str = "",
    links: Iterable[tuple[str, str, float]] = (),
    token_ids: Sequence[int] | torch.Tensor | Mapping[str, Any] | None = None,
    logits: Iterable[tuple[int, str, float]] = (),
    errors: Iterable[tuple[int, int]] = (),
    n_layers: int | None = None,
    labels: Mapping[tuple[int, int], str] | None = None,
    prompt: str | None = None,
    node_threshold: float | None = None,
    batch_idx: int | None = None,
    exclude: Exclude | None = None,
) -> dict[str, Any]:
    """The graph of one prompt as a dict for ``json.dump``, with schema_version 1.

    The schema is that of circuit-tracer (https://github.com/safety-research/circuit-tracer) and
    Neuronpedia. A feature's node has the id ``{layer}_{feature}_{ctx_idx}``. Its ``feature`` is the
    Cantor pair of layer and feature, which needs up to 64 bits. Its ``influence`` is the share of
    the influence that this feature and all stronger features hold: the viewer shows a node when
    that share is at most its pruning threshold. The viewer takes the number of layers from the
    logit nodes, and 27 where there are none: a deeper graph without ``logits`` gets one logit node
    with no text and probability 0.

    Args:
        features: a result of :meth:`SparseTranscoderEncoder.extract_attribution_features`, or dicts
            with ``layer``, ``feature``, ``ctx_idx``, ``activation``, and optionally ``influence``
            (else the activation counts) and ``batch_idx`` (else 0).
        tokens: the prompt's T tokens as text.
        slug: the name of the graph.
        scan: the name of the model or transcoders, by which the viewer finds descriptions.
        links: (source node_id, target node_id, weight) of each edge.
        token_ids: the T ids of the tokens: integers, a tensor or a tokenizer's result. Each adds an
            embedding node ``E_{id}_{ctx_idx}``.
        logits: (token id, token, probability) of each predicted token, the target first. Each adds
            a node ``{n_layers + 1}_{id}_{T - 1}``.
        errors: (layer, ctx_idx) of each place whose reconstruction error takes part. Each adds a
            node ``0_{layer}_{ctx_idx}``; circuit-tracer's ids of these are like those of layer 0's
            features, so that feature 0_3_5 and the error of layer 3 at 5 cannot both be there.
        n_layers: the number of the model's layers. None counts up to the last layer of a feature
            or error.
        labels: {(layer, feature): text} for ``clerp``.
        prompt: the text. None joins the tokens.
        node_threshold: the pruning that the viewer starts with, 0 to 1.
        batch_idx: the prompt to take, where the features come from several.
        exclude: positions whose features, and the links of these, are left out: a mask [T] that is
            true there, a set of ids among ``token_ids``, or "special", which is what a tokenizer's
            result marks. So are errors there; the embedding nodes stay.

    Raises:
        ValueError: features come from several prompts and ``batch_idx`` is None, a position is
            beyond the tokens, a number is not finite, a node appears twice, or a link names a node
            that is not there.
        KeyError: a feature lacks a key.

    Example:
        >>> found = encoder.extract_attribution_features(hidden)
        >>> json.dump(graph_json(found, tokens, slug="cats", scan="gemma-2-2b"), file)
    """
    chosen = list(features)
    prompts = sorted({int(f.get("batch_idx", 0)) for f in chosen})
    if batch_idx is not None:
        chosen = [f for f in chosen if int(f.get("batch_idx", 0)) == batch_idx]
    elif len(prompts) > 1:
        names = ", ".join(map(str, prompts))
        raise ValueError(f"batch_idx must choose one prompt, features come from {names}")
    if node_threshold is not None and not 0 <= node_threshold <= 1:
        raise ValueError(f"node_threshold must be 0 to 1, got {node_threshold}")
    ids = [] if token_ids is None else _ids(token_ids, len(tokens))
    places = [(check.integer("layer", i), check.integer("ctx_idx", j)) for i, j in errors]
    for layer, position in places:
        if layer < 0 or not 0 <= position < len(tokens):
            raise ValueError(
                f"an error's layer must be at least 0 and its ctx_idx 0 to {len(tokens) - 1}, "
                f"got {layer} and {position}"
            )
    dropped: set[str] = set()
    if exclude is not None:
        out = excluded(exclude, (1, len(tokens)), token_ids)[0].nonzero().flatten().tolist()
        left = [f for f in chosen if int(f["ctx_idx"]) not in out]
        dropped, chosen = {_id_of(f) for f in chosen} - {_id_of(f) for f in left}, left
        dropped |= {_error_id(*place) for place in places if place[1] in out}
        places = [place for place in places if place[1] not in out]

    nodes = [
        _feature_node(f, share, len(tokens), labels or {})
        for f, share in zip(chosen, _shares(chosen), strict=True)
    ]
    nodes += [
        _node(
            _error_id(layer, position),
            f"{layer}_{position}-0",
            -1,
            str(layer),
            position,
            "mlp reconstruction error",
        )
        for layer, position in places
    ]
    nodes += [
        _node(
            f"E_{token}_{position}", f"E_{token}-{position}", position, "E", position, "embedding"
        )
        for position, token in enumerate(ids)
    ]
    last = max([int(f["layer"]) for f in chosen] + [layer for layer, _ in places], default=-1)
    count = last + 1 if n_layers is None else n_layers
    if count <= last:
        raise ValueError(f"n_layers must be above the graph's last layer {last}, got {n_layers}")
    end = len(tokens) - 1
    for rank, (token, text, probability) in enumerate(logits):
        if end < 0:
            raise ValueError("logits must follow at least one token, got none")
        probability = _finite("a logit's probability", probability)
        nodes.append(
            _node(
                f"{count + 1}_{token}_{end}",
                f"L_{token}-{end}",
                token,
                str(count + 1),
                end,
                "logit",
            )
            | {
                "token_prob": probability,
                "is_target_logit": rank == 0,
                "clerp": f'Output "{text}" (p={probability:.3f})',
            }
        )

    if count > VIEWER_LAYERS and end >= 0 and nodes[-1]["feature_type"] != "logit":
        logit_id = f"{count + 1}_-1_{end}"
        nodes.append(_node(logit_id, f"L_-1-{end}", -1, str(count + 1), end, "logit"))

    known: set[str] = set()
    for node in nodes:
        if node["node_id"] in known:
            raise ValueError(f"node {node['node_id']} must appear once, got it twice")
        known.add(node["node_id"])
    edges = []
    for source, target, weight in links:
        if source in dropped or target in dropped:
            continue
        for end_id in (source, target):
            if end_id not in known:
                raise ValueError(f"a link must join nodes of the graph, got {end_id}")
        edges.append(
            {"source": source, "target": target, "weight": _finite("a link's weight", weight)}
        )

    metadata: dict[str, Any] = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": [str(token) for token in tokens],
        "prompt": "".join(map(str, tokens)) if prompt is None else prompt,
        "schema_version": 1,
    }
    if node_threshold is not None:
        metadata["node_threshold"] = float(node_threshold)
    return {
        "metadata": metadata,
        "qParams": {
            "pinnedIds": [],
            "supernodes": [],
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": edges,
    }


def _ids(token_ids: Any, count: int) -> list[int]:
    if isinstance(token_ids, Mapping):
        token_ids = token_ids["input_ids"]
    if isinstance(token_ids, torch.Tensor):
        if token_ids.ndim == 2 and token_ids.shape[0] == 1:
            token_ids = token_ids[0]
        if token_ids.ndim != 1:
            raise ValueError(f"token_ids must be those of one prompt, got {list(token_ids.shape)}")
    if len(token_ids) != count:
        raise ValueError(f"token_ids must be {count} as tokens, got {len(token_ids)}")
    return [int(token) for token in token_ids]


def _id_of(entry: Mapping[str, Any]) -> str:
    return node_id(int(entry["layer"]), int(entry["feature"]), int(entry["ctx_idx"]))


def _error_id(layer: int, ctx_idx: int) -> str:
    return f"0_{layer}_{ctx_idx}"


def cantor_pair(layer: int, feature: int) -> int:
    """One integer for two integers that are not negative."""
    diagonal = layer + feature
    return diagonal * (diagonal + 1) // 2 + feature


def cantor_unpair(pair: int) -> tuple[int, int]:
    """The layer and the feature that :func:`cantor_pair` made one integer of."""
    diagonal = (math.isqrt(8 * pair + 1) - 1) // 2
    feature = pair - diagonal * (diagonal + 1) // 2
    return diagonal - feature, feature


def _feature_node(
    entry: Mapping[str, Any], share: float, n_tokens: int, labels: Mapping[tuple[int, int], str]
) -> dict[str, Any]:
    layer, feature, position = int(entry["layer"]), int(entry["feature"]), int(entry["ctx_idx"])
    if layer < 0 or feature < 0:
        raise ValueError(f"layer and feature must not be negative, got {layer} and {feature}")
    if not 0 <= position < n_tokens:
        raise ValueError(
            f"ctx_idx of feature {layer}_{feature} must be 0 to {n_tokens - 1} as tokens, "
            f"got {position}"
        )
    pair = cantor_pair(layer, feature)
    if pair >= 2**63:
        raise ValueError(f"feature {layer}_{feature} does not fit 64 bits as a Cantor pair")
    js_id = f"{layer}_{feature}-0"
    node = _node(node_id(layer, feature, position), js_id, pair, str(layer), position, FEATURE_TYPE)
    return node | {
        "clerp": labels.get((layer, feature), ""),
        "influence": share,
        "activation": _finite("activation", entry["activation"]),
    }


def _node(
    identity: str, js_id: str, feature: int, layer: str, position: int, kind: str
) -> dict[str, Any]:
    return {
        "node_id": identity,
        "jsNodeId": js_id,
        "feature": int(feature),
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "clerp": "",
        "influence": None,
        "activation": None,
    }


def _shares(features: Sequence[Mapping[str, Any]]) -> list[float]:
    """For each feature, the share of all influence that it and the stronger features hold."""
    strengths = [abs(_finite("influence", f.get("influence", f["activation"]))) for f in features]
    total = math.fsum(strengths)
    shares = [0.0] * len(strengths)
    running = 0.0
    for position in sorted(range(len(strengths)), key=lambda i: -strengths[i]):
        running += strengths[position]
        shares[position] = min(running / total, 1.0) if total else 1.0
    return shares


def _finite(name: str, value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number
