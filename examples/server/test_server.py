"""The feature server, driven over HTTP: what it answers is held against Python on the same rows.

    make server-test

FEATURE_SERVER names the program, MODEL a GGUF file of SmolLM2-135M-Instruct. MALFORMED is how many
malformed requests are sent, SOAK for how many seconds the soak lasts.
"""

import concurrent.futures
import contextlib
import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sparse_transcoder import SparseTranscoderEncoder, load_transcoders

HERE = Path(__file__).resolve().parent
TRANSCODERS = HERE.parent / "transcoders"
PROGRAM = os.environ["FEATURE_SERVER"]
MODEL = os.environ["MODEL"]
MALFORMED = int(os.environ.get("MALFORMED", 1000))
SOAK = float(os.environ.get("SOAK", 10))
SANITIZED = PROGRAM.endswith("san/feature_server")  # it keeps freed memory for a while
LAYERS = [5, 10, 15, 20]
PROMPTS = [
    "When the Eiffel Tower opened in Paris in 1889, no building in the world was taller.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "The doctor said that coffee after dinner keeps people awake, but my aunt never believed it.",
    "Émile écrivit à sa sœur: « 東京 est loin. » 🗼 And then he slept.",
]


class Server:
    """A running feature_server; a with block ends it with SIGTERM and looks at its exit."""

    def __init__(self, *options, model=MODEL, transcoders=TRANSCODERS):
        command = [PROGRAM, "--model", model, "--transcoders", transcoders, "--port", 0]
        self.process = subprocess.Popen(
            [str(part) for part in [*command, *options]],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        found = re.fullmatch(r"listening on http://127\.0\.0\.1:(\d+)\n", line)
        assert found, f"{line!r}: {self.process.stderr.read()}"
        self.port = int(found[1])

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        _, err = self.process.communicate(timeout=120)
        if kind is None:
            assert self.process.returncode == 0, err
            assert not err, err

    def open(self, method, path, body=None, timeout=300):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        text = body if body is None or isinstance(body, bytes | str) else json.dumps(body)
        if isinstance(text, str):
            text = text.encode()
        connection.request(method, path, text)
        return connection, connection.getresponse()

    def ask(self, method, path, body=None):
        """The response's status, headers and bytes."""
        connection, response = self.open(method, path, body)
        with contextlib.closing(connection):
            return response.status, response.headers, response.read()

    def post(self, path, body):
        status, headers, text = self.ask("POST", path, body)
        assert status == 200, text
        return json.loads(text), headers

    def stream(self, body):
        """The events of a streamed completion, and whether it ended as it must."""
        connection, response = self.open("POST", "/v1/completions", {**body, "stream": True})
        with contextlib.closing(connection):
            assert response.status == 200, response.read()
            text = response.read().decode()
        assert text.endswith("data: [DONE]\n\n"), text[-300:]
        lines = [one for one in text.split("\n\n") if one][:-1]
        return [json.loads(one.removeprefix("data: ")) for one in lines], response.headers

    def refusal(self, path, body):
        status, _, text = self.ask("POST", path, body)
        assert text.count(b"\n") == 1, text
        error = json.loads(text)["error"]
        assert error["code"] == status
        return status, error["message"]

    def metric(self, name, labels=""):
        text = self.ask("GET", "/metrics")[2].decode()
        found = re.search(rf"^sparse_transcoder_{name}{re.escape(labels)} (\S+)$", text, re.M)
        return float(found[1]) if found else 0.0

    def wait_for(self, condition, what):
        for _ in range(600):
            if condition():
                return
            time.sleep(0.1)
        raise AssertionError(f"not within a minute: {what}")

    def idle(self):
        self.wait_for(lambda: self.metric("sequences_busy") == 0, "no sequence is busy")
        assert self.metric("queue_depth") == 0

    def resident_bytes(self):
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGESIZE")


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    return tmp_path_factory.mktemp("dump")


@pytest.fixture(scope="module")
def server(dump):
    with Server("--dump", dump, "--sequences", 4) as running:
        yield running


@pytest.fixture(scope="module")
def float32_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "f32.gguf"
    subprocess.run([sys.executable, HERE / "f32_gguf.py", MODEL, path], check=True)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def exact(float32_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    with Server("--dump", folder, "--sequences", 4, model=float32_model) as running:
        running.folder = folder
        yield running


def rows_of(folder, name, layer, hidden_size=576):
    rows = np.fromfile(folder / f"{name}-{layer}.f32", dtype=np.float32)
    return torch.from_numpy(rows).view(-1, hidden_size)


def encoder_of(top_k, transcoders=TRANSCODERS):
    return SparseTranscoderEncoder(load_transcoders(transcoders, device="cpu"), top_k, 1.0)


def check_bits(rows, layer, top_k, features):
    """[[index, value], ..] of each row must be the engine's, bit for bit."""
    expected = encoder_of(top_k).encode_layer(layer, rows)
    assert len(features) == len(rows)
    for row, found in enumerate(features):
        kept = int((expected["activations"][row] != 0).sum())
        assert [index for index, _ in found] == expected["indices"][row, :kept].tolist()
        values = np.array([value for _, value in found], dtype=np.float32)
        assert values.tobytes() == expected["activations"][row, :kept].numpy().tobytes()


def reading(prompt, layers=LAYERS, top_k=32, **more):
    features = {"layers": layers, "topK": top_k, "prompt": True, "delay": True}
    return {"prompt": prompt, "max_tokens": 12, "features": features, **more}


# ---- what is encoded


def test_features_are_those_of_the_engine(server, dump):
    events, headers = server.stream(reading(PROMPTS[0]))
    tokens = [event for event in events if "features" in event]
    for layer in LAYERS:
        rows = rows_of(dump, headers["X-Request-Id"], layer)
        check_bits(rows, layer, 32, [token["features"][str(layer)] for token in tokens])
    assert any(token["features"]["10"] for token in tokens)


def test_features_are_those_of_the_engine_under_load(server, dump):
    wanted = [
        (prompt, layers, top_k, stream)
        for prompt in PROMPTS
        for layers, top_k, stream in [([10], 32, True), ([20, 5], 3, False), (LAYERS, 7, True)]
    ]

    def ask(one):
        prompt, layers, top_k, stream = one
        body = reading(prompt, layers, top_k, temperature=0.8, seed=len(prompt))
        if stream:
            events, headers = server.stream(body)
            return [event for event in events if "features" in event], headers
        answer, headers = server.post("/v1/completions", body)
        return answer["tokens"], headers

    with concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool:
        answers = list(pool.map(ask, wanted))
    for (_, layers, top_k, _), (tokens, headers) in zip(wanted, answers, strict=True):
        for layer in layers:
            rows = rows_of(dump, headers["X-Request-Id"], layer)
            check_bits(rows, layer, top_k, [token["features"][str(layer)] for token in tokens])


def hugging_face(prompt, layers):
    sys.path.insert(0, str(HERE.parent))
    from language_model import load_causal_model, mlp_traffic

    model, tokenizer = load_causal_model()
    ids = torch.tensor([tokenizer(prompt).input_ids])
    return {layer: seen[0][0] for layer, seen in mlp_traffic(model.model, ids, layers).items()}


def test_rows_are_those_of_hugging_face(exact):
    prompt = PROMPTS[0]
    expected = hugging_face(prompt, LAYERS)
    body = {"prompt": prompt, "max_tokens": 0, "features": {"prompt": True}}
    _, headers = exact.post("/v1/completions", body)
    for layer in LAYERS:
        rows = rows_of(exact.folder, headers["X-Request-Id"], layer)
        error = (rows - expected[layer]).norm(dim=1) / expected[layer].norm(dim=1)
        assert error.max() <= 1e-5, f"layer {layer}: {error.max()}"
        theirs = encoder_of(5).encode_layer(layer, expected[layer])["indices"]
        ours = encoder_of(5).encode_layer(layer, rows)["indices"]
        assert (theirs.sort(-1).values == ours.sort(-1).values).float().mean() > 0.99


def test_the_last_layer_has_every_row(float32_model, tmp_path):
    """llama.cpp drops rows of its last layer that need no output."""
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "W_enc": torch.randn(200, 576, generator=generator) / 4,
        "b_enc": torch.zeros(200),
        "W_dec": torch.zeros(200, 576),
        "b_dec": torch.zeros(576),
    }
    folder = tmp_path / "last"
    folder.mkdir()
    save_file(tensors, folder / "layer_29.safetensors")
    (folder / "config.yaml").write_text(
        "model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\n"
        "feature_output_hook: mlp.hook_out\n"
    )
    prompt = PROMPTS[0]
    expected = hugging_face(prompt, [29])[29]
    with Server("--dump", tmp_path, model=float32_model, transcoders=folder) as last:
        body = {"prompt": prompt, "max_tokens": 4, "features": {"prompt": True, "layers": [29]}}
        with concurrent.futures.ThreadPoolExecutor(2) as pool:  # beside one that needs few outputs
            other = pool.submit(last.stream, {"prompt": PROMPTS[1], "max_tokens": 30})
            answer, headers = last.post("/v1/completions", body)
            other.result()
    rows = rows_of(tmp_path, headers["X-Request-Id"], 29)
    prompt_rows = rows[: len(expected)]
    error = (prompt_rows - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() <= 1e-3  # beside a neighbour: arithmetic in a batch differs
    features = [token["features"]["29"] for token in answer["tokens"][: len(expected)]]
    result = encoder_of(32, folder).encode_layer(29, prompt_rows)
    assert [[i for i, _ in one] for one in features] == [
        [i for i, v in zip(*row, strict=True) if v > 0]
        for row in zip(result["indices"].tolist(), result["activations"].tolist(), strict=True)
    ]


# ---- neighbours


def test_two_prompts_at_once_are_as_each_alone(exact):
    """Rows of one sequence must never be those of another."""
    bodies = [reading(prompt, max_tokens=24) for prompt in PROMPTS]
    alone = [exact.post("/v1/completions", body) for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda body: exact.post("/v1/completions", body), bodies))
    for (one, of_one), (other, of_other) in zip(alone, together, strict=True):
        assert one["choices"] == other["choices"]
        for layer in LAYERS:
            rows = rows_of(exact.folder, of_one["X-Request-Id"], layer)
            again = rows_of(exact.folder, of_other["X-Request-Id"], layer)
            error = (rows - again).norm(dim=1) / rows.norm(dim=1)
            assert error.max() <= 5e-3, f"layer {layer}: {error.max()}"


def test_exact_answers_have_the_bytes_of_a_lone_one(exact):
    body = reading(PROMPTS[0], exact=True, max_tokens=24)
    alone = exact.ask("POST", "/v1/completions", body)[2]
    loud = [
        reading(PROMPTS[1], steer=[{"layer": 20, "feature": 1431, "strength": 30}], max_tokens=40),
        reading(PROMPTS[2], max_tokens=40, temperature=1.5, seed=4),
    ]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        others = [pool.submit(exact.post, "/v1/completions", one) for one in loud * 3]
        beside = [pool.submit(exact.ask, "POST", "/v1/completions", body) for _ in range(2)]
        for one in beside:
            assert one.result()[2] == alone
        for one in others:
            one.result()


def test_steering_one_of_two_leaves_the_other_alone(exact):
    calm = reading(PROMPTS[0], max_tokens=24)
    steer = [{"layer": 20, "feature": 1431, "strength": 30}]
    alone, _ = exact.post("/v1/completions", calm)
    plain, _ = exact.post("/v1/completions", reading(PROMPTS[2], max_tokens=24))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        steered = pool.submit(
            exact.post, "/v1/completions", reading(PROMPTS[2], max_tokens=24, steer=steer)
        )
        beside, _ = exact.post("/v1/completions", calm)
    assert steered.result()[0]["choices"] != plain["choices"]
    assert beside["choices"] == alone["choices"]
    # The largest that is let through must not leave numbers behind that harm the next request.
    wild = reading(PROMPTS[2], max_tokens=24, steer=[{**steer[0], "strength": 4e6 / 4}])
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        other = pool.submit(exact.ask, "POST", "/v1/completions", wild)
        beside, _ = exact.post("/v1/completions", calm)
    assert other.result()[0] in (200, 400)
    assert beside["choices"] == alone["choices"]
    assert exact.post("/v1/completions", calm)[0]["choices"] == alone["choices"]


def test_steering_adds_the_decoder_direction(exact):
    """Rows of a later layer, against transformers with the same direction added."""
    sys.path.insert(0, str(HERE.parent))
    from language_model import load_causal_model, mlp_traffic

    model, tokenizer = load_causal_model()
    direction = load_transcoders(TRANSCODERS, device="cpu")[10].W_dec[:, 7].float()
    hook = model.model.layers[10].register_forward_hook(
        lambda _, inputs, output: (
            (output[0] + 5 * direction, *output[1:])
            if isinstance(output, tuple)
            else output + 5 * direction
        )
    )
    ids = torch.tensor([tokenizer(PROMPTS[0]).input_ids])
    expected = mlp_traffic(model.model, ids, [15])[15][0][0]
    hook.remove()
    body = {"prompt": PROMPTS[0], "max_tokens": 0, "features": {"prompt": True, "layers": [15]}}
    body["steer"] = [
        {"layer": 10, "feature": 7, "strength": 2},
        {"layer": 10, "feature": 7, "strength": 3},
    ]
    _, headers = exact.post("/v1/completions", body)
    rows = rows_of(exact.folder, headers["X-Request-Id"], 15)
    error = (rows - expected).norm(dim=1) / expected.norm(dim=1)
    assert error.max() <= 1e-5


# ---- completions


def test_stream_and_answer_say_the_same(server):
    body = reading(PROMPTS[3], exact=True, temperature=0.7, seed=5)
    answer, _ = server.post("/v1/completions", body)
    events, _ = server.stream(body)
    prompts = [event for event in events if event.get("prompt")]
    generated = [event for event in events if "features" in event and not event.get("prompt")]
    assert "".join(event["text"] for event in prompts) == PROMPTS[3]
    assert [event["features"] for event in prompts + generated] == [
        token["features"] for token in answer["tokens"]
    ]
    text = "".join(event["choices"][0]["text"] for event in events if "choices" in event)
    assert text == answer["choices"][0]["text"]
    assert events[-1]["usage"] == answer["usage"]
    assert events[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    assert server.post("/v1/completions", {**body, "seed": 6})[0]["choices"] != answer["choices"]


def test_without_delay_features_are_those_of_the_token_that_was_read(server):
    now = {"prompt": PROMPTS[0], "max_tokens": 6, "exact": True, "features": {"layers": [10]}}
    later = {**now, "features": {"layers": [10], "delay": True, "prompt": True}}
    first, _ = server.post("/v1/completions", now)
    second, _ = server.post("/v1/completions", later)
    own = {token["position"]: token["features"] for token in second["tokens"]}
    assert len(first["tokens"]) == 6
    for token in first["tokens"]:
        assert token["read"] == token["position"] - 1
        assert token["features"] == own[token["read"]]


def test_no_tokens_and_no_features(server):
    answer, _ = server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 3})
    assert len(answer["tokens"]) == 3 and "features" not in answer["tokens"][0]
    answer, _ = server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 0})
    assert answer["tokens"] == [] and answer["usage"]["completion_tokens"] == 0


