"""Attribution graph export: the viewer's schema, by hand and by circuit-tracer's own models."""

import itertools
import json
import math

import pytest
import torch
from sparse_transcoder import SparseTranscoderEncoder, TranscoderWeights, graph_json
from sparse_transcoder.graph import cantor_pair, cantor_unpair

TOKENS = ["The", " cat", " sat", "\n"]
NODE_FIELDS = {
    "node_id": str,
    "jsNodeId": str,
    "feature": int,
    "layer": str,
    "ctx_idx": int,
    "feature_type": str,
    "token_prob": float,
    "is_target_logit": bool,
    "run_idx": int,
    "reverse_ctx_idx": int,
    "clerp": str,
}


def feature(layer, index, position, activation, **more):
    return {
        "layer": str(layer),
        "feature": index,
        "ctx_idx": position,
        "activation": activation,
    } | more


def full_graph(**changes):
    arguments = {
        "slug": "cats",
        "scan": "a-model",
        "links": [
            ("E_11_0", "0_3_0", 0.5),
            ("0_3_0", "25_163839_3", -2),
            ("25_163839_3", "27_7_3", 1.25),
        ],
        "token_ids": [11, 12, 13, 14],
        "logits": [(7, " mat", 0.75), (8, " hat", 0.25)],
        "n_layers": 26,
        "labels": {(0, 3): "cats"},
        "node_threshold": 0.8,
    }
    features = [feature(0, 3, 0, 1.0), feature(25, 163839, 3, 3.0)]
    return graph_json(features, TOKENS, **(arguments | changes))


def encoded_features():
    torch.manual_seed(0)
    weights = {layer: TranscoderWeights(torch.randn(48, 8), torch.randn(48)) for layer in (0, 3)}
    encoder = SparseTranscoderEncoder(weights, top_k=5, activation_threshold=0.1)
    return encoder.extract_attribution_features(
        {layer: torch.randn(1, 4, 8) for layer in weights}, top_k_global=20
    )


def test_schema_by_hand():
    graph = full_graph()
    assert json.loads(json.dumps(graph, allow_nan=False)) == graph
    assert list(graph) == ["metadata", "qParams", "nodes", "links"]
    assert graph["metadata"] == {
        "slug": "cats",
        "scan": "a-model",
        "transcoder_list": [],
        "prompt_tokens": TOKENS,
        "prompt": "The cat sat\n",
        "schema_version": 1,
        "node_threshold": 0.8,
    }
    assert graph["qParams"] == {
        "pinnedIds": [],
        "supernodes": [],
        "linkType": "both",
        "clickedId": "",
        "sg_pos": "",
    }
    for node in graph["nodes"]:
        assert {name: type(node[name]) for name in NODE_FIELDS} == NODE_FIELDS
    assert [n["node_id"] for n in graph["nodes"]] == [
        "0_3_0", "25_163839_3", "E_11_0", "E_12_1", "E_13_2", "E_14_3", "27_7_3", "27_8_3",
    ]  # fmt: skip
    assert [n["jsNodeId"] for n in graph["nodes"]][:3] == ["0_3-0", "25_163839-0", "E_11-0"]
    assert graph["nodes"][0]["clerp"] == "cats"
    assert graph["nodes"][6]["clerp"] == 'Output " mat" (p=0.750)'
    assert [n["is_target_logit"] for n in graph["nodes"]] == [False] * 6 + [True, False]
    assert graph["links"][1] == {"source": "0_3_0", "target": "25_163839_3", "weight": -2.0}


def test_threshold_is_left_out_where_none_is_given():
    assert (
        "node_threshold" not in full_graph(node_threshold=None)["metadata"]
    )  # Neuronpedia's schema refuses null


@pytest.mark.parametrize(
    ("layer", "index"), [(0, 0), (0, 1), (1, 0), (25, 163839), (127, 2**21), (3, 2**31)]
)
def test_cantor_pair(layer, index):
    node = graph_json([feature(layer, index, 0, 1.0)], TOKENS)["nodes"][0]
    assert node["feature"] == (layer + index) * (layer + index + 1) // 2 + index
    assert cantor_unpair(node["feature"]) == (layer, index)


def test_cantor_pair_is_exact_up_to_64_bits():
    for index in (2**32 - 5, 4_294_967_000):
        assert cantor_unpair(cantor_pair(7, index)) == (7, index)
    with pytest.raises(ValueError, match="64 bits"):
        graph_json([feature(0, 2**32, 0, 1.0)], TOKENS)


