"""The local replacement model: a subject on one prompt with attention patterns and denominators held.

Letters: L layers, P positions, D width of the residual stream, l a layer, n gradient rows, V vocabulary.

With patterns and denominators as they were on the prompt, and each MLP's output given from outside, the
residual stream is a linear function of the embeddings and of the MLPs' outputs (Ameisen, Lindsey et al. 2025,
"Circuit Tracing"). That is not taken on trust: the pass must give the subject's own logits, and a random
change twice as large must have twice the effect, layer by layer; what fails is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from winnow.evaluator.circuits.attention import NotHeld, Patterns
from winnow.evaluator.circuits.norms import Norms
from winnow.schemas.errors import ConfigError
from winnow.schemas.layers import Reads
from winnow.subject.load import Subject

TOLERANCE = 1e-3
"""Largest relative difference from the subject's logits, and from linearity, before a subject is refused."""

GivenMlp = Callable[[int, Tensor], Tensor]
"""(layer, what it reads [P, D]) -> what reaches the stream as the MLP's output [P, D]."""


@dataclass
class Passed:
    """What a pass of the held model gave."""

    final: Tensor
    """[P, D]: what the unembedding reads."""
    reads: list[Tensor]
    """Per layer, what its latents read [P, D]."""


@dataclass
class Pieces:
    """Graphs of autograd for the first p positions, cut at every block's input."""

    inputs: list[Tensor] = field(default_factory=list)
    """L + 1 leaves [p, D]: the stream that enters each block, and at last the final norm."""
    reads: list[Tensor] = field(default_factory=list)
    """What each layer's latents read [p, D], as a function of the block's input."""
    outputs: list[Tensor] = field(default_factory=list)
    """Each block's output [p, D] as a function of its input, and at last what the unembedding reads."""


