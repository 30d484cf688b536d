"""circuit-tracer's own attribution components on the engine, against its own results."""

import pytest
import torch

transcoder = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
activations = pytest.importorskip("circuit_tracer.transcoder.activation_functions")
from sparse_transcoder.integrations.circuit_tracer import on_engine  # noqa: E402

H, F, N, LAYERS = 16, 96, 9, 3


def transcoder_set(kind, dtype=torch.float32, skip=False, path=None):
    torch.manual_seed(0)
    layers = {}
    for layer in range(LAYERS):
        activation = (
            torch.nn.functional.relu
            if kind == "relu"
            else activations.JumpReLU(torch.rand(F, dtype=dtype), 0.1)
        )
        layers[layer] = transcoder.SingleLayerTranscoder(
            H, F, activation, layer, skip, device="cpu", dtype=dtype
        )
        for name, parameter in layers[layer].named_parameters():
            if "threshold" not in name:
                parameter.data = torch.randn_like(parameter) / (4 if name.startswith("W") else 1)
    return transcoder.TranscoderSet(layers, "mlp.hook_in", "mlp.hook_out", scan="a-scan")


def assert_same(mine, theirs, tolerance=1e-5):
    assert mine.keys() == theirs.keys()
    for key, expected in theirs.items():
        got = mine[key]
        assert (
            got.shape == expected.shape
            and got.dtype == expected.dtype
            and got.layout == expected.layout
        ), key
        if expected.is_sparse:
            assert torch.equal(got.indices(), expected.indices())
            got, expected = got.values(), expected.values()
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize(
    "zeroed", [slice(0, 1), slice(0, 4), slice(0, 0), slice(-2, None), slice(None)]
)
@torch.no_grad()
def test_attribution_components(kind, skip, zeroed):
    theirs = transcoder_set(kind, skip=skip)
    inputs = torch.randn(LAYERS, N, H)
    expected = theirs.compute_attribution_components(inputs, zeroed)
    assert_same(on_engine(theirs).compute_attribution_components(inputs, zeroed), expected)
    assert (expected["activation_matrix"]._nnz() > 50) == (zeroed != slice(None))


@torch.no_grad()
def test_default_zero_position():
    theirs = transcoder_set("relu")
    inputs = torch.randn(LAYERS, N, H)
    assert_same(
        on_engine(theirs).compute_attribution_components(inputs),
        theirs.compute_attribution_components(inputs),
    )


@torch.no_grad()
def test_bfloat16():
    theirs = transcoder_set("relu", torch.bfloat16)
    inputs = torch.randn(LAYERS, N, H, dtype=torch.bfloat16)
    got = on_engine(theirs).compute_attribution_components(inputs)
    expected = theirs.compute_attribution_components(inputs)
    for key in ("activation_matrix", "reconstruction", "encoder_vecs", "decoder_vecs"):
        assert got[key].dtype == expected[key].dtype == torch.bfloat16
    dense = [result["activation_matrix"].to_dense().float() for result in (got, expected)]
    torch.testing.assert_close(*dense, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_lazily_loaded(tmp_path):
    transcoder_set("jumprelu", skip=True).to_safetensors(str(tmp_path))
    paths = {layer: str(tmp_path / f"layer_{layer}.safetensors") for layer in range(LAYERS)}
    theirs = transcoder.load_transcoder_set(
        paths, "a-scan", "mlp.hook_in", "mlp.hook_out", device=torch.device("cpu")
    )
    assert theirs[0].lazy_encoder and theirs[0].lazy_decoder
    inputs = torch.randn(LAYERS, N, H)
    assert_same(
        on_engine(theirs).compute_attribution_components(inputs),
        theirs.compute_attribution_components(inputs),
    )


def test_the_rest_is_theirs():
    theirs = transcoder_set("jumprelu", skip=True)
    own = type(theirs[0]).encode_sparse
    mine = on_engine(theirs)
    assert type(theirs[0]).encode_sparse is own
    assert isinstance(mine, transcoder.TranscoderSet) and len(mine) == LAYERS
    assert (mine.feature_input_hook, mine.feature_output_hook, mine.scan) == (
        "mlp.hook_in",
        "mlp.hook_out",
        "a-scan",
    )
    assert mine.skip_connection and mine.d_transcoder == F
    assert mine[1].W_dec is theirs[1].W_dec and mine[1].layer_idx == 1
    x = torch.randn(N, H)
    assert torch.equal(mine.encode_layer(x, 1), theirs.encode_layer(x, 1))
    assert torch.equal(mine.compute_skip(1, x), theirs.compute_skip(1, x))


def test_errors():
    with pytest.raises(
        TypeError, match="transcoders must be a circuit-tracer TranscoderSet, got dict"
    ):
        on_engine({})
    theirs = transcoder_set("relu")
    theirs[1].activation_function = activations.TopK(4)
    with pytest.raises(ValueError, match="layer 1: activation must be relu or JumpReLU, got TopK"):
        on_engine(theirs)
    theirs[1].activation_function = activations.JumpReLU(torch.full((F,), -0.5))
    with pytest.raises(ValueError, match="layer 1: JumpReLU thresholds must not be negative"):
        on_engine(theirs)


class Words:
    """The part of a tokenizer that attribution uses."""

    all_special_ids = (0,)
    vocab_size = 40
    padding_side = "right"

    def decode(self, ids):
        return " ".join(map(str, torch.as_tensor(ids).flatten().tolist()))


def replacement_model(transcoders):
    """circuit-tracer's replacement model of a small transformer, always of the same weights."""
    lens = pytest.importorskip("transformer_lens")
    models = pytest.importorskip(
        "circuit_tracer.replacement_model.replacement_model_transformerlens"
    )
    config = lens.HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=H,
        n_ctx=16,
        d_head=4,
        n_heads=4,
        d_mlp=32,
        d_vocab=40,
        act_fn="gelu",
        normalization_type="LN",
        model_name="small",
        device="cpu",
        seed=0,
    )
    model = models.TransformerLensReplacementModel.from_config(config, transcoders)
    model.tokenizer = Words()
    return model


@pytest.mark.parametrize("kind", ["relu", "jumprelu"])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("most", [None, 40])
def test_attribution_graph(kind, skip, most):
    """The whole pipeline: replacement model, forward and backward passes, ranking, graph."""
    attribution = pytest.importorskip("circuit_tracer.attribution.attribute")
    prompt = torch.tensor([0, 7, 3, 11, 3, 29])
    graphs = []
    for wrap in (on_engine, lambda transcoders: transcoders):
        model = replacement_model(wrap(transcoder_set(kind, skip=skip)))
        graphs.append(attribution.attribute(prompt, model, batch_size=16, max_feature_nodes=most))
    mine, theirs = graphs
    assert len(theirs.active_features) > 100 and theirs.adjacency_matrix.count_nonzero() > 500
    assert torch.equal(mine.active_features, theirs.active_features)
    assert torch.equal(mine.selected_features, theirs.selected_features)
    assert mine.logit_targets == theirs.logit_targets
    torch.testing.assert_close(
        mine.activation_values, theirs.activation_values, rtol=1e-5, atol=1e-5
    )
    scale = theirs.adjacency_matrix.abs().max().item()
    torch.testing.assert_close(
        mine.adjacency_matrix, theirs.adjacency_matrix, rtol=1e-5, atol=1e-5 * scale
    )