def test_influence_is_the_share_that_the_stronger_features_hold():
    features = [feature(0, 1, 0, 1.0), feature(0, 2, 0, 6.0), feature(0, 3, 0, 3.0)]
    assert [n["influence"] for n in graph_json(features, TOKENS)["nodes"]] == pytest.approx(
        [1.0, 0.6, 0.9]
    )
    features[0]["influence"] = 11.0
    assert [n["influence"] for n in graph_json(features, TOKENS)["nodes"]] == pytest.approx(
        [0.55, 0.85, 1.0]
    )
    assert [n["activation"] for n in graph_json(features, TOKENS)["nodes"]] == [1.0, 6.0, 3.0]


def test_features_of_the_encoder():
    features = encoded_features()
    nodes = graph_json(features, TOKENS)["nodes"]
    assert len(nodes) == 20
    assert [n["node_id"] for n in nodes] == [f["node_id"] for f in features]
    assert [n["activation"] for n in nodes] == [f["activation"] for f in features]
    assert [cantor_unpair(n["feature"]) for n in nodes] == [
        (int(f["layer"]), f["feature"]) for f in features
    ]
    assert all(a["influence"] <= b["influence"] for a, b in itertools.pairwise(nodes))
    assert math.isclose(nodes[-1]["influence"], 1.0)


def test_one_prompt_of_a_batch():
    features = [feature(0, 1, 0, 1.0, batch_idx=0), feature(0, 1, 0, 2.0, batch_idx=2)]
    with pytest.raises(
        ValueError, match="batch_idx must choose one prompt, features come from 0, 2"
    ):
        graph_json(features, TOKENS)
    (node,) = graph_json(features, TOKENS, batch_idx=2)["nodes"]
    assert (node["node_id"], node["activation"]) == ("0_1_0", 2.0)


@pytest.mark.parametrize(
    "ids",
    [
        torch.tensor([11, 12, 13, 14]),
        torch.tensor([[11, 12, 13, 14]]),
        {"input_ids": [11, 12, 13, 14]},
    ],
)
def test_token_ids_as_a_model_takes_them(ids):
    assert full_graph(token_ids=ids) == full_graph()
    with pytest.raises(ValueError, match=r"token_ids must be those of one prompt, got \[2, 2\]"):
        full_graph(token_ids=torch.zeros(2, 2, dtype=torch.int64))


def rows_of_the_viewer(graph):
    """circuit-tracer's init-cg-link-graph.js: rows 0 to the logits' layer + 1, or to 27 where
    there are none."""
    logits = [n for n in graph["nodes"] if n["feature_type"] == "logit"]
    last = max(
        int(n["layer"]) for n in graph["nodes"] if n["feature_type"] not in ("logit", "embedding")
    )
    return (
        last + 1 if logits else 26
    ) + 2  # util-cg.js moves the logits to the row after the last feature


@pytest.mark.parametrize("layer", [0, 25, 26, 27, 61])
def test_deep_graphs_place_in_the_viewer(layer):
    graph = graph_json([feature(layer, 3, 0, 1.0)], TOKENS)
    assert layer + 1 < rows_of_the_viewer(graph)
    added = [n for n in graph["nodes"] if n["feature_type"] == "logit"]
    assert len(added) == (layer > 26)
    for node in added:
        assert (node["token_prob"], node["clerp"], node["is_target_logit"]) == (0.0, "", False)


def test_exclude():
    features = [feature(0, 3, 0, 8.0), feature(1, 4, 2, 3.0), feature(1, 5, 3, 1.0)]
    links = [("0_3_0", "1_4_2", 1.0), ("1_4_2", "1_5_3", 2.0)]
    for exclude, ids in (({11}, [11, 12, 13, 14]), (torch.tensor([1, 0, 0, 0]), None)):
        graph = graph_json(features, TOKENS, links=links, token_ids=ids, exclude=exclude)
        assert [n["node_id"] for n in graph["nodes"] if n["feature_type"] != "embedding"] == [
            "1_4_2",
            "1_5_3",
        ]
        assert [n["influence"] for n in graph["nodes"]][:2] == [0.75, 1.0]
        assert graph["links"] == [{"source": "1_4_2", "target": "1_5_3", "weight": 2.0}]
    with pytest.raises(ValueError, match="give their ids"):
        graph_json(features, TOKENS, exclude="special", token_ids=[11, 12, 13, 14])


