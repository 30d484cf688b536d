"""encode_corpus: every value that it stores, and the same bytes whatever happens on the way."""

import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_corpus as tiny
import torch
from safetensors.numpy import load_file
from sparse_transcoder import Corpus, SparseTranscoderEncoder, TranscoderWeights, encode_corpus
from sparse_transcoder.__main__ import main
from sparse_transcoder.corpus.texts import pieces

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    tiny.encode(out)
    return out


def expected_windows(ctx=tiny.CTX):
    """The windows and the mask, straight from the tokenizer."""
    tokenizer = tiny.tokenizer()
    stream = []
    for text in tiny.TEXTS:
        if text:  # A text without a character is none.
            stream += [2] * bool(stream) + tokenizer(text, add_special_tokens=False).input_ids
    windows, masks = [], []
    for begin in range(0, len(stream), ctx - 1):
        ids = [1, *stream[begin : begin + ctx - 1]]
        masks.append([0] + [int(i > 2) for i in ids[1:]] + [0] * (ctx - len(ids)))
        windows.append(ids + [0] * (ctx - len(ids)))
    return np.array(windows), np.array(masks)


def test_tokens_and_masks(whole):
    corpus = Corpus(whole)
    windows, masks = expected_windows()
    parts = list(corpus)
    assert len(parts) > 3 and [p.first_window for p in parts] == list(range(0, len(windows), 10))
    assert np.array_equal(np.concatenate([p.tokens for p in parts]), windows)
    assert np.array_equal(np.concatenate([p.mask for p in parts]), masks)
    assert np.array_equal(corpus.tokens(), windows)
    skipped = corpus.summary()["skipped"]
    padding = int((windows == 0).sum())
    assert 0 < padding and skipped["padding"] == padding
    assert skipped["first position"] == len(windows) and skipped["special"] == 4
    assert corpus.recorded == masks.sum() == windows.size - sum(skipped.values())


@pytest.mark.parametrize("keep", ["top_k", "all"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_values_are_those_of_the_encoder(tmp_path, keep, dtype):
    """Against encode_all_layers or encode_sparse of what plain hooks on the model see."""
    corpus = tiny.encode(tmp_path, keep=keep, dtype=dtype)
    model, encoder = tiny.model(), tiny.encoder()
    for part in corpus:
        rows = part.mask.astype(bool)
        for layer, entries in part.layers.items():
            seen, hidden = [], []
            block = model.model.layers[layer].mlp
            hook = block.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0]))
            last = len(part.tokens)
            real = int(corpus.manifest["text"]["last_window"])
            alone = part.first_window + last == corpus.windows and real < tiny.CTX
            batches = [(i, min(i + 3, last - alone)) for i in range(0, last - alone, 3)]
            with torch.no_grad():
                for begin, end in batches + [(last - 1, last)] * alone:
                    width = real if alone and end == last else tiny.CTX
                    ids = torch.from_numpy(part.tokens[begin:end, :width].astype(np.int64))
                    model(ids)
                    hidden.append(seen[-1][torch.from_numpy(rows[begin:end, :width])])
            hook.remove()
            states = torch.cat(hidden)
            if keep == "all":
                want = encoder.encode_sparse(layer, states).to_dense()
            else:
                result = encoder.encode_layer(layer, states)
                want = torch.zeros(len(states), corpus.features(layer))
                want.scatter_(1, result["indices"], result["activations"])
            got = torch.zeros_like(want)
            row = np.repeat(np.arange(len(states)), np.diff(entries.row_begin))
            got[row, entries.features.astype(np.int64)] = torch.from_numpy(
                entries.activations.astype(np.float32)
            )
            assert torch.equal(got, want.to(dtype).float()) and (got > 0).any()
            assert entries.features.dtype == np.uint16


def test_parts_are_safetensors(whole):
    for path in sorted((whole / "parts").iterdir()):
        assert re.fullmatch(r"\d{8}\.safetensors", path.name)
        tensors = load_file(path)  # of the safetensors package
        assert tensors["0.row_begin"].dtype == np.uint32
        assert tensors["2.activations"].dtype == np.float16


def test_nothing_is_excluded_on_request(tmp_path):
    corpus = tiny.encode(tmp_path, exclude=None)
    windows, _ = expected_windows()
    assert corpus.summary()["skipped"] == {"padding": int((windows == 0).sum())}
    assert sum(int(part.mask.sum()) for part in corpus) == (windows != 0).sum()


# The same bytes


def test_workers_make_the_bytes_of_one(whole, tmp_path):
    for index in (2, 0, 1):
        corpus = tiny.encode(tmp_path, worker=(index, 3))
    assert not corpus.missing and tiny.files(tmp_path) == tiny.files(whole)


