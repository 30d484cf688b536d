"""Ray Data actors make the bytes of one process, also when one of them is killed."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_corpus as tiny

ray = pytest.importorskip("ray", reason="ray is not installed")
pytest.importorskip("ray.data")

TESTS = Path(__file__).resolve().parent


def load():
    """Writes down which process it is in, so that a test can kill it."""
    import tiny_corpus as tiny
    import torch

    torch.set_num_threads(1)
    out = os.environ["ST_PIDS"]
    (Path(out) / str(os.getpid())).touch()
    return tiny.model(), tiny.tokenizer(), tiny.encoder()


def test_a_killed_actor(tmp_path, monkeypatch):
    from sparse_transcoder.integrations.ray import encode_corpus

    pids, out, alone = (tmp_path / name for name in ("pids", "out", "alone"))
    pids.mkdir()
    monkeypatch.setenv("ST_PIDS", str(pids))
    options = {k: v for k, v in tiny.OPTIONS.items() if k != "progress"} | {"part_tokens": 32}
    path = os.pathsep.join([str(TESTS), *sys.path])
    env = {"PYTHONPATH": path, "ST_PIDS": str(pids), "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": env})
    killed = []

    def kill():
        """One actor, once a part is there."""
        while not killed:
            actors = [int(p.name) for p in pids.iterdir() if int(p.name) != os.getpid()]
            if actors and any((out / "parts").glob("*.safetensors")):
                os.kill(actors[0], signal.SIGKILL)
                killed.append(actors[0])
            time.sleep(0.01)

    threads = before = None
    try:
        import torch

        before = torch.get_num_threads()
        threads = threading.Thread(target=kill, daemon=True)
        threads.start()
        corpus = encode_corpus(load, tiny.TEXTS, out, actors=2, **options)
        assert killed and not corpus.missing
        assert len(list(pids.iterdir())) >= 3  # the driver, the one that was killed, another
        encode_alone(alone, options)
        assert tiny.files(out) == tiny.files(alone)
    finally:
        killed.append(None)
        ray.shutdown()
        torch.set_num_threads(before)


def encode_alone(out, options):
    from sparse_transcoder import encode_corpus

    encode_corpus(*load()[:2], tiny.TEXTS, tiny.encoder(), out, progress=False, **options)
