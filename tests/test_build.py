"""What the build chooses: its torch, and whether and by what the CUDA kernels are compiled."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def run(*command, **options):
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )


def tool(name):
    """A program of the running environment, or of the machine."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} is not here"
    return found


def test_the_torch_to_build_against_is_found_without_importing_it(tmp_path):
    code = f"""
import runpy, sys
# As build isolation does:
sys.path = [folder for folder in sys.path if "site-packages" not in folder]
runpy.run_path({str(ROOT / "cmake" / "find_torch.py")!r}, run_name="__main__")
assert "torch" not in sys.modules
"""
    for command in ([ROOT / "cmake" / "find_torch.py"], ["-c", code]):
        done = run(sys.executable, *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.strip()) == Path(torch.__file__).parent


@pytest.fixture
def nvcc(tmp_path):
    """Makes a toolkit whose nvcc says that it is of some version."""

    def make(version):
        compiler = tmp_path / version / "bin" / "nvcc"
        compiler.parent.mkdir(parents=True)
        compiler.write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.88'\n"
        )
        compiler.chmod(0o755)
        return compiler

    return make


def test_nvcc_is_of_the_major_version_of_cuda_that_is_asked_for(nvcc):
    old, new = nvcc("97.4"), nvcc("98.1")
    environment = {"PATH": str(old.parent), "CUDA_HOME": str(new.parents[1])}
    for major, found in (("97", old), ("98", new), ("99", None), ("9", None)):
        done = run(sys.executable, ROOT / "cmake" / "find_nvcc.py", major, env=environment)
        assert (done.returncode == 0, done.stdout.strip()) == (
            found is not None,
            str(found or ""),
        ), major


@pytest.mark.parametrize(
    ("cuda", "choice", "said"),
    [
        ("None", "AUTO", "CUDA kernels: none, torch 2.99.0 was built without CUDA"),
        (
            "'99.1'",
            "AUTO",
            "CUDA kernels: none, torch 2.99.0 has CUDA 99.1, and no nvcc of CUDA 99 was found",
        ),
        ("'99.1'", "OFF", "CUDA kernels: none, SPARSE_TRANSCODER_CUDA is OFF"),
        ("None", "ON", "SPARSE_TRANSCODER_CUDA is ON, but torch 2.99.0 was built without CUDA"),
        ("'99.1'", "ON", 'to get one: pip install "cuda-toolkit[nvcc,crt,nvvm,cccl]==99.1.*"'),
    ],
)
def test_cuda_kernels_are_chosen_in_one_line(tmp_path, cuda, choice, said):
    """Configured beside a stand-in for torch, which holds what the build looks at."""
    config = tmp_path / "torch" / "share" / "cmake" / "Torch"
    for folder in (config, tmp_path / "torch" / "include" / "torch" / "csrc" / "api" / "include"):
        folder.mkdir(parents=True)
    (config / "TorchConfigVersion.cmake").write_text('set(PACKAGE_VERSION "2.99.0")\n')
    (tmp_path / "torch" / "version.py").write_text(f"cuda: Optional[str] = {cuda}\n")
    options = [
        f"-DTorch_DIR={config}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DSPARSE_TRANSCODER_CUDA={choice}",
    ]
    generator = ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    done = run(tool("cmake"), "-S", ROOT, "-B", tmp_path / "build", *generator, *options)
    assert (done.returncode == 0) == (choice != "ON"), done.stderr
    assert said in " ".join((done.stderr if choice == "ON" else done.stdout).split())