# ---- Neuronpedia's routes


def test_topk_by_token(server, dump):
    body = {"prompt": PROMPTS[0], "source": "10-transcoders", "topK": 4, "ignoreBos": True}
    answer, headers = server.post("/v1/activation/topk-by-token", body)
    rows = rows_of(dump, headers["X-Request-Id"], 10)
    found = [
        [[one["featureIndex"], one["activationValue"]] for one in result["topFeatures"]]
        for result in answer["results"]
    ]
    check_bits(rows, 10, 4, found)
    assert "".join(answer["tokens"]) == PROMPTS[0]
    assert [one["tokenPosition"] for one in answer["results"]] == list(range(len(rows)))
    assert {"token", "isSpecial"} <= answer["results"][0].keys()
    snake = {"prompt": PROMPTS[0], "source": "10-transcoders", "top_k": 4, "ignore_bos": True}
    assert server.post("/v1/activation/topk-by-token", snake)[0] == answer


def test_all_and_single_know_every_kept_feature(server, dump):
    body = {"prompt": PROMPTS[0], "selectedSources": ["10-transcoders", "20-transcoders"]}
    body |= {"sourceSet": "transcoders", "numResults": 1000}
    answer, headers = server.post("/v1/activation/all", body)
    found = {(one["source"], one["index"]): one for one in answer["activations"]}
    expected = {}
    for layer in (10, 20):
        rows = rows_of(dump, headers["X-Request-Id"], layer)
        dense = encoder_of(5).encode_sparse(layer, rows).to_dense()
        for index in dense.any(0).nonzero()[:, 0].tolist():
            expected[f"{layer}-transcoders", index] = dense[:, index]
    strongest = sorted(expected, key=lambda name: -expected[name].max().item())[:1000]
    assert len(found) == min(len(expected), 1000) and set(strongest) == set(found)
    for name, one in found.items():
        assert np.float32(one["values"]).tobytes() == expected[name].numpy().tobytes()
        assert one["maxValue"] == max(one["values"])
        assert one["values"].index(one["maxValue"]) == one["maxValueIndex"]
        assert one["sumValues"] == pytest.approx(sum(one["values"]), rel=1e-5)
    order = [one["maxValue"] for one in answer["activations"]]
    assert order == sorted(order, reverse=True) and answer["counts"] is None
    by_token, _ = server.post("/v1/activation/all", {**body, "sortByTokenIndexes": [3]})
    order = [one["values"][3] for one in by_token["activations"]]
    assert order == sorted(order, reverse=True) and order[0] > 0

    source, index = strongest[0]
    single, _ = server.post(
        "/v1/activation/single", {"prompt": PROMPTS[0], "source": source, "index": index}
    )
    assert single["activation"]["values"] == found[source, index]["values"]