def start(out, kills, number=1):
    """A process of its own; with one thread, since more may change the last bits of a model."""
    command = [sys.executable, TESTS / "tiny_corpus.py", out, str(kills), str(number)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def test_killed_and_two_on_one_part(tmp_path):
    """ST_KILLS=50 kills as often; each kill is at a random moment of a run. And two processes do
    the whole corpus at once in one folder."""
    kills = int(os.environ.get("ST_KILLS", "6"))
    largest = start(tmp_path / "killed", "largest", 14_000)  # every part but the last is larger
    largest.communicate()
    assert largest.returncode == -signal.SIGXFSZ
    assert list((tmp_path / "killed" / "parts").glob(".*.tmp"))  # it was in the middle of one
    runs = [start(tmp_path / "killed", kills)]
    runs += [start(tmp_path / name, 0) for name in ("both", "both", "alone")]
    for run in runs:
        said = run.communicate()[1]
        assert run.returncode == 0, said
        assert all("another process has written this part, too" in x for x in said.splitlines())
    want = tiny.files(tmp_path / "alone")
    assert tiny.files(tmp_path / "killed") == tiny.files(tmp_path / "both") == want


def test_a_complete_corpus_is_left_as_it_is(whole, tmp_path):
    before = {p: p.stat().st_mtime_ns for p in (whole / "parts").iterdir()}
    tiny.encode(whole)
    assert before == {p: p.stat().st_mtime_ns for p in (whole / "parts").iterdir()}


def test_a_text_is_tokenised_once(tmp_path, monkeypatch):
    tiny.encode(tmp_path)
    want = tiny.files(tmp_path)
    tokens = tmp_path / "tokens.bin"
    damaged = bytearray(tokens.read_bytes())
    damaged[7] ^= 1
    for content in (bytes(damaged), b""):  # what is damaged is made again
        tokens.write_bytes(content)
        tiny.encode(tmp_path)
        assert tiny.files(tmp_path) == want

    def tokenise(*_, **__):
        raise AssertionError("tokenised again")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.__call__", tokenise)
    (tmp_path / "parts" / "00000001.safetensors").unlink()
    tiny.encode(tmp_path)
    assert tiny.files(tmp_path) == want
    with pytest.raises(AssertionError, match="tokenised again"):
        tiny.encode(tmp_path / "other")
    # the same characters in other texts are another corpus
    with pytest.raises(ValueError, match=r"text.source was"):
        tiny.encode(tmp_path, texts=["".join(tiny.TEXTS)])


def tiny_run(out):
    from sparse_transcoder.corpus import Run

    options = {k: v for k, v in tiny.OPTIONS.items() if k != "progress"}
    return Run(tiny.model(), tiny.tokenizer(), tiny.TEXTS, tiny.encoder(), out, **options)


def test_a_part_that_another_has_written(whole, tmp_path, capfd):
    run = tiny_run(tmp_path)
    for _ in range(2):
        run.write_part(1)
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "00000001.safetensors: another process has written this part, too, the same" in said
    assert run.corpus.path(1).read_bytes() == Corpus(whole).path(1).read_bytes()


def test_other_bytes_for_one_part_are_an_error(whole, tmp_path):
    run = tiny_run(tmp_path)
    run.write_part(0)
    before = run.corpus.path(0).read_bytes()
    with torch.no_grad():
        run.model.model.embed_tokens.weight.mul_(1.5)
    with pytest.raises(ValueError, match="another process has written other bytes"):
        run.write_part(0)
    assert run.corpus.path(0).read_bytes() == before
    assert not list(tmp_path.rglob("*.tmp"))


# Refusals: one line, and nothing is lost


def changed_encoder():
    weights = tiny.transcoders()
    weights[2].W_enc[5, 7] += 1
    return SparseTranscoderEncoder(weights, 12, 0.5)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ctx": 8}, r"packing.ctx was 16, now 8"),
        ({"keep": "all"}, r'options.keep was "top_k", now "all"'),
        ({"batch_size": 4}, r"options.batch_size was 3, now 4"),
        ({"layers": [0]}, r"layers.2 was .*, now null"),
        ({"texts": [*tiny.TEXTS, "more"]}, r"text.source was"),
        ({"encoder": changed_encoder}, r"layers.2.sha256 was"),
        ({"exclude": [5]}, r"packing.skipped was"),
    ],
)
def test_another_run_is_refused(whole, change, words):
    before = tiny.files(whole)
    made = {"texts": tiny.TEXTS, "encoder": tiny.encoder} | change
    options = {k: v for k, v in made.items() if k not in ("texts", "encoder")}
    with pytest.raises(ValueError, match=rf"holds another run: {words}.*give another") as caught:
        encode_corpus(
            tiny.model(),
            tiny.tokenizer(),
            made["texts"],
            made["encoder"](),
            whole,
            **(tiny.OPTIONS | options),
        )
    assert "\n" not in str(caught.value)
    assert tiny.files(whole) == before


