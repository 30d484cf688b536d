"""Every family of causal language models: each place is right, or refused with a reason."""

import warnings

import pytest
import torch
import transformers
from families import FAMILIES, SKIPPED, VOCAB, made
from places_table import DOCS, cell, row, rows_of
from sparse_transcoder import capture
from sparse_transcoder.capture import HOOKS
from sparse_transcoder.places import decoder

transformers.logging.set_verbosity_error()
IDS = torch.randint(3, VOCAB - 2, (1, 9), generator=torch.Generator().manual_seed(4))
# Their hidden_states begin with the first layer's output.
OUTPUTS_ALONE = [
    "mamba",
    "mamba2",
    "falcon_mamba",
    "rwkv",
    *(["xlstm"] if transformers.__version__.startswith("4.") else []),
]
DOCUMENTED, DOCUMENTED_VERSION = rows_of(DOCS.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measured(kind, model):
    """The family's row of the table, and {hook: {layer: hidden states}} of the places that are not
    refused."""
    try:
        known = decoder(model)
    except ValueError as error:
        return row(
            kind,
            type(model).__name__,
            ["refused: " + str(error).partition(", ")[2], *[""] * (len(HOOKS) - 1)],
        ), {}
    held, cells = {}, []
    for hook in HOOKS:
        reasons = []
        for layer in range(len(known.layers)):
            try:
                known.place(hook, layer)
                reasons.append(None)
            except ValueError as error:
                reasons.append(str(error))
        cells.append(cell(reasons))
        there = [layer for layer, reason in enumerate(reasons) if reason is None]
        held[hook] = capture(model, IDS, there, hook).hidden if there else {}
    return row(kind, type(model).__name__, cells), held


def near(a, b, scale=None):
    scale = float(b.abs().max()) if scale is None else scale
    return float((a - b).abs().max()) <= 1e-5 * max(scale, 1.0)


def module_traffic(model, layers, ids):
    """{layer: (input, output)} of the module that is called an MLP in most families, by hooks of
    the test's own."""
    names = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "feedforward")
    seen = {}
    handles = []
    for index, layer in enumerate(layers):
        module = next(
            (
                m
                for m in (getattr(layer.module, name, None) for name in names)
                if isinstance(m, torch.nn.Module)
            ),
            None,
        )
        if module is not None:

            def keep(_, args, kwargs, output, index=index):
                given = args[0] if args else next(iter(kwargs.values()))
                seen[index] = (
                    given.clone(),
                    (output[0] if isinstance(output, tuple) else output).clone(),
                )

            handles.append(module.register_forward_hook(keep, with_kwargs=True))
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in SKIPPED])
def test_family(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = made(kind)
        line, held = measured(kind, model)
        if transformers.__version__ == DOCUMENTED_VERSION:
            assert line == DOCUMENTED[kind], "python tests/places_table.py --write"
        if not held:
            return
        for layer, added in held["hook_mlp_out"].items():
            if layer in held["hook_resid_mid"]:
                middle, post = held["hook_resid_mid"][layer], held["hook_resid_post"][layer]
                assert near(
                    middle + added, post, float(middle.abs().max()) + float(added.abs().max())
                )
                assert not near(middle, held["hook_resid_pre"][layer])
        layers = decoder(model).layers
        with torch.no_grad():
            states = model(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
        shift = int(kind not in OUTPUTS_ALONE)
        assert len(states) == len(layers) + (
            0 if kind == "mllama" else 1
        )  # whose cross-attention layer a text does not run
        for layer, rows in held["hook_resid_pre"].items():
            assert layer + shift == 0 or near(rows, states[layer + shift - 1][0])
        for layer, rows in held["hook_resid_post"].items():
            if layer < max(held["hook_resid_post"]):  # the last is given after the model's own norm
                assert near(rows, states[layer + shift][0])
        for layer, (given, gave) in module_traffic(model, layers, IDS).items():
            if layer in held["mlp.hook_in"]:
                assert near(held["mlp.hook_in"][layer], given.reshape(IDS.shape[1], -1))
            if layer in held["mlp.hook_out"] and kind not in (
                "bloom",
                "mpt",
            ):  # which add the residual inside
                assert near(held["mlp.hook_out"][layer], gave.reshape(IDS.shape[1], -1))
        hook = "hook_resid_post" if held["hook_resid_post"] else "mlp.hook_in"
        if not held[hook]:
            return
        last = max(held[hook])
        for side in ("left", "right"):
            short = IDS[0, :4]
            pad = torch.zeros(5, dtype=torch.int64)
            ids = torch.stack([IDS[0], torch.cat([pad, short] if side == "left" else [short, pad])])
            mask = torch.ones_like(ids)
            mask[1, slice(0, 5) if side == "left" else slice(4, 9)] = 0
            both = capture(model, {"input_ids": ids, "attention_mask": mask}, [last], hook).hidden[
                last
            ]
            assert torch.equal(both[:9], capture(model, IDS, [last], hook).hidden[last])
            assert torch.equal(both[9:], capture(model, short, [last], hook).hidden[last])
            try:
                once = capture(
                    model, {"input_ids": ids, "attention_mask": mask}, [last], hook, exact=False
                ).hidden[last]
            except ValueError as error:
                assert "exact=False" in str(error)
                continue
            assert float((once - both).abs().max()) <= 1e-3 * float(both.abs().max())


@pytest.mark.skipif("gemma4_unified_text" not in FAMILIES, reason="transformers 4 has no Gemma 4")
def test_places_are_proven_again_when_a_multiplier_changes():
    model = made("gemma4_unified_text")
    scales = [b for name, b in model.named_buffers() if name.endswith("layer_scalar")]
    for scale in scales:
        scale.fill_(1.0)
    assert capture(model, IDS, [1], "hook_resid_mid").hidden[1].shape[0] == IDS.shape[1]
    scales[1].fill_(0.5)
    with pytest.raises(ValueError, match=r"layer 1: .* has no hook_resid_mid: the output of"):
        capture(model, IDS, [1], "hook_resid_mid")


def test_every_family_is_tried_or_skipped_by_name():
    tried = set(FAMILIES) - set(SKIPPED)
    assert len(tried) >= 40
    if transformers.__version__ == DOCUMENTED_VERSION:
        assert set(SKIPPED) <= set(FAMILIES) and set(DOCUMENTED) == tried
