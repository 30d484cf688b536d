"""What index writes, against the entries of the parts themselves and the peers' own readers."""

import base64
import gzip
import itertools
import json
import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny_corpus as tiny
import torch
from safetensors.numpy import load_file
from sparse_transcoder import Corpus
from sparse_transcoder.__main__ import main
from sparse_transcoder.corpus.index import FORMATS, index, lens
from sparse_transcoder.corpus.index import merge as merging

LAYERS = {0: 200, 2: 90}


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Few entries at a time, so that a layer takes many blocks."""
    before, merging.BLOCK = merging.BLOCK, 3000
    yield
    merging.BLOCK = before


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    found = tiny.encode(tmp_path_factory.mktemp("corpus"), keep="all", exclude=None)
    wanted = [f for f in FORMATS if f != "parquet" or parquet_is_here()]
    model, weights = tiny.model(), tiny.transcoders()
    index(found, wanted, model=model, transcoders=weights, progress=False)
    return found


def parquet_is_here():
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def dense(corpus):
    """{layer: [windows, ctx, F]}, from the parts one by one."""
    found = {}
    for layer, features in LAYERS.items():
        values = np.zeros((corpus.windows, tiny.CTX, features), np.float32)
        for part in corpus:
            entries = part.layers[layer]
            rows = np.argwhere(part.mask)
            for row, (window, position) in enumerate(rows):
                of_row = slice(entries.row_begin[row], entries.row_begin[row + 1])
                at = values[part.first_window + window, position]
                at[entries.features[of_row]] = entries.activations[of_row]
        found[layer] = values
    return found


def folder(corpus, name):
    return corpus.folder / "index" / name


def test_the_logit_lens(corpus):
    model, weights = tiny.model(), tiny.transcoders()
    tokens = lens.unembedding(model)
    W_U = model.lm_head.weight.detach().double()
    for layer in LAYERS:
        found = lens.logits(tokens, weights[layer])
        want = weights[layer].W_dec.double().T @ W_U.T
        for sign, ids, values in (
            (1, found.top, found.top_values),
            (-1, found.bottom, found.bottom_values),
        ):
            best = (sign * want).topk(10, dim=1).values
            got = sign * want.gather(1, torch.from_numpy(ids))
            assert torch.allclose(got, best, atol=1e-6)
            assert torch.allclose(torch.from_numpy(values).double() * sign, best, atol=1e-6)


# delphi


def test_delphi_shards(corpus, dense):
    for layer, features in LAYERS.items():
        shards = folder(corpus, "delphi") / "latents" / f"layers.{layer}.mlp"
        names = sorted(
            (p.stem for p in shards.glob("*.safetensors")), key=lambda n: int(n.split("_")[0])
        )
        edges = torch.linspace(0, features, 6).long().tolist()
        assert names == [f"{a}_{b - 1}" for a, b in itertools.pairwise(edges)]
        got = np.zeros_like(dense[layer])
        for name in names:
            start = int(name.split("_")[0])
            shard = load_file(shards / f"{name}.safetensors")
            assert shard["locations"].dtype == np.uint16
            where = shard["locations"].astype(np.int64)
            assert (np.diff(where[:, 0] * tiny.CTX + where[:, 1]) >= 0).all()
            got[where[:, 0], where[:, 1], where[:, 2] + start] = shard["activations"]
            assert np.array_equal(shard["tokens"], corpus.tokens())
        assert np.array_equal(got, dense[layer]) and got.any()


def delphi_examples(folder, tokenizer):
    """{(module, feature): what delphi's LatentDataset makes of it}"""
    config = pytest.importorskip("delphi.config", reason="eai-delphi is not installed")
    loader = pytest.importorskip("delphi.latents.loader")
    torch.manual_seed(0)
    constructor = config.ConstructorConfig(example_ctx_len=8, min_examples=5, n_non_activating=0)
    sampler = config.SamplerConfig(n_examples_train=5, n_examples_test=0, train_type="top")
    dataset = loader.LatentDataset(folder, sampler, constructor, tokenizer=tokenizer)
    found = {}
    for record in dataset:
        key = record.latent.module_name, record.latent.latent_index
        found[key] = [(e.tokens.tolist(), e.activations.tolist()) for e in record.examples]
    return found


def test_delphi_reads_it(corpus, tmp_path):
    """delphi's own loader gives the same examples as of the cache that delphi makes itself."""
    pytest.importorskip("delphi.config", reason="eai-delphi is not installed")
    cache = pytest.importorskip("delphi.latents.cache")
    ours = delphi_examples(folder(corpus, "delphi") / "latents", tiny.tokenizer())
    weights, encoder, model = tiny.transcoders(), tiny.encoder(), tiny.model()

    def dense_of(layer):
        def encode(hidden):
            found = encoder.encode_sparse(layer, hidden).to_dense()
            return found.view(*hidden.shape[:-1], -1)

        return encode

    hooks = {f"layers.{layer}.mlp": dense_of(layer) for layer in weights}
    made = cache.LatentCache(model.model, hooks, batch_size=1, transcode=True)
    real = int(corpus.manifest["text"]["last_window"])
    tokens = torch.from_numpy(corpus.tokens().astype(np.int64))
    made.run(tokens.numel(), tokens)
    for name in hooks:  # Padding, which delphi does not have, is not recorded here.
        where = made.cache.latent_locations[name]
        keep = (where[:, 0] < corpus.windows - 1) | (where[:, 1] < real)
        made.cache.latent_locations[name] = where[keep]
        made.cache.latent_activations[name] = made.cache.latent_activations[name][keep]
        made.width = weights[int(name.split(".")[1])].W_enc.shape[0]
        target = tmp_path / name
        target.mkdir()
        (target / "config.json").write_text('{"model_name": ""}')
        one = {name: made.cache.latent_locations[name]}
        whole, made.cache.latent_locations = made.cache.latent_locations, one
        made.save_splits(5, tmp_path)
        made.cache.latent_locations = whole
    theirs = delphi_examples(tmp_path, tiny.tokenizer())
    assert len(ours) > 100 and ours.keys() == theirs.keys()
    for key, examples in ours.items():
        assert len(examples) == len(theirs[key])
        for (tokens, acts), (other_tokens, other_acts) in zip(examples, theirs[key], strict=True):
            assert tokens == other_tokens
            # The model reads other batches here, so values may differ in their last bits.
            assert np.allclose(acts, other_acts, rtol=2e-3)


# circuit-tracer


def test_circuit_tracer_reads_it(corpus, dense):
    """As its viewer does: a range of bytes from one offset to the next, both included."""
    files = folder(corpus, "circuit-tracer")
    assert {p.name for p in files.iterdir()} == {"index.json.gz", "layer_0.bin", "layer_2.bin"}
    offsets = json.loads(gzip.decompress((files / "index.json.gz").read_bytes()))
    dead = 0
    for layer, features in LAYERS.items():
        entry = offsets[str(layer)]
        data = (files / entry["filename"]).read_bytes()
        assert len(entry["offsets"]) == features + 1 and entry["offsets"][-1] == len(data)
        for feature in range(features):
            span = data[entry["offsets"][feature] : entry["offsets"][feature + 1] + 1]
            (length,) = struct.unpack("<I", span[:4])
            record = json.loads(gzip.decompress(span[4 : 4 + length]))
            column = dense[layer][..., feature]
            values = column[column > 0]
            assert record["index"] == feature
            assert record["activation_frequency"] == pytest.approx(values.size / corpus.recorded)
            assert sum(record["histogram"]) == values.size
            if values.size == 0:
                dead += 1
                assert record["examples_quantiles"] == [] and record["act_max"] == 0
                continue
            assert record["act_max"] == pytest.approx(values.max(), rel=1e-3)
            quantiles = np.quantile(values, np.arange(1, 100) / 100)
            assert np.allclose(record["quantile_values"], quantiles, rtol=1e-3)
            top = record["examples_quantiles"][0]
            assert top["quantile_name"] == "Top"
            peaks = [max(e["tokens_acts_list"]) for e in top["examples"]]
            best = np.sort(column.max(1))[::-1][: len(peaks)]
            assert np.allclose(peaks, best, rtol=1e-3) and len(peaks) == min(
                20, (column.max(1) > 0).sum()
            )
            for example in top["examples"]:
                assert len(example["tokens"]) == len(example["tokens_acts_list"])
            assert len(record["top_logits"]) == len(record["bottom_logits"]) == 10
    assert dead < sum(LAYERS.values())


# Neuronpedia


def check_directions(lines, rows):
    """The histogram of logits and the nearest directions, against float64."""
    logits = rows @ tiny.model().lm_head.weight.detach().double().T
    units = rows / rows.norm(dim=1, keepdim=True)
    cosines = (units @ units.T).fill_diagonal_(-1)
    best = cosines.topk(20, dim=1).values
    for line, of_feature, mine, largest in zip(lines, logits, cosines, best, strict=True):
        heights, edges = np.histogram(of_feature, 50)
        got = np.array(line["logits_hist_data_bar_heights"])
        assert got.sum() == len(of_feature)
        assert np.abs(got - heights).sum() <= 4  # float32 puts one at an edge beside it
        middles = (edges[:-1] + edges[1:]) / 2
        assert np.allclose(line["logits_hist_data_bar_values"], middles, rtol=1e-3, atol=1e-4)
        assert torch.allclose(mine[line["topkCosSimIndices"]], largest, atol=1e-6)
        values = torch.tensor(line["topkCosSimValues"], dtype=torch.float64)
        assert torch.allclose(values, largest, atol=1e-4)


def test_neuronpedia(corpus, dense):
    sets = folder(corpus, "neuronpedia")
    for layer, features in LAYERS.items():
        of_layer = next(sets.glob(f"*/{layer}-transcoder"))
        lines = {
            name: [
                json.loads(line)
                for path in sorted((of_layer / name).iterdir())
                for line in gzip.decompress(path.read_bytes()).decode().splitlines()
            ]
            for name in ("features", "activations")
        }
        assert [int(line["index"]) for line in lines["features"]] == list(range(features))
        check_directions(lines["features"], tiny.transcoders()[layer].W_dec.double().T)
        fired = 0
        for line in lines["activations"]:
            column = dense[layer][..., int(line["index"])]
            match = np.isclose(column, np.array(line["values"]), rtol=1e-3).all(1)
            assert match.any() and len(line["tokens"]) == tiny.CTX
            assert line["values"][line["maxValueTokenIndex"]] == max(line["values"])
            if line["binMin"] >= 0:
                value = line["values"][line["qualifyingTokenIndex"]]
                assert line["binMin"] * 0.999 <= value <= line["binMax"] * 1.001
            fired += 1
        assert fired > 100
        for name in ("release", "model", "sourceset", "source"):
            json.loads((of_layer / f"{name}.jsonl").read_text())


# Parquet


def test_parquet(corpus, dense):
    parquet = pytest.importorskip("pyarrow.parquet")
    files = folder(corpus, "parquet")
    tokens = parquet.read_table(files / "tokens.parquet").to_pydict()
    assert tokens["token"] == corpus.tokens().reshape(-1).tolist()
    for layer in LAYERS:
        table = parquet.read_table(files / f"layer={layer}" / "bucket-0.parquet", partitioning=None)
        columns = {name: table[name].to_numpy() for name in table.column_names}
        order = np.lexsort((-columns["activation"], columns["feature"]))
        assert np.array_equal(order, np.sort(order))
        got = np.zeros_like(dense[layer])
        got[columns["sequence"], columns["position"], columns["feature"]] = columns["activation"]
        assert np.array_equal(got, dense[layer])
        flat = columns["sequence"].astype(np.int64) * tiny.CTX + columns["position"]
        assert np.array_equal(corpus.tokens().reshape(-1)[flat], columns["token"])
    features = parquet.read_table(files / "features.parquet").to_pylist()
    assert [(row["layer"], row["feature"]) for row in features] == [
        (layer, f) for layer, count in LAYERS.items() for f in range(count)
    ]
    for row in features:
        assert row["count"] == (dense[row["layer"]][..., row["feature"]] > 0).sum()


def test_duckdb_answers(corpus, dense):
    duckdb = pytest.importorskip("duckdb")
    pytest.importorskip("pyarrow")
    column = dense[0][..., 7]
    found = duckdb.sql(
        f"select activation from '{folder(corpus, 'parquet')}/layer=0/*.parquet' "
        "where feature = 7 order by activation desc limit 20"
    ).fetchall()
    assert [value for (value,) in found] == np.sort(column[column > 0])[::-1][:20].tolist()


# The page


def unpacked(page, name):
    data = re.search(rf'<script type="text/plain" id="{name}">([^<]*)</script>', page)[1]
    return json.loads(zlib.decompress(base64.b64decode(data)))


def test_the_page(corpus, dense):
    page = (folder(corpus, "html") / "explorer.html").read_text(encoding="utf-8")
    assert "{{" not in page and not re.search(r"https?://(?!www.w3.org)", page)
    data = unpacked(page, "data")
    words = data["words"]
    for layer in data["layers"]:
        values = dense[layer["layer"]]
        assert layer["count"] == (values > 0).sum((0, 1)).tolist()
        assert np.allclose(layer["max"], values.max((0, 1)), rtol=1e-3)
        for feature, count in enumerate(layer["count"]):
            name = f"g{layer['layer']}-{feature // data['group']}"
            record = unpacked(page, name)[feature % data["group"]]
            assert sum(record["bars"]) == count
            for window, peak, tokens, on in record["top"]:
                row = values[window, :, feature]
                first = int(row.argmax()) - peak
                want = corpus.tokens()[window, first : first + len(tokens)]
                assert [words[t] for t in tokens] == [corpus.word(t) for t in want]
                nonzero = row[first : first + len(tokens)].nonzero()[0]
                assert [i for i, _ in on] == nonzero.tolist()


@pytest.mark.skipif(
    not any(Path(p, "chromium").exists() for p in os.get_exec_path()), reason="needs chromium"
)
def test_the_page_in_a_browser(corpus):
    import subprocess

    page = folder(corpus, "html") / "explorer.html"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=20000", f"{page.as_uri()}#2/3"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r'data-ready="\d+"', shown) and "Top contexts" in shown
    assert 'aria-selected="true">layer 2<' in re.sub(r' title="[^"]*"', "", shown)
    assert "Makes less likely" in shown


# The command and its refusals


def test_a_corpus_that_is_not_whole(tmp_path):
    corpus = tiny.encode(tmp_path, worker=(1, 2))
    with pytest.raises(ValueError, match=r"parts are not encoded yet, first 0: start encode again"):
        index(corpus)
    with pytest.raises(ValueError, match=r"formats must be of delphi, .*, got pdf"):
        index(corpus, ["html", "pdf"])
    assert not (tmp_path / "index").exists()


def test_the_command(tmp_path, capsys):
    tiny.encode(tmp_path, texts=tiny.TEXTS[:1])
    assert main(["index", str(tmp_path), "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path}/index/html/explorer.html\n"
    assert (
        said.err.startswith("without the tokens of the logit lens: ") and said.err.count("\n") == 1
    )
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"0": {"5": "a label of mine"}}))
    assert main(["index", str(tmp_path), "--quiet", "--labels", str(labels)]) == 0
    page = (tmp_path / "index/html/explorer.html").read_text(encoding="utf-8")
    assert unpacked(page, "data")["layers"][0]["label"][5] == "a label of mine"
    assert [p.name for p in (tmp_path / "index").iterdir()] == ["html"]
    assert Corpus(tmp_path).missing == []