class Held:
    """A subject held on one prompt.

    Attributes:
        subject: The subject.
        ids: int64 [1, P].
        stream: L + 1 tensors [P, D]: the stream that enters each block, and the one that leaves the last.
        reads: Per layer [P, D], what its latents read.
        mlp_out: Per layer [P, D], what reached the stream as the MLP's output.
        logits: float32 [V], of the last position, the subject's own, on the CPU.
    """

    def __init__(self, subject: Subject, ids: Tensor, reads: Reads) -> None:
        """Record a prompt and check that the held pass is the subject's and linear.

        Args:
            subject: The whole subject, in float32 or float64.
            ids: int64 [1, P].
            reads: The site that latents read.

        Raises:
            ConfigError: The subject is truncated, on several devices or of a lower precision, the prompt is
                longer than its context, or a module cannot be held, which is named.
        """
        layout = subject.layout
        # Parts outside the table are proved at load; the final norm there is a guess that `_record` checks.
        if None in layout.parts or layout.final_norm is None or layout.unembedding is None:
            raise _refused(subject, "blocks whose parts are not known", layout.blocks)
        if subject.dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                "the subject's dtype", expected="float32: edges are differences of small numbers",
                got=str(subject.dtype).removeprefix("torch."), fix="Set subject.dtype to float32",
            )  # fmt: skip
        devices = {str(weight.device) for weight in subject.model.parameters()}
        if len(devices) > 1:
            raise ConfigError(
                "a subject on several devices", expected="all of it on one", got=", ".join(sorted(devices)),
                fix="Leave subject.device_map out",
            )  # fmt: skip
        self.subject, self.ids, self.layers = subject, ids, layout.layers
        self.stream: list[Tensor] = []
        self.mlp_out: list[Tensor] = []
        self.reads: list[Tensor] = []
        self._paths = read_paths(subject, reads)
        self._patterns = Patterns()
        mlps = tuple(str(layout.path(layer, "mlp")) for layer in range(self.layers))
        self._norms = Norms(subject.model, mlps)
        self._pieces: dict[int, Pieces] = {}
        # Hooks that are new to a subject cost it a short pass to find their widths: not one of the held ones.
        sites = [f"{site}.{layer}" for site in ("resid_post", "mlp_out") for layer in range(self.layers)]
        subject.sites(["resid_pre.0", *sites, layout.final_norm])
        self._record()
        self._check_linear()

    @property
    def positions(self) -> int:
        """P."""
        return self.ids.shape[1]

    @property
    def unembedding(self) -> Tensor:
        """[V, D]."""
        head = self.subject.model.get_submodule(str(self.subject.layout.unembedding))
        weight = head.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    # ---- passes ----------------------------------------------------------------------------------

    @torch.no_grad()
    def run(self, embedding: Tensor, mlp_out: GivenMlp) -> Passed:
        """Run the held model.

        Args:
            embedding: [P, D] in the place of the stream that enters block 0.
            mlp_out: Gives each layer's MLP output.
        """
        found = Passed(embedding, [])

        def keep(_: int, value: Tensor) -> None:
            found.reads.append(value[0])

        def final(rows: Tensor) -> Tensor:
            found.final = rows
            return rows

        replace = {
            f"mlp_out.{layer}": self._giving(layer, mlp_out, found.reads) for layer in range(self.layers)
        }
        replace |= {"resid_pre.0": lambda _: embedding, str(self.subject.layout.final_norm): final}
        with self._replaying(keep):
            self.subject.logits(self.ids, replace)
        return found

    def _giving(self, layer: int, mlp_out: GivenMlp, reads: list[Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda _: mlp_out(layer, reads[layer])

    def pieces(self, positions: int) -> Pieces:
        """The graphs of the first `positions`, made once; later positions do not reach earlier ones."""
        if positions not in self._pieces:
            self._pieces[positions] = self._make_pieces(positions)
        return self._pieces[positions]

    def _make_pieces(self, positions: int) -> Pieces:
        found = Pieces()

        def leaf(layer: int) -> Tensor:
            made = self.stream[layer][:positions].clone().requires_grad_()
            found.inputs.append(made)
            return made

        def cut(layer: int) -> Callable[[Tensor], Tensor]:
            def replace(rows: Tensor) -> Tensor:
                found.outputs.append(rows)
                return leaf(layer + 1)

            return replace

        def final(rows: Tensor) -> Tensor:
            found.outputs.append(rows)
            return rows.detach()

        def given(layer: int) -> Callable[[Tensor], Tensor]:
            return lambda _: self.mlp_out[layer][:positions]

        replace = {f"mlp_out.{layer}": given(layer) for layer in range(self.layers)}
        replace |= {f"resid_post.{layer}": cut(layer) for layer in range(self.layers)}
        replace |= {"resid_pre.0": lambda _: leaf(0), str(self.subject.layout.final_norm): final}
        with self._replaying(lambda _, value: found.reads.append(value[0])):
            self.subject.logits(self.ids[:, :positions], replace, grad=True)
        return found

    @contextmanager
    def _replaying(self, keep: Callable[[int, Tensor], None]) -> Iterator[None]:
        with (
            self._patterns.used(self.subject.model),
            self._norms.replayed(),
            reading(self.subject, self._paths, keep),
        ):
            yield

    # ---- recording and its proof -----------------------------------------------------------------

    @torch.no_grad()
    def _record(self) -> None:
        model, layout = self.subject.model, self.subject.layout
        own = self.subject.logits(self.ids)[0, -1].float()

        def into(place: list[Tensor]) -> Callable[[Tensor], Tensor]:
            def keep(rows: Tensor) -> Tensor:
                place.append(rows.clone())
                return rows

            return keep

        final: list[Tensor] = []
        replace = {"resid_pre.0": into(self.stream), str(layout.final_norm): into(final)}
        replace |= {f"resid_post.{layer}": into(self.stream) for layer in range(self.layers)}
        replace |= {f"mlp_out.{layer}": into(self.mlp_out) for layer in range(self.layers)}
        keep_read = lambda _, value: self.reads.append(value[0].clone())  # noqa: E731
        try:
            with (
                self._patterns.used(model, record=True),
                self._norms.recorded(),
                reading(self.subject, self._paths, keep_read),
            ):
                found = self.subject.logits(self.ids, replace)[0, -1].float()
        except NotHeld as error:
            path = next(path for path, module in model.named_modules() if module is error.module)
            raise _refused(
                self.subject, f"attention that is not a pattern times values ({error})", path
            ) from error
        self._check_attention()
        self.logits = own.cpu()
        lost = float((found - own).abs().max() / own.abs().max().clamp_min(1e-9))
        if lost > TOLERANCE:
            what = f"other logits with eager attention, by {lost:.1e} of the largest"
            raise _refused(self.subject, what, layout.blocks)
        self._check_head(final[0][-1])

    def _check_attention(self) -> None:
        """Refuse a subject if a block's attention did not go through transformers' interface."""
        held = {id(module) for module in self._patterns.held}
        for layer in range(self.layers):
            path = str(self.subject.layout.path(layer, "attention"))
            inside = self.subject.model.get_submodule(path).modules()
            if not any(id(module) in held for module in inside):
                what = "attention that does not go through transformers' attention interface"
                raise _refused(self.subject, what, path)

    def _check_head(self, final: Tensor) -> None:
        """Refuse a subject whose logits are not the unembedding of what its final norm gives."""
        head = self.subject.model.get_submodule(str(self.subject.layout.unembedding))
        found = head(final).float().cpu()
        cap = getattr(self.subject.model.config.get_text_config(), "final_logit_softcapping", None)
        found = cap * torch.tanh(found / cap) if cap else found
        lost = float((found - self.logits).abs().max() / self.logits.abs().max().clamp_min(1e-9))
        if lost > TOLERANCE:
            what = "logits that are not the unembedding of the final norm's output"
            raise _refused(self.subject, what, str(self.subject.layout.unembedding))

    def _check_linear(self) -> None:
        """Refuse a subject if a change twice as large has not twice the effect on what a layer reads."""
        draws = torch.Generator(device="cpu").manual_seed(0)

        def noise(like: Tensor) -> Tensor:
            drawn = torch.randn(like.shape, generator=draws, dtype=torch.float64).to(like)
            return drawn * like.norm(dim=-1, keepdim=True) / like.shape[-1] ** 0.5

        on_stream, on_mlp = noise(self.stream[0]), [noise(rows) for rows in self.mlp_out]

        def moved(size: float) -> list[Tensor]:
            passed = self.run(
                self.stream[0] + size * on_stream, lambda layer, _: self.mlp_out[layer] + size * on_mlp[layer]
            )
            return [*passed.reads, passed.final]

        still, once, twice = moved(0.0), moved(0.5), moved(1.0)
        for layer, (at0, at1, at2) in enumerate(zip(still, once, twice, strict=True)):
            curved = float((at2 - 2 * at1 + at0).abs().max() / (at2 - at0).abs().max().clamp_min(1e-9))
            if curved > TOLERANCE:
                raise self._not_linear(min(layer, self.layers - 1), curved)

    def _not_linear(self, layer: int, curved: float) -> ConfigError:
        block = f"{self.subject.layout.blocks}.{layer}"
        norms = sorted(path for path in self._norms.unknown if path.startswith(block + "."))
        named = norms or [str(self.subject.layout.path(layer, "attention"))]
        what = f"not linear once patterns and denominators are held (by {curved:.1e})"
        return _refused(self.subject, what, ", ".join(named))


def _refused(subject: Subject, what: str, path: str) -> ConfigError:
    """The error for an architecture that cannot be held."""
    return ConfigError(
        f"architecture {subject.layout.architecture!r} cannot be traced: {path}",
        expected="attention through transformers' interface, RMSNorm or LayerNorm, one residual stream",
        got=what,
    )


def read_paths(subject: Subject, reads: Reads) -> list[str]:
    """Paths of the modules whose input is what each layer's latents read, layer by layer."""
    # The norm's input, also where attention and MLP run in parallel: the block's input may be replaced after
    # a hook of ours has seen it.
    layout = subject.layout
    mlps = [str(layout.path(layer, "mlp")) for layer in range(layout.layers)]
    if reads == "mlp_in":
        return mlps
    return [layout.path(layer, "mlp_norm") or mlp for layer, mlp in enumerate(mlps)]


@contextmanager
def reading(subject: Subject, paths: list[str], keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """While open, a pass of one window hands what each layer reads, as [1, P, D], to `keep`."""

    # Not through `Subject.logits`: what it replaces at `resid_mid` is written in place, which would make the
    # rows of a graph unusable.
    def make(layer: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            value = args[0] if args else kwargs["hidden_states"]
            # OPT flattens the windows before its MLP.
            keep(layer, value if value.ndim == 3 else value[None])

        return hook

    with ExitStack() as stack:
        for layer, path in enumerate(paths):
            module = subject.model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(make(layer), with_kwargs=True).remove)
        yield