def test_a_full_disk(whole, tmp_path):
    """Files may have no more bytes than a part needs: the parts before it stay."""
    sizes = [path.stat().st_size for path in sorted((whole / "parts").iterdir())]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    corpus = tiny.encode(tmp_path, worker=(0, 1), texts=tiny.TEXTS[:1])
    before = tiny.files(tmp_path)
    other = tmp_path / "other"
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) - 200, limit[1]))
    try:
        with pytest.raises(OSError, match=r"cannot be written: .* the same command goes on") as e:
            tiny.encode(other)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(e.value) and not list(other.rglob("*.tmp")) and not corpus.missing
    assert {k: v for k, v in tiny.files(tmp_path).items() if "other" not in k} == before
    tiny.encode(other)
    assert tiny.files(other) == tiny.files(whole)


def test_half_a_part_is_seen(whole, tmp_path):
    corpus = tiny.encode(tmp_path, texts=tiny.TEXTS[:1])
    path = corpus.path(0)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"00000000.safetensors: must have \d+ bytes, got \d+"):
        corpus[0]


def test_what_others_left_half_done_is_removed(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    host = os.uname().nodename
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = {
        f".00000001.{host}.{dead.pid}.tmp": False,
        f".00000001.{host}.{os.getppid()}.tmp": True,  # which is alive
        ".00000001.another-host.1.tmp": True,  # which may be
    }
    for name in names:
        (folder / name).write_bytes(b"half")
    tiny.encode(tmp_path, texts=tiny.TEXTS[:1])
    assert {name: (folder / name).exists() for name in names} == names


def test_texts_that_cannot_be_read(tmp_path):
    cases = {
        "latin.txt": (b"caf\xe9 au lait", "latin.txt: must be UTF-8, got byte 0xe9"),
        "broken.jsonl": (b'{"text": "a"}\n{"text"', "broken.jsonl, line 2: must be JSON"),
        "other.jsonl": (b'{"body": "a"}', "line 1: must hold a string 'text', got keys body"),
        "page.html": (b"<p>", r"page.html: a text must be one of .txt"),
        "nothing.txt": (b"", "must hold at least one token"),
    }
    for name, (content, words) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words) as caught:
            tiny.encode(tmp_path / "out", texts=[path])
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"missing.txt: there is no such text"):
        tiny.encode(tmp_path / "out", texts=[tmp_path / "missing.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: there is no .txt"):
        tiny.encode(tmp_path / "out", texts=[tmp_path / "empty"])
    assert [p.name for p in (tmp_path / "out").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"bos": "some"}, ValueError, "bos must be each or none, got 'some'"),
        ({"keep": "some"}, ValueError, "keep must be all or top_k, got 'some'"),
        ({"worker": (3, 3)}, ValueError, r"worker must be \(i, n\)"),
        ({"ctx": 1}, ValueError, "ctx must leave room for text, got 1"),
        ({"dtype": torch.bfloat16}, TypeError, "dtype must be float16 or float32"),
        ({"texts": "a text"}, TypeError, "texts must be a list of texts or Paths, got str"),
    ],
)
def test_arguments(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        tiny.encode(tmp_path, **options)


# Texts


def test_every_kind_of_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one\ntwo", encoding="utf-8")
    (folder / "b.jsonl").write_text('{"text": "three"}\n\n"four"\n')
    parquet.write_table(pyarrow.table({"text": ["five", None, "six"]}), folder / "c.parquet")
    (folder / "d.html").write_text("no text")
    given = [folder, "seven", io.StringIO("eight")]
    texts = ["one\ntwo", "three", "four", "five", "six", "seven", "eight"]
    assert list(pieces(given)) == [(text, True) for text in texts]
    with pytest.raises(ValueError, match=r"c.parquet: must have a column 'body', got text"):
        list(pieces([folder / "c.parquet"], "body"))
    (folder / "c.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"c.parquet: must be Parquet"):
        list(pieces([folder / "c.parquet"]))


def test_a_long_text_comes_in_pieces(tmp_path):
    line = "word " * 19 + "end.\n"
    path = tmp_path / "long.txt"
    path.write_text(line * 25000)
    found = list(pieces([path]))
    assert [begins for _, begins in found] == [True, False, False]
    assert all(piece.endswith("end.\n") for piece, _ in found)
    assert "".join(piece for piece, _ in found) == line * 25000


# Memory and Ctrl-C


LONG = """
import sys
sys.path.insert(0, {tests!r})
import tiny_corpus as tiny
out, count = sys.argv[1], int(sys.argv[2])
tiny.encode(out, texts=(tiny.TEXTS[4] for _ in range(count)), part_tokens=4096, batch_size=64)
print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
"""


def test_memory_is_flat(tmp_path):
    peaks = []
    for count in (20, 100):
        code = LONG.format(tests=str(TESTS))
        command = [sys.executable, "-c", code, tmp_path / str(count), str(count)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    few, many = (Corpus(tmp_path / str(count)).summary()["positions"] for count in (20, 100))
    assert many > 4.9 * few and peaks[1] < 1.05 * peaks[0]


def test_ctrl_c_ends_after_the_part(whole, tmp_path, capfd):
    run = tiny_run(tmp_path)
    written = run.write_part

    def interrupted(part, shown=None):
        written(part, shown)
        if part == 1:
            os.kill(os.getpid(), signal.SIGINT)

    run.write_part = interrupted
    run.write_parts(range(run.corpus.part_count), progress=False)
    said = capfd.readouterr().err.splitlines()
    left = run.corpus.part_count - 2
    assert said == [f"stopped after part 1, {left} are left: the same command goes on from there"]
    assert run.corpus.missing == list(range(2, run.corpus.part_count))
    assert tiny.files(tiny.encode(tmp_path).folder) == tiny.files(whole)


# The command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model folder and transcoders on disk."""
    from sparse_transcoder import save_transcoders

    folder = tmp_path_factory.mktemp("saved")
    tiny.model().save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    weights = tiny.transcoders()
    coder = TranscoderWeights(
        weights[0].W_enc, weights[0].b_enc, weights[0].W_dec, hook_in="mlp.hook_in", layer=0
    )
    save_transcoders({0: coder}, folder / "transcoders")
    return folder


def command(saved, out, *more):
    shared = ["--model", saved / "model", "--transcoders", saved / "transcoders", "--out", out]
    return ["encode", *map(str, shared), "--ctx", "16", "--part-tokens", "160", *more]


def test_the_command(saved, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("\n".join(tiny.TEXTS))
    for index in range(2):
        assert main(command(saved, tmp_path / "two", "--worker", f"{index}/2", str(text))) == 0
    said = capsys.readouterr().err
    assert re.search(r"tokens, [\d,]+ recorded, skipped: \d+ padding, \d+ first position", said)
    assert re.search(r"100.0 %  .* tokens/s", said)
    assert main(command(saved, tmp_path / "one", "--quiet", str(text))) == 0
    assert capsys.readouterr().err == ""
    assert tiny.files(tmp_path / "one") == tiny.files(tmp_path / "two")
    assert main(command(saved, tmp_path / "one", "--keep", "all", str(text))) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(command(saved, tmp_path / "one", "no.txt")) == 1
    assert capsys.readouterr().err == "error: no.txt: there is no such text\n"


def test_a_name_of_the_hub(saved, tmp_path):
    """The hub's cache as huggingface_hub lays it out, without a network. What the model is called
    does not matter: the folder of a run by path goes on."""
    text = tmp_path / "a.txt"
    text.write_text("\n".join(tiny.TEXTS))
    assert main(command(saved, tmp_path / "out", "--quiet", str(text))) == 0
    want = tiny.files(tmp_path / "out")
    (tmp_path / "out" / "parts" / "00000001.safetensors").unlink()
    cache = tmp_path / "home" / "hub" / "models--some--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    shutil.copytree(saved / "model", cache / "snapshots" / ("0" * 40))
    arguments = command(saved, tmp_path / "out", "--quiet", str(text))
    arguments[arguments.index("--model") + 1] = "some/tiny"
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-m", "sparse_transcoder"]
    done = subprocess.run([*run, *arguments], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert tiny.files(tmp_path / "out") == want
    arguments[arguments.index("--model") + 1] = "some/other"
    done = subprocess.run([*run, *arguments], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and re.fullmatch(r"error: .*some/other.*\n", done.stderr)


def test_stdin(saved, tmp_path, monkeypatch, capsys):
    text = "\n".join(tiny.TEXTS)
    (tmp_path / "a.txt").write_text(text)
    assert main(command(saved, tmp_path / "file", "--quiet", str(tmp_path / "a.txt"))) == 0
    want = tiny.files(tmp_path / "file")
    for given in (text, "", text):  # an empty stdin goes on with the text that was given
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        assert main(command(saved, tmp_path / "stdin", "--quiet", "-")) == 0
        assert tiny.files(tmp_path / "stdin") == want
        (tmp_path / "stdin" / "parts" / "00000001.safetensors").unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO(text + "more"))
    assert main(command(saved, tmp_path / "stdin", "--quiet", "-")) == 1
    assert re.match(r"error: .* holds another run: text\.", capsys.readouterr().err)


def test_a_manifest_of_another_schema(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no manifest.json, so no corpus"):
        Corpus(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(ValueError, match=r"must have schema 1, got 99"):
        Corpus(tmp_path)
