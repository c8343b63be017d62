"""GPU tests run on CUDA, or, told by TRITON_INTERPRET=1, on the CPU under Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a GPU test that cannot run is a failure")


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the Triton kernels run."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if INTERPRETED:
        return torch.device("cpu")
    if request.config.getoption("--no-skips", default=False):
        pytest.fail("no CUDA device, and TRITON_INTERPRET=1 is not set")
    pytest.skip("no CUDA device")


@pytest.fixture(scope="session", autouse=True)
def _patched_once_per_launch() -> Iterator[None]:
    """Spare Triton's interpreter about a third of its time.

    It replaces the functions of `triton.language` at a launch, and again at every call of one jitted function
    by another, `tl.sum` for one, which takes some milliseconds. What a launch has replaced already is left.
    """
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    language, call = interpreter.tl, interpreter.GridExecutor.__call__
    replace: Any = interpreter._patch_lang
    scope: Any = getattr(interpreter, "_LangPatchScope", None)  # absent from older versions
    replaced: set[str] = set()

    def replace_once(function: Any) -> Any:
        given = set(map(id, function.__globals__.values()))
        found = {module.__name__ for module in (language, language.core) if id(module) in given}
        if found <= replaced:
            return scope and scope()
        replaced.update(found)
        return replace(function)

    def launch(self: Any, *arguments: Any, **constants: Any) -> Any:
        replaced.clear()
        return call(self, *arguments, **constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replace_once)
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        yield