def test_steer_completion(server):
    feature = {"source": "20-transcoders", "index": 1431, "strength": 15}
    body = {"prompt": "The most important thing is", "types": ["STEERED", "DEFAULT"]}
    body |= {"features": [feature], "nCompletionTokens": 8, "strengthMultiplier": 2}
    body |= {"temperature": 0, "freqPenalty": 0.5, "seed": 1, "steerMethod": "SIMPLE_ADDITIVE"}
    answer, _ = server.post("/v1/steer/completion", body)
    texts = {one["type"]: one["output"] for one in answer["outputs"]}
    assert texts.keys() == {"STEERED", "DEFAULT"} and texts["STEERED"] != texts["DEFAULT"]
    assert all(text.startswith(body["prompt"]) for text in texts.values())
    status, _, text = server.ask("POST", "/v1/steer/completion", {**body, "stream": True})
    events = text.decode().split("\n\n")
    assert status == 200 and events[-2] == "data: [DONE]"
    last = json.loads(events[-3].removeprefix("data: "))
    assert {one["type"]: one["output"] for one in last["outputs"]}.keys() == texts.keys()


def test_other_routes(server):
    assert json.loads(server.ask("GET", "/health")[2]) == {"status": "ok"}
    tokens, _ = server.post("/v1/tokenize", {"text": PROMPTS[0]})
    assert "".join(tokens["tokenStrings"]) == PROMPTS[0]
    can = json.loads(server.ask("GET", "/v1/capabilities")[2])
    assert sorted(one["layer"] for one in can["layers"]) == LAYERS
    assert can["sequences"] == 4 and can["layers"][0]["hookIn"] == "mlp.hook_in"
    page = server.ask("GET", "/")
    assert page[0] == 200 and b"<title>" in page[2]
    before = server.metric("encoded_rows_total", '{layer="15"}')
    answer, _ = server.post(
        "/v1/completions", {"prompt": "Hello", "max_tokens": 4, "features": {"layers": [15]}}
    )
    assert server.metric("encoded_rows_total", '{layer="15"}') == before + 4
    assert server.metric("active_features_total", '{layer="15"}') > 0
    assert server.metric("encode_duration_seconds_sum", '{phase="wall"}') > 0
    assert server.metric("generated_tokens_total") >= answer["usage"]["completion_tokens"]


