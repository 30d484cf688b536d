"""The package as it is installed: quiet, typed, and particular about its torch."""

import importlib.resources
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sparse_transcoder
import torch

EXAMPLES = Path(__file__).parents[1] / "examples" / "transcoders"
PUBLIC = {
    "SparseTranscoderEncoder",
    "TranscoderWeights",
    "encode_single_layer",
    "load_transcoders",
    "save_transcoders",
}


def python(code, *options):
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)


def test_import_is_quiet_and_leaves_cuda_alone():
    code = "import sparse_transcoder, torch; assert not torch.cuda.is_initialized()"
    done = python(code, "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_import_changes_no_setting():
    code = """
import torch
def settings():
    names = ("num_threads", "num_interop_threads", "default_dtype", "float32_matmul_precision")
    values = [getattr(torch, "get_" + name)() for name in names]
    return [*values, torch.is_grad_enabled(), torch.get_rng_state().sum()]
before = settings()
import sparse_transcoder as s
weights = s.TranscoderWeights(torch.zeros(9, 4), torch.zeros(9))
s.SparseTranscoderEncoder({0: weights}).encode_all_layers({0: torch.zeros(3, 4)})
assert settings() == before
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_import_leaves_the_warnings_as_they_are():
    """The filters, and what torch says about its own sparse tensors."""
    code = """
import warnings, torch
before = list(warnings.filters)
import sparse_transcoder
assert warnings.filters == before
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    torch.sparse_csr_tensor([0], [], [], (0, 0), check_invariants=False)
assert any("beta" in str(warning.message) for warning in caught)
"""
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_encode_sparse_needs_no_warning_filter():
    """Its tensors are torch's first CSR tensors, made in many threads where warnings are errors."""
    code = """
import warnings, torch
from concurrent.futures import ThreadPoolExecutor
import sparse_transcoder as s
encoder = s.SparseTranscoderEncoder({0: s.TranscoderWeights(torch.eye(4), torch.zeros(4))})
before = list(warnings.filters)
with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda n: encoder.encode_sparse(0, 2 * torch.eye(4)), range(32)))
assert all(torch.equal(one.to_dense(), 2 * torch.eye(4)) for one in found)
assert warnings.filters == before
"""
    done = python(code, "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_names():
    assert set(sparse_transcoder.__all__) >= PUBLIC
    assert len(set(sparse_transcoder.__all__)) == len(sparse_transcoder.__all__)
    for name in sparse_transcoder.__all__:
        assert hasattr(sparse_transcoder, name), name
    for name in PUBLIC:
        assert getattr(sparse_transcoder, name).__doc__, name
    assert sparse_transcoder.reference.encode.__doc__


def test_arguments():
    """Names, order and defaults that callers write down."""

    def arguments(function):
        return [
            (p.name, p.default)
            for p in inspect.signature(function).parameters.values()
            if p.name not in ("self", "args")
        ]

    none = inspect.Parameter.empty
    encoder = sparse_transcoder.SparseTranscoderEncoder
    assert arguments(encoder)[:6] == [
        ("transcoders", none),
        ("top_k", 20),
        ("activation_threshold", 1.0),
        ("use_compile", True),
        ("chunk_size", 512),
        ("screening", "auto"),
    ]
    assert inspect.signature(encoder).parameters["screening"].kind is inspect.Parameter.KEYWORD_ONLY
    assert arguments(encoder.encode_layer) == [("layer_idx", none), ("hidden", none)]
    assert arguments(encoder.encode_chunked) == [("layer_idx", none), ("hidden", none)]
    assert arguments(encoder.encode_all_layers) == [("hidden_states", none)]
    assert arguments(encoder.extract_attribution_features) == [
        ("hidden_states", none),
        ("top_k_global", 100),
        ("exclude", None),
        ("inputs", None),
    ]
    single = [
        ("hidden", none),
        ("W_enc", none),
        ("b_enc", none),
        ("top_k", none),
        ("threshold", none),
    ]
    assert arguments(encoder.encode_single_layer) == single
    assert arguments(sparse_transcoder.encode_single_layer) == single
    assert arguments(sparse_transcoder.load_transcoders) == [
        ("transcoder_dir", none),
        ("layers", None),
        ("device", None),
        ("layer", None),
        ("k", None),
        ("variant", None),
    ]
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    parameters = inspect.signature(sparse_transcoder.load_transcoders).parameters
    assert [name for name, p in parameters.items() if p.kind is keyword_only] == [
        "layer",
        "k",
        "variant",
    ]
    assert arguments(sparse_transcoder.save_transcoders) == [
        ("transcoders", none),
        ("dir", none),
        ("dtype", None),
    ]
    weights = arguments(sparse_transcoder.TranscoderWeights)
    assert weights[:5] == [
        ("W_enc", none),
        ("b_enc", none),
        ("W_dec", None),
        ("b_dec", None),
        ("layer", 0),
    ]
    assert {
        "threshold",
        "k",
        "W_skip",
        "write_layers",
        "input_bias",
        "ln_weight",
        "ln_bias",
        "hook_in",
        "hook_out",
    } <= {n for n, _ in weights[5:]}


def test_weights_keep_what_they_are_given():
    given = {
        "W_enc": torch.ones(6, 4),
        "b_enc": torch.ones(6),
        "W_dec": torch.ones(4, 6),
        "b_dec": torch.ones(4),
        "layer": 9,
        "threshold": torch.ones(6),
        "W_skip": torch.ones(4, 4),
        "input_bias": torch.ones(4),
        "hook_in": "mlp.hook_in",
        "hook_out": "mlp.hook_out",
    }
    weights = sparse_transcoder.TranscoderWeights(**given)
    for name, value in given.items():
        held = getattr(weights, name)
        assert (
            held is value or torch.equal(held, value) if torch.is_tensor(value) else held == value
        )
    bare = sparse_transcoder.TranscoderWeights(given["W_enc"], given["b_enc"])
    for name in (
        "W_dec",
        "b_dec",
        "threshold",
        "k",
        "W_skip",
        "input_bias",
        "ln_weight",
        "ln_bias",
    ):
        assert getattr(bare, name) is None
    with pytest.raises(TypeError):
        sparse_transcoder.TranscoderWeights(
            torch.ones(6, 4), torch.ones(6), None, None, 0, torch.ones(6)
        )


@pytest.mark.skipif(sparse_transcoder.cuda_kernels, reason="this build has CUDA kernels")
def test_cuda_is_refused_without_kernels():
    # Fake tensors stand for those of a CUDA device. They change what torch knows of devices, so
    # they are made in a process of their own.
    code = """
import sparse_transcoder as s, torch
from torch._subclasses.fake_tensor import FakeTensorMode

def weights(device):
    return {3: s.TranscoderWeights(torch.zeros(8, 4, device=device), torch.zeros(8, device=device))}

def refused(call):
    try:
        call()
    except ValueError as error:
        print(error)

cpu = s.SparseTranscoderEncoder(weights("cpu"))
with FakeTensorMode():
    refused(lambda: s.SparseTranscoderEncoder(weights("cuda:0")))
    hidden = torch.empty(2, 4, device="cuda:0")
refused(lambda: cpu.encode_layer(3, hidden))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line[: line.index(":", 10)] for line in lines] == [
        "layer 3: W_enc must be on cpu, got cuda",
        "layer 3: hidden must be on cpu, got cuda",
    ]
    assert all(
        "has no CUDA kernels" in line and "SPARSE_TRANSCODER_CUDA=ON" in line for line in lines
    )


@pytest.mark.skipif(sparse_transcoder.cuda_kernels, reason="this build has CUDA kernels")
def test_the_default_device_is_the_cpu_without_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    weights = sparse_transcoder.load_transcoders(EXAMPLES, layers=[5])
    assert weights[5].W_enc.device.type == "cpu"


def test_version_is_the_project_s():
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'\nversion = "{sparse_transcoder.__version__}"\n' in project
    config = Path(sparse_transcoder.cmake_prefix_path, "lib", "cmake", "sparse_transcoder")
    declared = (config / "sparse_transcoderConfigVersion.cmake").read_text()
    assert f'set(PACKAGE_VERSION "{sparse_transcoder.__version__}")' in declared


def test_typed():
    assert importlib.resources.files(sparse_transcoder).joinpath("py.typed").is_file()


def test_cmake_prefix_path():
    found = []
    for folder, _, files in os.walk(sparse_transcoder.cmake_prefix_path):
        found += [
            os.path.join(folder, file) for file in files if file.lower().endswith("config.cmake")
        ]
    assert any(os.path.join("lib", "cmake", "sparse_transcoder") in path for path in found), found


@pytest.mark.parametrize("version", ["2.99.1+cpu", "1.13.0"])
def test_another_torch_is_refused(version):
    code = f"""
import torch
torch.__version__ = torch.torch_version.TorchVersion({version!r})
try:
    import sparse_transcoder
except ImportError as error:
    print(error)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    built = ".".join(torch.__version__.split(".")[:2])
    assert len(done.stdout.strip().splitlines()) == 1, done.stdout
    assert built in done.stdout and ".".join(version.split(".")[:2]) in done.stdout


def test_another_patch_release_is_accepted():
    major, minor = torch.__version__.split(".")[:2]
    version = f"torch.torch_version.TorchVersion('{major}.{minor}.99')"
    done = python(f"import torch; torch.__version__ = {version}; import sparse_transcoder")
    assert done.returncode == 0, done.stderr
