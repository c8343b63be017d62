"""A device that this machine lacks: tensors that compute on the CPU, and refuse the CPU's own beside them.

Its tensors call themselves torch's `meta`, the one device besides the CPU that autograd serves without
hardware, but hold numbers. As on a GPU, an operation takes tensors of one device, except that numbers and
indices may be on the CPU, and that `copy_` and `to` move.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
_INDEXES = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten.index_put.default,
    torch.ops.aten._index_put_impl_.default,
}


class _Elsewhere(Tensor):
    """A tensor of the device; `held` is where its numbers are."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @staticmethod
    def __new__(cls, held: Tensor) -> _Elsewhere:
        """Wrap a tensor of the CPU."""
        made = Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE, requires_grad=held.requires_grad,
        )  # fmt: skip
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(  # pyright: ignore[reportUnknownParameterType]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    there = any(isinstance(each, _Elsewhere) for each in tensors)
    if there and func not in _MOVES:
        free = args[1] if func in _INDEXES and isinstance(args[0], _Elsewhere) else []
        for each in tensors:
            if each.ndim and not isinstance(each, _Elsewhere) and not any(each is index for index in free):
                raise RuntimeError(f"{func}: a tensor {list(each.shape)} of the CPU beside others")
    device = kwargs.get("device")
    if func is torch.ops.aten.copy_.default:
        there = isinstance(args[0], _Elsewhere)
    elif device is not None:
        there = torch.device(device) == DEVICE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    # In place: the wrapper that was given is the result.
    if isinstance(found, Tensor) and any(found is _held(each) for each in args[:1]):
        return args[0]
    return tree_map(lambda each: _Elsewhere(each) if isinstance(each, Tensor) and there else each, found)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, _Elsewhere) else value


class _Operations(TorchDispatchMode):
    """Catches what makes tensors there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Catches `torch.tensor`, which would make a real `meta` tensor without asking a mode of operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            del kwargs["device"]
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **kwargs)


@contextmanager
def elsewhere() -> Iterator[torch.device]:
    """While open, modules and tensors can be moved to the device that is returned."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Operations(), _Functions():
            yield DEVICE
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