def test_the_minimal_program(server):
    """It reads in a context of its own, so its numbers are near, not equal."""
    command = [Path(PROGRAM).parent / "minimal", MODEL, TRANSCODERS, PROMPTS[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pairs = [line.split() for line in done.stdout.splitlines()]
    body = {"prompt": PROMPTS[0], "source": "5-transcoders", "topK": 20}
    answer, _ = server.post("/v1/activation/topk-by-token", body)
    last = answer["results"][-1]["topFeatures"]
    assert int(pairs[0][0]) == last[0]["featureIndex"]
    assert float(pairs[0][1]) == pytest.approx(last[0]["activationValue"], rel=0.1)
    document = (HERE.parent.parent / "docs" / "server.md").read_text()
    assert (HERE / "minimal.cpp").read_text() in document


# ---- what is refused


COMPLETE, TOPK, STEER = "/v1/completions", "/v1/activation/topk-by-token", "/v1/steer/completion"


@pytest.mark.parametrize(
    "path, body, line",
    [
        (COMPLETE, {}, "prompt: is needed"),
        (COMPLETE, "[1]", "body: must be an object, got array"),
        (COMPLETE, '{"prompt": "a"', "body: must be JSON, which it is not at byte 15"),
        (COMPLETE, "", "body: must be JSON, which it is not at byte 1"),
        (COMPLETE, b'{"prompt": "\xff\xfe"}', "body: must be JSON, which it is not at byte"),
        (COMPLETE, "[" * 500_000, "body: must not be nested deeper than 16"),
        (COMPLETE, '{"prompt": "a", "seed": 1e999}', "body: must be JSON, got a number out of"),
        (COMPLETE, {"prompt": ["a"]}, "prompt: must be a string, got array"),
        (COMPLETE, {"prompt": ""}, "prompt: must have at least one token, got none"),
        (COMPLETE, {"prompt": "a", "max_tokens": -1}, "max_tokens: must be an integer from 0 to"),
        (COMPLETE, {"prompt": "a", "max_tokens": 1.5}, "max_tokens: must be an integer from 0 to"),
        (COMPLETE, {"prompt": "a", "max_tokens": 2**64 - 1}, "max_tokens: must be an integer"),
        (COMPLETE, {"prompt": "a", "temperature": "hot"}, "temperature: must be a number from 0"),
        (COMPLETE, {"prompt": "a", "stream": 1}, "stream: must be true or false, got 1"),
        (COMPLETE, {"prompt": "a", "stop": ["\n"]}, "stop: there is no such field"),
        (COMPLETE, {"prompt": "a", "model": "gpt-2"}, "model: must be Smollm2"),
        (COMPLETE, {"prompt": "a", "features": []}, "features: must be an object, got array"),
        (COMPLETE, {"prompt": "a", "features": {"layers": [6]}}, "features.layers: must be diff"),
        (COMPLETE, {"prompt": "a", "features": {"layers": [5, 5]}}, "features.layers: must be d"),
        (COMPLETE, {"prompt": "a", "features": {"topK": 33}}, "features.top_k: must be an integ"),
        (COMPLETE, {"prompt": "a", "steer": [{}]}, "steer.layer: is needed"),
        (
            COMPLETE,
            {"prompt": "a", "steer": [{"layer": 5, "feature": 2304, "strength": 1}]},
            "feature: must be an integer from 0 to 2303, got 2304",
        ),
        (
            COMPLETE,
            {"prompt": "a", "steer": [{"layer": 5, "feature": 1, "strength": 1e6}] * 64},
            "steer: the sum of layer 5 must stay within 1e6",
        ),
        (COMPLETE, {"prompt": "word " * 5000}, "prompt: its 50"),
        (TOPK, {"prompt": "a"}, "source: is needed"),
        (TOPK, {"prompt": "a", "source": "9-x"}, "source: must be one of 10-transcoders, 15-"),
        (STEER, {"prompt": "a"}, "types: must name STEERED, DEFAULT or both"),
        (STEER, {"prompt": "a", "types": ["OTHER"]}, "types: must be STEERED or DEFAULT, got"),
        ("/v1/activation/all", {"prompt": "a", "sourceSet": "x"}, "source_set: must be transcod"),
        ("/v1/activation/single", {"prompt": "a", "source": "5-transcoders"}, "index: is needed"),
        ("/v1/tokenize", {"text": 3}, "text: must be a string, got 3"),
    ],
)
def test_a_bad_request_is_refused_by_name(server, path, body, line):
    status, message = server.refusal(path, body)
    assert status == 400 and message.startswith(line), message


def test_other_refusals(server):
    status, message = server.refusal(COMPLETE, "x" * ((1 << 20) + 1))
    assert status == 413 and message == "body: must be at most 1 MiB"
    assert server.refusal("/v1/nothing", {})[0] == 404
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    with contextlib.closing(connection):  # chunks of which nobody says how many there will be
        pieces = (b"x" * 65536 for _ in range(20))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request("POST", COMPLETE, pieces)
            assert connection.getresponse().status == 413
    form = {"Content-Type": "application/x-www-form-urlencoded"}  # what curl -d says
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    with contextlib.closing(connection):
        body = json.dumps({"prompt": "word " * 1700, "max_tokens": 0})
        connection.request("POST", COMPLETE, body, form)
        assert connection.getresponse().status == 200
    status, message = server.refusal(
        COMPLETE, {"prompt": PROMPTS[0], "max_tokens": 3000, "deadline": 0.3}
    )
    assert status == 504 and message == "deadline: the request's time is over"
    server.idle()


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda options, folder: options.update({"--layers": "7"}), "there is no file for layer 7"),
        (lambda options, folder: options.update({"--model": "none.gguf"}), "there is no such file"),
        (
            lambda options, folder: options.update({"--model": str(folder / "config.yaml")}),
            "llama.cpp cannot load this model",
        ),
        (
            lambda options, folder: (folder / "config.yaml").write_text(
                "model_kind: transcoder_set\nfeature_input_hook: attn.hook_z\n"
            ),
            "layer 3: the transcoder's hook must be mlp.hook_in, hook_resid_mid or hook_resid_post"
            " in a model of architecture llama, got attn.hook_z",
        ),
        (lambda options, folder: options.update({"--port": "x"}), "--port must be a number"),
        (lambda options, folder: options.update({"--prot": "1"}), "there is no option --prot"),
    ],
)
def test_a_start_that_cannot_serve_is_refused(tmp_path, change, line):
    weights = {"W_enc": torch.zeros(4, 576), "b_enc": torch.zeros(4)}
    save_file(weights, tmp_path / "layer_3.safetensors")
    (tmp_path / "config.yaml").write_text(
        "model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\n"
    )
    options = {"--model": MODEL, "--transcoders": str(tmp_path), "--port": "0"}
    change(options, tmp_path)
    command = [PROGRAM, *(part for pair in options.items() for part in pair)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode in (1, 2) and not done.stdout
    assert line in done.stderr, done.stderr


@pytest.mark.parametrize(
    "layer, width, line",
    [
        (3, 64, "layer 3: the transcoder must read 576 numbers, as wide as the model, got 64"),
        (30, 576, "layer 30: the model has 30 layers"),
    ],
)
def test_transcoders_of_another_model_are_refused(tmp_path, layer, width, line):
    weights = {"W_enc": torch.zeros(4, width), "b_enc": torch.zeros(4)}
    save_file(weights, tmp_path / f"layer_{layer}.safetensors")
    command = [PROGRAM, "--model", MODEL, "--transcoders", tmp_path, "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.strip() == line


# ---- load


def test_a_full_queue_refuses_at_once():
    """Two sequences and three places to wait: five of twenty succeed, exactly."""
    with Server("--sequences", 2, "--queue", 3) as small:
        body = {"prompt": PROMPTS[0], "max_tokens": 300, "features": {}}
        barrier = threading.Barrier(20)

        def ask(_):
            barrier.wait()
            return small.ask("POST", COMPLETE, body)

        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(ask, range(20)))
        assert sorted(status for status, _, _ in answers) == [200] * 5 + [503] * 15
        for status, headers, text in answers:
            if status == 503:
                assert headers["Retry-After"] == "1"
                assert json.loads(text)["error"]["message"] == "the queue is full"
        assert small.metric("rejected_total") == 15
        small.idle()


def test_a_client_that_leaves_frees_its_sequence(server):
    cancelled = server.metric("cancelled_total")
    long = {"prompt": PROMPTS[0], "max_tokens": 3500, "features": {}}
    for stream in (True, False):
        connection = socket.create_connection(("127.0.0.1", server.port))
        body = json.dumps({**long, "stream": stream}).encode()
        head = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        server.wait_for(lambda: server.metric("sequences_busy") == 1, "the request runs")
        if stream:
            connection.recv(1000)
        connection.close()
        server.idle()
    assert server.metric("cancelled_total") == cancelled + 2


def test_a_slow_reader_holds_up_nobody_and_loses_nothing(server):
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    request = {"prompt": "word " * 3500, "max_tokens": 2, "stream": True}
    body = json.dumps({**request, "features": {"prompt": True, "delay": True}}).encode()
    head = f"POST {COMPLETE} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    read = [0.0]

    def stands_still():
        before, read[0] = read[0], server.metric("encoded_rows_total", '{layer="5"}')
        time.sleep(0.5)
        return before == read[0]

    server.wait_for(stands_still, "the slow reader's sequence is parked")
    assert server.metric("sequences_busy") == 1
    answer, _ = server.post(COMPLETE, {"prompt": PROMPTS[0], "max_tokens": 5})
    assert answer["usage"]["completion_tokens"] == 5
    text = b""
    while piece := connection.recv(1 << 16):
        text += piece
    connection.close()
    positions = [int(one) for one in re.findall(rb'"position":(\d+)', text)]
    assert positions == list(range(len(positions))) and len(positions) >= 3502
    assert b"data: [DONE]" in text
    server.idle()


def test_sigterm_ends_no_answer():
    with Server("--sequences", 2) as ending:
        body = {"prompt": PROMPTS[0], "max_tokens": 150, "features": {"layers": [10]}}
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            streams = [pool.submit(ending.stream, body) for _ in range(3)]  # one of them waits
            whole = pool.submit(ending.post, COMPLETE, body)
            ending.wait_for(lambda: ending.metric("queue_depth") == 2, "all requests are in")
            ending.process.send_signal(signal.SIGTERM)
            ending.wait_for(lambda: ending.ask("GET", "/health")[0] == 503, "the server drains")
            status, _, text = ending.ask("POST", COMPLETE, body)
            assert status == 503 and b"the server is shutting down" in text
            for one in streams:
                events, _ = one.result()
                assert len([event for event in events if "features" in event]) >= 1
                assert events[-1]["usage"]["completion_tokens"] == len(events) - 1
            assert whole.result()[0]["usage"]["completion_tokens"] > 0
        assert ending.process.wait(60) == 0


def test_the_end_of_the_drain_is_told():
    with Server("--sequences", 1, "--drain", 1) as ending:
        body = {"prompt": PROMPTS[0], "max_tokens": 3500, "stream": True}
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            running = pool.submit(ending.ask, "POST", COMPLETE, body)
            ending.wait_for(lambda: ending.metric("sequences_busy") == 1, "the request runs")
            ending.process.send_signal(signal.SIGTERM)
            text = running.result()[2].decode()
        assert "event: error\ndata: " in text and "the server is shutting down" in text
        assert ending.process.wait(60) == 0


def test_an_idle_server_does_not_spin():
    """Threads must sleep between batches, and there must not be more of them with every batch."""
    with Server("--threads", 2) as idle:

        def threads():
            return len(list(Path(f"/proc/{idle.process.pid}/task").iterdir()))

        def ticks():
            fields = Path(f"/proc/{idle.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            return int(fields[11]) + int(fields[12])

        body = {"prompt": PROMPTS[0], "max_tokens": 30, "features": {}}
        idle.post(COMPLETE, body)
        before = threads()
        idle.post(COMPLETE, body)
        assert threads() <= before + 1
        idle.idle()
        used = ticks()
        time.sleep(2)
        assert ticks() - used <= os.sysconf("SC_CLK_TCK") // 5  # a tenth of one core


def malformed(rng):
    """(path, bytes) of a request with a fault, or at least an absurd value."""
    good = {
        COMPLETE: reading("Hello", steer=[{"layer": 5, "feature": 1, "strength": 1.0}]),
        TOPK: {"prompt": "Hello", "source": "10-transcoders", "topK": 3},
        "/v1/activation/all": {"prompt": "Hello", "selectedSources": ["5-transcoders"]},
        "/v1/activation/single": {"prompt": "Hello", "source": "5-transcoders", "index": 1},
        STEER: {"prompt": "Hi", "types": ["STEERED"], "features": [], "nCompletionTokens": 1},
        "/v1/tokenize": {"text": "Hello"},
    }
    path = rng.choice(list(good))
    body = json.loads(json.dumps(good[path]))
    absurd = [None, -1, 2**63, -(2**63), 1e308, "", "\x00", [], {}, True, "é" * 50, [[[]]]]
    kind = rng.randrange(5)
    if kind < 2:  # a wrong value at some depth, a field too many or too few
        place = body
        while True:
            key = rng.choice(list(place)) if isinstance(place, dict) else rng.randrange(len(place))
            if not isinstance(place[key], dict | list) or not place[key] or rng.random() < 0.3:
                break
            place = place[key]
        if kind == 0 or isinstance(place, list):
            place[key] = rng.choice(absurd)
        elif rng.random() < 0.5:
            del place[key]
        else:
            place["x" * rng.randrange(100)] = rng.choice(absurd)
        text = json.dumps(body).encode()
    else:
        text = bytearray(json.dumps(body).encode())
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(text))
            text[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(4))
        if kind == 3:
            text = text[: rng.randrange(len(text))]
        if kind == 4:
            text = b"[" * rng.randrange(1, 100_000) if rng.random() < 0.2 else text * 3
    return path, bytes(text)


def send_malformed(port, seed, count):
    rng = random.Random(seed)
    answered = 0
    for _ in range(count):
        path, text = malformed(rng)
        length = len(text)
        if rng.random() < 0.15:  # a length that is a lie, or no number
            length = rng.choice([length + 10, max(length - 3, 0), -1, 2**70, "x", 1 << 30])
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n"
        )
        if rng.random() < 0.1:
            head = head[: rng.randrange(len(head))]
        with contextlib.closing(socket.create_connection(("127.0.0.1", port))) as connection:
            connection.settimeout(120)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(head.encode() + b"\r\n" + text)
                connection.shutdown(socket.SHUT_WR)
                start = b""
                while piece := connection.recv(1 << 16):
                    start = (start + piece)[:20]
                answered += start.startswith(b"HTTP/1.1 ")
    return answered


