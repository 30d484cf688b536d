"""The `gpu` mark and the `device` fixture."""

import os

import pytest
import sparse_transcoder
import torch


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "gpu: needs CUDA; fails instead of skipping when ST_REQUIRE_CUDA=1"
    )
    config.addinivalue_line(
        "markers", "alone: measures the device's time or memory; no other process may use it"
    )


def pytest_runtest_setup(item):
    if not item.get_closest_marker("gpu"):
        return
    if not torch.cuda.is_available():
        lack = "torch sees no CUDA device"
    elif not sparse_transcoder.cuda_kernels:
        lack = "sparse_transcoder was built without CUDA kernels"
    else:
        return
    if os.environ.get("ST_REQUIRE_CUDA") == "1":
        pytest.fail(f"ST_REQUIRE_CUDA=1, but {lack}", pytrace=False)
    pytest.skip(lack)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")
