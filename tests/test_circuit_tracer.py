"""circuit-tracer's own attribution components on the engine, against its own results."""

import pytest
import torch

transcoder = pytest.importorskip("circuit_tracer.transcoder.single_layer_transcoder")
cross_layer = pytest.importorskip("circuit_tracer.transcoder.cross_layer_transcoder")
activations = pytest.importorskip("circuit_tracer.transcoder.activation_functions")
from sparse_transcoder.integrations.circuit_tracer import on_engine  # noqa: E402

H, F, N, LAYERS = 16, 96, 9, 3


def activation(kind, dtype=torch.float32):
    return {
        "relu": lambda: torch.nn.functional.relu,
        "jumprelu": lambda: activations.JumpReLU(torch.rand(F, dtype=dtype), 0.1),
        "negative": lambda: activations.JumpReLU(torch.rand(F, dtype=dtype) - 0.5, 0.1),
        "one threshold": lambda: activations.JumpReLU(torch.tensor(0.4, dtype=dtype), 0.1),
        "topk": lambda: activations.TopK(12),
        "topk below zero": lambda: activations.TopK(F // 2 + 4),  # negative ones are among them
    }[kind]()


KINDS = ["relu", "jumprelu", "negative", "one threshold", "topk", "topk below zero"]


def fill(module):
    for name, parameter in module.named_parameters():
        if "threshold" not in name:
            parameter.data = torch.randn_like(parameter) / (4 if name.startswith("W") else 1)


def transcoder_set(kind, dtype=torch.float32, skip=False):
    torch.manual_seed(0)
    layers = {}
    for layer in range(LAYERS):
        layers[layer] = transcoder.SingleLayerTranscoder(
            H, F, activation(kind, dtype), layer, skip, device="cpu", dtype=dtype
        )
        fill(layers[layer])
    return transcoder.TranscoderSet(layers, "mlp.hook_in", "mlp.hook_out", scan="a-scan")


def cross_layer_transcoder(kind, dtype=torch.float32, skip=False):
    torch.manual_seed(0)
    made = cross_layer.CrossLayerTranscoder(
        LAYERS, F, H, "jump_relu" if kind in ("jumprelu", "negative") else "relu", skip,
        lazy_decoder=False, feature_input_hook="mlp.hook_in", feature_output_hook="mlp.hook_out",
        scan="a-scan", device=torch.device("cpu"), dtype=dtype,
    )  # fmt: skip
    fill(made)
    if kind in ("jumprelu", "negative"):
        thresholds = torch.rand(LAYERS, 1, F) - (0.5 if kind == "negative" else 0)
        made.activation_function.threshold.data = thresholds.to(dtype)
    return made


MAKERS = {"set": transcoder_set, "cross-layer": cross_layer_transcoder}


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
            assert got.is_coalesced() and torch.equal(got.indices(), expected.indices())
            got, expected = got.values(), expected.values()
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


ZEROED = [slice(0, 1), slice(0, 4), slice(0, 0), slice(-2, None), slice(None)]
COMBINATIONS = [("set", kind) for kind in KINDS] + [
    ("cross-layer", kind) for kind in ("relu", "jumprelu", "negative")
]


@pytest.mark.parametrize(("maker", "kind"), COMBINATIONS)
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("zeroed", ZEROED)
@torch.no_grad()
def test_attribution_components(maker, kind, skip, zeroed):
    theirs = MAKERS[maker](kind, skip=skip)
    mine = on_engine(theirs)
    assert isinstance(mine, type(theirs))
    inputs = torch.randn(LAYERS, N, H)
    if zeroed == slice(None) and maker == "cross-layer":  # their own does not take nothing
        got = mine.compute_attribution_components(inputs, zeroed)
        assert got["activation_matrix"]._nnz() == len(got["decoder_vecs"]) == 0
        want = theirs.b_dec[:, None] + (inputs @ theirs.W_skip if skip else 0 * inputs)
        torch.testing.assert_close(got["reconstruction"], want)
        return
    if zeroed == slice(-2, None) and maker == "cross-layer":
        inputs[:, -3] = inputs[:, -3].abs() + 3  # their own counts positions up to the last active
        expected = theirs.compute_attribution_components(inputs[:, :-2], slice(0, 0))
        got = mine.compute_attribution_components(inputs, zeroed)
        assert torch.equal(
            got["activation_matrix"].indices(), expected["activation_matrix"].indices()
        )
        torch.testing.assert_close(
            got["reconstruction"][:, :-2], expected["reconstruction"], rtol=1e-5, atol=1e-5
        )
        return
    expected = theirs.compute_attribution_components(inputs, zeroed)
    assert_same(mine.compute_attribution_components(inputs, zeroed), expected)
    assert (expected["activation_matrix"]._nnz() > 50) == (zeroed != slice(None))


@pytest.mark.parametrize(("maker", "kind"), COMBINATIONS)
@torch.no_grad()
def test_parts(maker, kind):
    """Each overridden method by itself, and by default arguments."""
    theirs = MAKERS[maker](kind)
    mine = on_engine(theirs)
    inputs = torch.randn(LAYERS, N, H)
    layers = [(mine[i], theirs[i], inputs[i]) for i in range(LAYERS)] if maker == "set" else []
    for one, other, x in [*layers] or [(mine, theirs, inputs)]:
        got, expected = one.encode_sparse(x), other.encode_sparse(x)
        assert_same(dict(enumerate(got)), dict(enumerate(expected)))
    features = theirs.compute_attribution_components(inputs)["activation_matrix"]
    some = torch.rand(LAYERS, N, F) * (torch.rand(LAYERS, N, F) > 0.9)
    some[1] = 0  # a layer without an active feature
    for given in (features, some):
        got, expected = (each.select_decoder_vectors(given) for each in (mine, theirs))
        assert_same(dict(enumerate(got)), dict(enumerate(expected)))
    if maker == "cross-layer":
        positions, wrote, _, vectors, _ = expected
        shuffled = torch.randperm(len(positions))
        parts = positions[shuffled], wrote[shuffled], vectors[shuffled]
        torch.testing.assert_close(
            mine.compute_reconstruction(*parts), theirs.compute_reconstruction(*parts),
            rtol=1e-5, atol=1e-5,
        )  # fmt: skip
        torch.testing.assert_close(mine.decode(some), theirs.decode(some), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("maker", MAKERS)
@torch.no_grad()
def test_bfloat16(maker):
    theirs = MAKERS[maker]("relu", torch.bfloat16)
    inputs = torch.randn(LAYERS, N, H, dtype=torch.bfloat16)
    got = on_engine(theirs).compute_attribution_components(inputs)
    expected = theirs.compute_attribution_components(inputs)
    for key in ("activation_matrix", "reconstruction", "encoder_vecs", "decoder_vecs"):
        assert got[key].dtype == expected[key].dtype == torch.bfloat16
    dense = [result["activation_matrix"].to_dense().float() for result in (got, expected)]
    torch.testing.assert_close(*dense, rtol=0.02, atol=0.02)
    torch.testing.assert_close(
        got["reconstruction"], expected["reconstruction"], rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_lazily_loaded(tmp_path, dtype):
    transcoder_set("jumprelu", skip=True).to_safetensors(str(tmp_path))
    paths = {layer: str(tmp_path / f"layer_{layer}.safetensors") for layer in range(LAYERS)}
    theirs = transcoder.load_transcoder_set(
        paths, "a-scan", "mlp.hook_in", "mlp.hook_out", device=torch.device("cpu"), dtype=dtype
    )
    assert theirs[0].lazy_encoder and theirs[0].lazy_decoder
    same_lazily(theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lazy_encoder", [False, True])
@torch.no_grad()
def test_lazily_loaded_across_layers(tmp_path, dtype, lazy_encoder):
    cross_layer_transcoder("jumprelu").to_safetensors(str(tmp_path))
    theirs = cross_layer.load_clt(
        str(tmp_path), device=torch.device("cpu"), dtype=dtype, lazy_encoder=lazy_encoder
    )
    assert theirs.lazy_decoder and theirs.lazy_encoder == lazy_encoder
    same_lazily(theirs, dtype)


def same_lazily(theirs, dtype):
    inputs = torch.randn(LAYERS, N, H).to(dtype)
    expected = theirs.compute_attribution_components(inputs)
    got = on_engine(theirs).compute_attribution_components(inputs)
    if dtype == torch.float32:
        assert_same(got, expected)
    else:
        torch.testing.assert_close(
            got["reconstruction"], expected["reconstruction"], rtol=0.05, atol=0.05
        )


@pytest.mark.parametrize("maker", MAKERS)
@torch.no_grad()
def test_parameters_that_are_cast_or_changed_are_followed(maker):
    theirs = MAKERS[maker]("jumprelu")
    mine = on_engine(theirs)
    inputs = torch.randn(LAYERS, N, H)
    mine.compute_attribution_components(inputs)
    mine.to("cpu", torch.bfloat16)  # as circuit-tracer's replacement model does
    assert theirs.b_dec.dtype if maker == "cross-layer" else theirs[0].b_dec.dtype == torch.bfloat16
    got = mine.compute_attribution_components(inputs.bfloat16())
    expected = theirs.compute_attribution_components(inputs.bfloat16())
    assert all(got[key].dtype == value.dtype for key, value in expected.items())
    dense = [result["activation_matrix"].to_dense().float() for result in (got, expected)]
    torch.testing.assert_close(*dense, rtol=0.02, atol=0.02)
    for cast in (torch.float16, torch.float32):
        theirs.to(cast)
        expected = theirs.float().compute_attribution_components(inputs)
        assert_same(mine.compute_attribution_components(inputs), expected)
    for parameter in theirs.parameters():
        parameter.mul_(1.5)
    expected = theirs.compute_attribution_components(inputs)
    assert_same(mine.compute_attribution_components(inputs), expected)


def test_an_activation_that_is_replaced_is_followed():
    theirs = transcoder_set("relu")
    mine = on_engine(theirs)
    inputs = torch.randn(LAYERS, N, H)
    mine.compute_attribution_components(inputs)
    for new in (activations.TopK(5), activations.TopK(7)):
        for each in (mine, theirs):
            each[1].activation_function = new
        with torch.no_grad():
            expected = theirs.compute_attribution_components(inputs)
        assert_same(mine.compute_attribution_components(inputs), expected)
    mine[1].activation_function = torch.nn.GELU()
    with pytest.raises(ValueError, match="layer 1: activation must be relu, JumpReLU or TopK, got"):
        mine.compute_attribution_components(inputs)


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
        TypeError,
        match="must be a circuit-tracer TranscoderSet or CrossLayerTranscoder, got dict",
    ):
        on_engine({})
    theirs = transcoder_set("relu")
    with pytest.raises(ValueError, match=r"inputs must be those of 3 layers, got \[2, 9, 16\]"):
        on_engine(theirs).compute_attribution_components(torch.randn(2, N, H))
    theirs[1].activation_function = torch.nn.functional.gelu
    with pytest.raises(ValueError, match="layer 1: activation must be relu, JumpReLU or TopK, got"):
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


@pytest.mark.parametrize(
    ("maker", "kind"), [("set", "relu"), ("set", "jumprelu"), ("set", "topk"),
                        ("cross-layer", "relu"), ("cross-layer", "jumprelu")]
)  # fmt: skip
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("most", [None, 40])
def test_attribution_graph(maker, kind, skip, most):
    """The whole pipeline: replacement model, forward and backward passes, ranking, graph."""
    attribution = pytest.importorskip("circuit_tracer.attribution.attribute")
    prompt = torch.tensor([0, 7, 3, 11, 3, 29])
    graphs = []
    for wrap in (on_engine, lambda transcoders: transcoders):
        model = replacement_model(wrap(MAKERS[maker](kind, skip=skip)))
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