def test_malformed_requests_do_no_harm(server):
    before = server.resident_bytes()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        shares = [MALFORMED // 4] * 4
        answered = sum(pool.map(send_malformed, [server.port] * 4, range(4), shares))
    assert answered > MALFORMED * 0.6  # the others were cut, or had left
    server.idle()
    answer, _ = server.post(COMPLETE, {"prompt": PROMPTS[0], "max_tokens": 3})
    assert answer["usage"]["completion_tokens"] == 3
    assert SANITIZED or server.resident_bytes() - before < 200 << 20


def test_soak(server):
    """Streams, answers, steered ones and clients that leave, for a while: memory must stay flat."""
    end = time.monotonic() + SOAK
    seen = []

    def work(seed):
        rng = random.Random(seed)
        done = 0
        while time.monotonic() < end:
            body = reading(rng.choice(PROMPTS), max_tokens=rng.randrange(40))
            if rng.random() < 0.3:
                body["steer"] = [{"layer": 20, "feature": 1431, "strength": rng.uniform(-30, 30)}]
            if rng.random() < 0.1:
                body["exact"] = True
            choice = rng.random()
            if choice < 0.4:
                server.stream(body)
            elif choice < 0.7:
                server.post(COMPLETE, body)
            elif choice < 0.85:
                server.post("/v1/activation/all", {"prompt": rng.choice(PROMPTS)})
            else:
                connection, _ = server.open("POST", COMPLETE, {**body, "stream": True})
                connection.close()
            done += 1
            seen.append((time.monotonic(), server.resident_bytes()))
        return done

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        done = sum(pool.map(work, range(6)))
    server.idle()
    # After the first third, which fills every buffer, memory must not grow by more than noise.
    late = [size for when, size in seen if when > end - SOAK * 2 / 3]
    third = len(late) // 3
    first, last = sorted(late[:third])[third // 2], sorted(late[-third:])[third // 2]
    print(f"soak: {SOAK:.0f} s, {done} requests, {first >> 20} then {last >> 20} MiB resident")
    assert done > 10
    assert SANITIZED or last - first < 48 << 20
