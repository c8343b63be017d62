"""GPU tests run on CUDA, or, told by TRITON_INTERPRET=1, on the CPU under Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a GPU test that cannot run is a failure")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the Triton kernels run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if request.config.getoption("--no-skips", default=False):
        pytest.fail("no CUDA device, and TRITON_INTERPRET=1 is not set")
    pytest.skip("no CUDA device")
