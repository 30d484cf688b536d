"""The library without Python: its own tests, and a program that finds the installed package."""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sparse_transcoder
import torch
from safetensors.torch import save_file
from sparse_transcoder import SparseTranscoderEncoder, load_transcoders

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
TOKENS, TOP_K, THRESHOLD = 6, 5, 0.5  # of cpp_consumer/server.cpp


def tool(name):
    """A program of the running environment, or of the machine."""
    found = shutil.which(
        name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    assert found, f"{name} is not here"
    return found


def run(*command, **options):
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )


def configure(source, build, *options):
    prefix = f"-DCMAKE_PREFIX_PATH={sparse_transcoder.cmake_prefix_path}"
    return run(
        tool("cmake"),
        "-S",
        source,
        "-B",
        build,
        "-GNinja",
        f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
        prefix,
        *options,
    )


def build(source, folder, *options):
    done = configure(source, folder, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    done = run(tool("cmake"), "--build", folder)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpp_consumer")
    build(TESTS / "cpp_consumer", folder, "-DCMAKE_BUILD_TYPE=Debug")
    return folder / "server"


def write_checkpoint(folder):
    for layer, (features, hidden_size, dtype) in {
        0: (40, 16, torch.float32),
        7: (300, 24, torch.bfloat16),
        12: (3, 33, torch.float16),
    }.items():
        generator = torch.Generator().manual_seed(layer)
        tensors = {
            "W_enc": torch.randn(features, hidden_size, generator=generator) / hidden_size**0.5,
            "b_enc": torch.randn(features, generator=generator),
            "W_dec": torch.randn(features, hidden_size, generator=generator),
            "b_dec": torch.randn(hidden_size, generator=generator),
        }
        if layer == 7:
            tensors["activation_function.threshold"] = torch.rand(features, generator=generator)
        save_file(
            {name: tensor.to(dtype) for name, tensor in tensors.items()},
            folder / f"layer_{layer}.safetensors",
        )
    (folder / "config.yaml").write_text(
        "model_kind: transcoder_set\nfeature_input_hook: mlp.hook_in\n"
    )


def test_program_gives_the_bits_that_python_gives(server, tmp_path):
    write_checkpoint(tmp_path)
    done = run(server, tmp_path)
    assert done.returncode == 0, done.stderr
    printed = {}
    for line in done.stdout.splitlines():
        layer, token, active, entries = re.fullmatch(
            r"layer (\d+), token (\d+), active (\S+):((?: \d+=\S+)*)", line
        ).groups()
        pairs = [entry.split("=") for entry in entries.split()]
        row = [
            float(active),
            [int(index) for index, _ in pairs],
            [float(value) for _, value in pairs],
        ]
        printed.setdefault(int(layer), {})[int(token)] = row

    weights = load_transcoders(tmp_path, device="cpu")
    encoder = SparseTranscoderEncoder(weights, TOP_K, THRESHOLD)
    assert sorted(printed) == sorted(weights) == [0, 7, 12]
    for layer, rows in printed.items():
        size = weights[layer].W_enc.shape[1]
        hidden = ((torch.arange(TOKENS * size) * 37 % 101 - 50) / 16).view(TOKENS, size)
        expected = encoder.encode_layer(layer, hidden)
        sparsity, indices, activations = zip(*(rows[token] for token in range(TOKENS)), strict=True)
        assert torch.equal(torch.tensor(sparsity), expected["sparsity"])
        assert torch.equal(torch.tensor(indices), expected["indices"])
        assert torch.equal(torch.tensor(activations), expected["activations"])
        assert expected["activations"].any()


def test_program_names_its_user_s_mistake(server, tmp_path):
    done = run(server, tmp_path / "none")
    assert done.returncode == 1
    assert done.stderr.strip() == f"{tmp_path / 'none'}: there is no such folder"
    (tmp_path / "layer_3.safetensors").write_bytes(b"short")
    done = run(server, tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr.startswith(f"{tmp_path / 'layer_3.safetensors'}: ")
        and len(done.stderr.splitlines()) == 1
    )


def test_program_has_no_python(server):
    libraries = run("ldd", server).stdout
    assert (
        "libsparse_transcoder" in libraries
        and "libtorch_cpu" in libraries
        and "not found" not in libraries
    )
    assert "libpython" not in libraries and "libtorch_python" not in libraries


@pytest.mark.parametrize("other", ["2.99.0", "1.13.1"])
def test_another_torch_is_refused_by_cmake(tmp_path, other):
    torch_config = tmp_path / "torch"
    torch_config.mkdir()
    (torch_config / "TorchConfig.cmake").write_text("set(TORCH_FOUND TRUE)\n")
    (torch_config / "TorchConfigVersion.cmake").write_text(f'set(PACKAGE_VERSION "{other}")\n')
    done = configure(TESTS / "cpp_consumer", tmp_path / "build", f"-DTorch_DIR={torch_config}")
    assert done.returncode != 0
    built = ".".join(torch.__version__.split(".")[:2])
    said = " ".join(done.stderr.split())
    assert (
        f"sparse_transcoder was built against torch {built} and cannot be used with torch {other}"
        in said
    )


@pytest.fixture(scope="session")
def cpp_tests():
    """The C++ tests with a library that hides nothing, in a folder that later runs build on."""
    folder = ROOT / "build" / f"cpp_tests-{torch.__version__}"
    options = ["-DSPARSE_TRANSCODER_CPP_TESTS=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    build(ROOT, folder, *options, "-DSPARSE_TRANSCODER_CUDA=OFF")
    return folder / "tests/cpp"


def test_cpp_tests(cpp_tests):
    done = run(tool("ctest"), "--test-dir", cpp_tests, "--output-on-failure", "--parallel", 2)
    assert done.returncode == 0, done.stdout + done.stderr


def test_screening_in_emulated_amx(cpp_tests):
    """test_screening.py on the library whose AMX tiles are plain C++, in place of the package's."""
    library = cpp_tests / "emulated_amx" / "libsparse_transcoder.so"
    if platform.machine() != "x86_64":
        pytest.skip("AMX is an instruction set of x86-64")
    file = TESTS / "test_screening.py"
    command = [sys.executable, "-m", "pytest", file, "-k", "avx512amx", "-p", "no:cacheprovider"]
    done = run(*command, env={**os.environ, "LD_PRELOAD": str(library)}, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    if "passed" not in done.stdout:
        pytest.skip("the emulation needs AVX-512 VNNI")