def test_errors_of_the_reconstruction():
    features = [feature(0, 3, 0, 8.0), feature(1, 4, 2, 3.0)]
    links = [("0_1_2", "1_4_2", 0.5), ("0_0_0", "0_3_0", 2.0)]
    graph = graph_json(features, TOKENS, links=links, errors=[(0, 0), (1, 2)])
    kinds = {n["node_id"]: (n["feature_type"], n["layer"], n["ctx_idx"]) for n in graph["nodes"]}
    assert list(kinds) == ["0_3_0", "1_4_2", "0_0_0", "0_1_2"]
    assert kinds["0_1_2"] == ("mlp reconstruction error", "1", 2)
    assert [(e["source"], e["target"]) for e in graph["links"]] == [e[:2] for e in links]
    out = torch.tensor([1, 0, 0, 0])
    graph = graph_json(features, TOKENS, links=links, errors=[(0, 0), (1, 2)], exclude=out)
    assert [n["node_id"] for n in graph["nodes"]] == ["1_4_2", "0_1_2"]
    assert graph["links"] == [{"source": "0_1_2", "target": "1_4_2", "weight": 0.5}]


def test_no_features():
    assert graph_json([], [])["nodes"] == []


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        ([feature(0, 1, 4, 1.0)], {}, "ctx_idx of feature 0_1 must be 0 to 3 as tokens, got 4"),
        ([feature(0, 1, -1, 1.0)], {}, "must be 0 to 3"),
        ([feature(-1, 1, 0, 1.0)], {}, "must not be negative"),
        ([feature(0, 1, 0, math.inf)], {}, "must be finite"),
        ([feature(0, 1, 0, math.nan, influence=1.0)], {}, "activation must be finite"),
        ([feature(0, 1, 0, 1.0)] * 2, {}, "node 0_1_0 must appear once"),
        (
            [],
            {"links": [("0_1_0", "0_2_0", 1.0)]},
            "a link must join nodes of the graph, got 0_1_0",
        ),
        (
            [feature(0, 1, 0, 1.0)],
            {"links": [("0_1_0", "0_1_0", math.nan)]},
            "weight must be finite",
        ),
        ([], {"token_ids": [1]}, "token_ids must be 4 as tokens, got 1"),
        ([], {"node_threshold": 1.5}, "node_threshold must be 0 to 1"),
        ([], {"errors": [(2, 4)]}, "ctx_idx 0 to 3, got 2 and 4"),
        ([], {"errors": [(-1, 0)]}, "an error's layer must be at least 0"),
        ([], {"errors": [(2, 1), (2, 1)]}, "node 0_2_1 must appear once"),
        ([feature(0, 2, 1, 1.0)], {"errors": [(2, 1)]}, "node 0_2_1 must appear once"),
        ([], {"errors": [(5, 1)], "n_layers": 5}, "the graph's last layer 5, got 5"),
        (
            [feature(5, 1, 0, 1.0)],
            {"n_layers": 5},
            "n_layers must be above the graph's last layer 5, got 5",
        ),
    ],
)
def test_errors(features, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        graph_json(features, TOKENS, **arguments)
    assert "\n" not in str(error.value)


def test_circuit_tracer_reads_it():
    models = pytest.importorskip("circuit_tracer.frontend.graph_models")
    for graph in (
        full_graph(),
        full_graph(node_threshold=None),
        graph_json(encoded_features(), TOKENS),
    ):
        read = models.Model.model_validate(graph)
        for node in graph["nodes"]:
            models.Node.model_validate(node, strict=True)
        written = read.model_dump()
        written["metadata"] = {k: v for k, v in written["metadata"].items() if v is not None}
        assert written == graph


def test_circuit_tracer_makes_the_same_nodes():
    Node = pytest.importorskip("circuit_tracer.frontend.graph_models").Node
    nodes = full_graph()["nodes"]
    assert nodes[1] == Node.feature_node(25, 3, 163839, influence=0.75, activation=3.0).model_dump()
    assert nodes[3] == Node.token_node(1, 12).model_dump()
    error = graph_json([], TOKENS, errors=[(25, 2)])["nodes"][0]
    assert error == Node.error_node(25, 2).model_dump()
    assert (
        nodes[6]
        == Node.logit_node(3, 7, " mat", 26, target_logit=True, token_prob=0.75).model_dump()
    )
