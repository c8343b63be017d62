"""Lets the kernels' modules be imported where Triton is not installed, for a ledger, which never runs them.

A launch is priced by its arguments, so all that is needed of a kernel are the names of it and its parameters.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_KERNELS = "winnow.trainer.kernels"


def has_triton() -> bool:
    """Whether Triton is installed."""
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a module without a spec, or None in its place
        return False


@contextmanager
def importable_kernels() -> Iterator[None]:
    """Inside, `triton` can be imported; afterwards nothing of a stand-in is left."""
    if has_triton():
        yield
        return
    # torch looks for Triton when these are first imported, and must not find the stand-in
    importlib.import_module("torch._dynamo")
    before, finder = set(sys.modules), _Finder()
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "triton"}
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            room, _, last = name.rpartition(".")
            if name.split(".")[0] == "triton" or (room == _KERNELS and last.endswith("_triton")):
                del sys.modules[name]
                # a submodule is also an attribute of its package
                vars(sys.modules.get(room, ModuleType(""))).pop(last, None)
        sys.modules.update(hidden)


class _Kernel:
    """A function decorated by `triton.jit`."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn, self.arg_names = fn, list(inspect.signature(fn).parameters)


class _Anything(type):
    """A class that can be called, subscripted and asked for any attribute; a function becomes a kernel."""

    def __call__(cls, *args: Any, **_: Any) -> Any:
        first = args[0] if len(args) == 1 else None
        if isinstance(first, _Kernel):
            return first
        return _Kernel(first) if inspect.isfunction(first) else cls

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, _: Any) -> Any:
        return cls


class _Something(metaclass=_Anything):
    """Stands for whatever a kernel's module takes from Triton while it is imported."""


class _Module(ModuleType):
    __path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Something


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, *_: object) -> ModuleSpec | None:
        ours = fullname.split(".")[0] == "triton"
        return ModuleSpec(fullname, self, is_package=True) if ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass
