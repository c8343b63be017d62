"""Activations of a subject from another engine: interp-engine, whose names of places are mapped to ours.

An engine runs the same weights with kernels and in tensors of its own (vLLM keeps the residual stream in two
tensors, and a block's output there is only one of them), so a name proves nothing: `deviation` compares rows
with those of transformers, and the harvest does so for every n-th unit before it commits.

Shapes: W windows, T positions, D width of the activation at a hook.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from winnow.schemas.errors import ConfigError, DependencyMissing, install_command
from winnow.schemas.harvest import PlanSpec
from winnow.schemas.subject import Engine, parse_hook
from winnow.subject.load import Subject
from winnow.subject.pretrained import first_line, quiet

# `attn_out` and `mlp_out` are what a block adds, so of an architecture with norms after its sublayers
# (Gemma 2, OLMo 2) the engine's points of the bare names would be one norm too early.
_POINTS = {
    "resid_pre": "resid_pre",
    "resid_mid": "resid_mid",
    "resid_post": "resid_post",
    "attn_out": "attn_out_post",
    "mlp_out": "mlp_out_post",
    "mlp_in": "mlp_in",
    "attn_z": "z",
}
"""Our site -> interp-engine's point."""
_ROOM = 0.85
"""Share of a GPU's free memory that vLLM is given: the pass of transformers that checks it needs the rest."""


class Deviation(NamedTuple):
    """How far rows [D] are from their references: the one that differs most, and half of them."""

    relative: float
    """|row - reference| / |reference|; infinite if the reference is zero and the row is not, or for NaN."""
    absolute: float
    """Largest difference of one number of that row."""
    window: int
    position: int
    median: float
    """Of all rows, as `relative`."""


def deviation(rows: Tensor, reference: Tensor) -> Deviation:
    """How far `rows` [W, T, D] are from their places in `reference` [W, T, D]."""
    # In float32, since the square of a 16-bit number may overflow, and on the reference's device.
    right = reference.float()
    mine = rows.to(right.device, torch.float32)
    apart = mine - right
    relative = apart.norm(dim=-1) / right.norm(dim=-1)
    # Equal rows include zeros, and rows that are NaN in both, which the harvest refuses for what they are.
    equal = ((mine == right) | (mine.isnan() & right.isnan())).all(dim=-1)
    relative = torch.where(equal, 0.0, relative.nan_to_num(math.inf, math.inf))
    window, position = divmod(int(relative.argmax()), relative.shape[1])
    absolute = apart[window, position].abs().amax()
    median = float(relative.median())
    return Deviation(float(relative[window, position]), float(absolute), window, position, median)


def check_engine(engine: Engine, spec: PlanSpec) -> None:
    """Check that a plan asks nothing of an engine that it cannot give; needs neither engine nor weights.

    Raises:
        ConfigError: A hook is a module path, or attention is to stay inside documents.
    """
    if engine == "transformers":
        return
    for hook in spec.hooks:
        _point(hook, engine)
    if spec.attend == "document":
        raise ConfigError(
            f"subject.engine {engine} takes no positions, so documents in a window cannot be kept apart",
            expected="plan.attend: window",
            got="document",
            fix="Set subject.engine to transformers, or plan.attend to window",
        )


