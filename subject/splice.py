"""Runs a subject's forward pass with activations read or replaced at some modules.

Shapes: W windows, T positions, D width of the activation there, V vocabulary.
PyTorch's module hooks do the work; they are set for one call and removed after it, so threads must not run
one model at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from winnow.schemas.errors import ConfigError
from winnow.subject.hooks import Tap, require_writable

Replacement = Callable[[Tensor], Tensor]
"""[W*T, D] -> [W*T, D]: rows of all windows, window by window, positions in order."""


class _AllRead(Exception):
    """Ends the forward pass once every tap has been read, so that nothing later is computed."""


def read_taps(
    model: nn.Module,
    taps: Sequence[Tap],
    run: Callable[[], object],
    shape: tuple[int, int],
    *,
    stop: bool = True,
) -> dict[str, Tensor]:
    """Run a forward pass and return the activations at the taps.

    Args:
        model: The model that has the taps' modules.
        taps: Places to read.
        run: Runs the forward pass.
        shape: (W, T) of the pass.
        stop: End the pass as soon as the last tap has been read; no later module runs.

    Returns:
        hook -> [W, T, D], copies (the model cannot change them later), in the taps' order.

    Raises:
        ConfigError: A tap's module did not run, ran twice, or gave no [W, T, ...] tensor.
    """
    found: dict[str, Tensor] = {}

    def keep(tap: Tap, value: Tensor) -> None:
        # A shared module, or one in a loop: neither of its rows could be called the activation there.
        if tap.hook in found:
            raise ConfigError(f"hook {tap.hook!r}: {tap.path} runs more than once in a forward pass")
        # Cloned: the model may write into its tensors later in the pass.
        found[tap.hook] = _rows(tap, value, shape).clone().view(*shape, -1)
        if stop and len(found) == len(taps):
            raise _AllRead

    with ExitStack() as stack:
        for tap in taps:
            stack.enter_context(_attached(model, tap, keep))
        with suppress(_AllRead):
            run()
    for tap in taps:
        if tap.hook not in found:
            raise _not_run(tap)
    return {tap.hook: found[tap.hook] for tap in taps}


@contextmanager
def replaced(model: nn.Module, replace: Mapping[Tap, Replacement], shape: tuple[int, int]) -> Iterator[None]:
    """While open, a forward pass of shape (W, T) continues with a copy of `fn`'s output at each tap.

    `fn` gets the activation in the model's dtype; its result is cast back to it. The identity
    leaves the pass bit-identical. `fn` may keep its rows, and return rows that it keeps.

    Raises:
        ConfigError: A tap's module did not run, ran twice, or gave no [W, T, ...] tensor.
        ValueError: `fn` returned another shape.
    """
    require_writable(tap.hook for tap in replace)
    ran: set[str] = set()

    def swap(tap: Tap, value: Tensor) -> Tensor:
        if tap.hook in ran:
            raise ConfigError(f"hook {tap.hook!r}: {tap.path} runs more than once in a forward pass")
        ran.add(tap.hook)
        rows = _rows(tap, value, shape)
        # A copy: `fn` may keep its rows, and the tensor is about to be overwritten.
        new = replace[tap](rows.clone() if tap.in_place else rows)
        if new.shape != rows.shape:
            raise ValueError(
                f"the replacement at {tap.hook} must return {tuple(rows.shape)}, got {tuple(new.shape)}"
            )
        new = new.to(device=value.device, dtype=value.dtype).reshape(value.shape)
        # A copy: Falcon's block adds attention into the tensor that its MLP returned. That would also
        # change rows that `fn` kept, or gives again in the next pass.
        return value.copy_(new) if tap.in_place else new.clone()

    with ExitStack() as stack:
        # Those in place first: OLMo 2 gives its MLP the stream, and once `mlp_in` is replaced at the same
        # module the tensor there is no longer the stream's.
        for tap in sorted(replace, key=lambda tap: not tap.in_place):
            stack.enter_context(_attached(model, tap, swap))
        yield
    # A replacement that never took place must not be mistaken for one without effect.
    for tap in replace:
        if tap.hook not in ran:
            raise _not_run(tap)


def rebuilt(output: Any, parts: Sequence[Any]) -> Any:
    """A list, tuple or named tuple of the same type as `output`, with other parts."""
    # Only named tuples have _fields; their constructor takes the parts one by one.
    return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)


def next_token_loss(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Cross-entropy of each next token, in nats.

    Args:
        logits: [W, T, V], any float dtype.
        token_ids: int64 [W, T].

    Returns:
        float32 [W, T-1]; entry t is the loss of predicting token t+1.
    """
    windows, length = token_ids.shape
    # A window at a time: the float32 log-softmax [T, V] of all would take more memory than the logits.
    loss = torch.empty(windows, length - 1, dtype=torch.float32, device=logits.device)
    for window in range(windows):
        loss[window] = nn.functional.cross_entropy(
            logits[window, :-1].float(), token_ids[window, 1:], reduction="none"
        )
    return loss


@contextmanager
def _attached(model: nn.Module, tap: Tap, use: Callable[[Tap, Tensor], Tensor | None]) -> Iterator[None]:
    """Call `use` with the tensor at `tap` in every pass; a tensor that it returns replaces it."""
    module = model.get_submodule(tap.path)

    def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor):
            new = use(tap, args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        # Some models of transformers call their blocks with keywords only.
        if isinstance(kwargs.get("hidden_states"), Tensor):
            new = use(tap, kwargs["hidden_states"])
            return None if new is None else (args, {**kwargs, "hidden_states": new})
        raise ConfigError(f"hook {tap.hook!r}: {tap.path} takes no tensor as its first argument")

    def on_output(_: nn.Module, __: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return use(tap, output)
        several = isinstance(output, (tuple, list)) and len(output) > tap.output
        if several and isinstance(output[tap.output], Tensor):
            new = use(tap, output[tap.output])
            # The rest, such as attention's weights or a state, is passed on unchanged.
            return None if new is None else rebuilt(output, [new, *output[1:]])
        raise ConfigError(f"hook {tap.hook!r}: {tap.path} returns {type(output).__name__}, not a tensor")

    if tap.reads_input:
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    try:
        yield
    finally:
        handle.remove()


def _rows(tap: Tap, value: Tensor, shape: tuple[int, int]) -> Tensor:
    """[W, T, ...] -> [W*T, D]; at a module path, axes after the second (attention heads) merge into D."""
    # Routers flatten the windows before they choose, OPT's blocks before the MLP. Proved at load, with two
    # windows, since their order cannot be seen.
    if tap.named and value.ndim == 2 and len(value) == shape[0] * shape[1]:
        value = value.view(*shape, -1)
    if value.ndim < 3 or tuple(value.shape[:2]) != shape or not value.is_floating_point():
        raise ConfigError(
            f"hook {tap.hook!r}: {tap.path} gives no activation for each token",
            expected=f"a float tensor [{shape[0]}, {shape[1]}, D] (windows, positions, width)",
            got=f"{value.dtype} {list(value.shape)}",
        )
    # Several residual streams: they must not be flattened into one row silently.
    if tap.of_stream and value.ndim > 3:
        raise ConfigError(
            f"hook {tap.hook!r}: {tap.path} gives more than one row for each token",
            expected=f"one residual stream [{shape[0]}, {shape[1]}, D]",
            got=f"{list(value.shape)}",
            fix="Name a module inside the block that gives one",
        )
    return value.reshape(shape[0] * shape[1], -1)


def _not_run(tap: Tap) -> ConfigError:
    return ConfigError(f"hook {tap.hook!r}: {tap.path} does not run in a forward pass of this subject")