class EngineReader:
    """Reads activations with interp-engine.

    Args:
        subject: The same subject in transformers: its files, dtype, device and checks of token ids are used.
        engine: The engine, with its backend.
        hooks: What will be read.

    Raises:
        DependencyMissing: interp-engine, or vLLM for it, is not installed.
        ConfigError: The engine cannot load the subject, or does not serve a hook (with its reason).
    """

    def __init__(self, subject: Subject, engine: Engine, hooks: Sequence[str]) -> None:
        self._subject = subject
        self._engine: Engine = engine
        self.device = subject.device
        if subject.spec.device_map:
            raise ConfigError(
                f"subject.engine {engine} with subject.device_map",
                expected="one of the two",
                fix="Set subject.engine to transformers for a subject that is larger than a GPU",
            )
        self._library = _library(engine)
        self._model = self._load()
        self._points = {hook: self._served(hook) for hook in hooks}

    def activations(
        self, token_ids: Any, hooks: Sequence[str], *, positions: Any = None
    ) -> dict[str, Tensor]:
        """Read activations; see `Subject.activations`.

        Returns:
            hook -> [W, T, D], in the LM's dtype on the subject's device.

        Raises:
            ConfigError: The tokens are wrong, or the engine gives rows of another shape.
        """
        if positions is not None:
            raise ConfigError(f"subject.engine {self._engine} takes no positions", got="positions")
        ids = self._subject.ids(token_ids)
        points = {hook: self._points[hook] for hook in hooks}
        cache = self._library.capture(self._model, ids, list(points.values()))
        found = {hook: cache[point].to(self.device) for hook, point in points.items()}
        for hook, values in found.items():
            if values.ndim != 3 or values.shape[:2] != ids.shape:
                raise ConfigError(
                    f"hook {hook!r}: {self._engine} gives no activation for each token",
                    expected=f"[{ids.shape[0]}, {ids.shape[1]}, D]",
                    got=list(values.shape),
                )
        return found

    def _load(self) -> Any:
        subject, spec = self._subject, self._subject.spec
        options: dict[str, Any] = {
            "dtype": str(subject.dtype).removeprefix("torch."),
            # Its default, None, runs code beside the weights where it finds no other way.
            "trust_remote_code": spec.trust_remote_code,
        }
        if self._engine == "interp-engine":
            options |= {
                "backend": "eager",
                "device": str(self.device),
                "attn_implementation": subject.attention,
            }
        else:
            options |= {"backend": "vllm", "gpu_memory_utilization": _free_share(self.device)}
        try:
            with quiet():
                model = self._library.load_model(str(subject.folder), **options)
            # Before this, its vLLM backend does not know which places the model has.
            self._library.sync_model(model).warmup()
        except Exception as error:  # each backend and each architecture has errors of its own
            raise ConfigError(
                f"subject.model {spec.model!r} cannot be loaded by subject.engine {self._engine}",
                got=f"{type(error).__name__}: {first_line(error)}",
                fix="Set subject.engine to transformers",
            ) from error
        return model

    def _served(self, hook: str) -> Any:
        point, layer = _point(hook, self._engine)
        address = self._library.Address(point, layer)
        reason = self._model.refuses(address)
        if reason is not None:
            raise ConfigError(
                f"hook {hook!r} is not served by subject.engine {self._engine}, which calls it {address}",
                got=reason,
                fix="Set subject.engine to transformers",
            )
        return address


def reader_of(subject: Subject, engine: Engine, hooks: Sequence[str]) -> Subject | EngineReader:
    """What a harvest reads `hooks` of a subject with: itself, unless another engine is named.

    Raises:
        DependencyMissing, ConfigError: As for `EngineReader`.
    """
    return subject if engine == "transformers" else EngineReader(subject, engine, hooks)


def _point(hook: str, engine: Engine) -> tuple[str, int]:
    """The engine's name for a hook's place, and its layer."""
    named = parse_hook(hook)
    if named is None or named[0] not in _POINTS:
        raise ConfigError(
            f"hook {hook!r} is not served by subject.engine {engine}, which takes no module paths either",
            expected=f"{', '.join(_POINTS)} with a layer",
            fix="Set subject.engine to transformers",
        )
    return _POINTS[named[0]], named[1]


def _library(engine: Engine) -> Any:
    needed = "interp-engine"
    with suppress(ImportError):
        import interp_engine  # pyright: ignore[reportMissingImports]

        needed = "vLLM"
        if engine == "interp-engine" or interp_engine.vllm_installed():
            return interp_engine
    fix = install_command("engine") if needed == "interp-engine" else "pip install 'interp-engine[vllm]'"
    raise DependencyMissing(
        f"subject.engine {engine} needs {needed}",
        got="not installed",
        fix=f"{fix}, or set subject.engine to transformers",
    )


def _free_share(device: torch.device) -> float:
    """Share of a GPU's whole memory that vLLM may take: some of what transformers' model leaves free."""
    if device.type != "cuda":
        raise ConfigError(
            "subject.engine interp-engine-vllm", expected="a GPU", got=f"subject.device {device}",
            fix="Set subject.engine to interp-engine or transformers",
        )  # fmt: skip
    free, total = torch.cuda.mem_get_info(device)
    return _ROOM * free / total
