"""Family `downstream`: the cost of the reconstruction to the subject. Delta CE, KL, loss recovered.

Letters: W windows in a batch, T context length, V vocabulary, B rows (W*T), D width of what is read, O width
of what is replaced (D, unless a transcoder or a crosscoder reads something else).

The subject runs with the hook replaced by the reconstruction, by zeros, or by the mean of the training
rows, each computed from the *clean* rows. Every variant replaces exactly the same positions: dropped leading
ones and sinks stay clean. A transcoder replaces the rows of its target, computed from the clean rows of its
hook. Cross-entropies and KL(clean, patched) are means over all next-token predictions of a window, in nats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.common.reporter import Progress
from winnow.evaluator.bootstrap import figure, mean_figure
from winnow.evaluator.kept_losses import KeptLosses, Losses
from winnow.evaluator.setting import Measured, Setting
from winnow.sae.model import Sae
from winnow.schemas.evaluation import EvaluateSpec, Figure
from winnow.schemas.joined import hooks_by_root, split_hook
from winnow.store import ActivationStore
from winnow.store.read.joined import JoinedStore
from winnow.subject.load import Subject
from winnow.subject.splice import Replacement
from winnow.subject.tail import Tail

Variant = Callable[[Tensor, Sequence[int]], Tensor]
"""(raw clean rows [B, D] of some windows, their numbers) -> the rows [B, O] that take their hooks' place."""


class Clean(NamedTuple):
    """Results of a clean pass over some windows."""

    ids: Tensor
    """int64 [W, T]."""
    rows: Tensor
    """[B, D]: the rows that are read."""
    logits: Tensor | None
    """[W, T, V] if they were requested."""
    held: Any
    """What `Runs.patched` needs of this pass."""


class Runs(Protocol):
    """A subject that runs clean, and again with the rows of some hooks replaced."""

    hooks: tuple[str, ...]
    """Hooks that are read or replaced. A position is replaced if all of them have a weight above 0 there."""

    def clean(self, store: ActivationStore, windows: Sequence[int], *, logits: bool) -> Clean:
        """Run windows of a dataset clean; without `logits` only as far as `patched` needs it."""
        ...

    def patched(self, clean: Clean, chosen: Tensor, rows: Tensor) -> Tensor:
        """Compute logits [W, T, V] with `rows` [B, O] in place where `chosen` [B, 1] is true."""
        ...


class AtHook:
    """One hook, read and replaced. The blocks below it run once for all variants."""

    def __init__(self, tail: Tail) -> None:
        self._tail = tail
        self.hooks = (tail.hook,)

    def clean(self, store: ActivationStore, windows: Sequence[int], *, logits: bool) -> Clean:
        """See `Runs.clean`."""
        start = self._tail.start(_tokens(store, windows), logits=logits, positions=store.positions(windows))
        return Clean(start.ids, start.rows.flatten(0, 1), start.logits if logits else None, start)

    def patched(self, clean: Clean, chosen: Tensor, rows: Tensor) -> Tensor:
        """See `Runs.patched`."""
        return self._tail.patched(clean.held, _at(chosen, rows))


class AcrossHooks:
    """Some hooks read and some replaced: all of a crosscoder's, or a transcoder's target. Passes are whole.

    Args:
        subject: The whole subject.
        reads: Hooks that are read; their rows are concatenated in `Clean.rows`.
        writes: Hooks that are replaced; a variant's rows are concatenated in this order.
        store: The dataset, which knows their widths.
    """

    def __init__(
        self, subject: Subject, reads: Sequence[str], writes: Sequence[str], store: ActivationStore
    ) -> None:
        self._subject, self._reads, self._writes = subject, list(reads), list(writes)
        self._widths = [store.d_model(hook) for hook in writes]
        # Each hook once, in order: a crosscoder reads and writes the same ones.
        self.hooks = tuple(dict.fromkeys([*reads, *writes]))

    def clean(self, store: ActivationStore, windows: Sequence[int], *, logits: bool) -> Clean:
        """See `Runs.clean`."""
        ids, positions = _tokens(store, windows).to(self._subject.device), store.positions(windows)
        found = self._subject.activations(ids, self._reads, positions=positions)
        rows = torch.cat([found[hook].float().flatten(0, 1) for hook in self._reads], dim=1)
        made = self._subject.logits(ids, positions=positions) if logits else None
        return Clean(ids, rows, made, positions)

    def patched(self, clean: Clean, chosen: Tensor, rows: Tensor) -> Tensor:
        """See `Runs.patched`."""
        parts = zip(self._writes, rows.split(self._widths, dim=1), strict=True)
        replace = {hook: _at(chosen, part) for hook, part in parts}
        return self._subject.logits(clean.ids, replace, positions=clean.held)


class AcrossSubjects:
    """Hooks of several subjects: all of them are read, and those of one subject are replaced, in it.

    Args:
        subjects: Name of the dataset -> its whole subject.
        name: The one in which hooks are replaced.
        reads: Hooks that are read, `NAME/HOOK`; their rows are concatenated in `Clean.rows`.
        writes: Hooks of a variant's rows; those of other subjects are not used.
        store: The datasets.
    """

    def __init__(
        self,
        subjects: Mapping[str, Subject],
        name: str,
        reads: Sequence[str],
        writes: Sequence[str],
        store: ActivationStore,
    ) -> None:
        self._subjects, self._name, self._reads, self._writes = subjects, name, tuple(reads), list(writes)
        self._widths = [store.d_model(hook) for hook in writes]
        self.hooks = tuple(dict.fromkeys([*reads, *writes]))

    def clean(self, store: ActivationStore, windows: Sequence[int], *, logits: bool) -> Clean:
        """See `Runs.clean`."""
        assert isinstance(store, JoinedStore)
        subject = self._subjects[self._name]
        ids = _tokens(store, windows).to(subject.device)
        found: dict[str, Tensor] = {}
        for name, own in hooks_by_root(self._reads).items():
            positions = store.parts[name].positions(windows)
            read = self._subjects[name].activations(ids, own, positions=positions)
            found |= {f"{name}/{hook}": rows.float().flatten(0, 1) for hook, rows in read.items()}
        rows = torch.cat([found[hook].to(subject.device) for hook in self._reads], dim=1)
        positions = store.parts[self._name].positions(windows)
        return Clean(ids, rows, subject.logits(ids, positions=positions) if logits else None, positions)

    def patched(self, clean: Clean, chosen: Tensor, rows: Tensor) -> Tensor:
        """See `Runs.patched`."""
        parts = dict(zip(self._writes, rows.split(self._widths, dim=1), strict=True))
        replace = {
            own: _at(chosen, parts[hook])
            for hook in self._writes
            for name, own in [split_hook(hook)]
            if name == self._name
        }
        return self._subjects[self._name].logits(clean.ids, replace, positions=clean.held)


def _tokens(store: ActivationStore, windows: Sequence[int]) -> Tensor:
    """Tokens of some windows, int64 [W, T]."""
    return torch.from_numpy(np.stack([store.tokens(window) for window in windows]).astype(np.int64))


def _at(chosen: Tensor, rows: Tensor) -> Replacement:
    """Make the replacement by `rows` [B, O] where `chosen` [B, 1] is true; elsewhere nothing changes."""
    return lambda x: torch.where(chosen, rows.to(x.dtype), x)


def runs_of(subject: Subject, sae: Sae, store: ActivationStore, hook: str) -> Runs:
    """Choose how an SAE's hooks are read and replaced in a subject."""
    if sae.card is None or sae.card.output_hooks == (hook,):
        return AtHook(Tail(subject, hook))
    return AcrossHooks(subject, sae.card.input_hooks, sae.card.output_hooks, store)


def splice_losses(
    runs: Runs,
    store: ActivationStore,
    windows: Sequence[int],
    variants: Mapping[str, Variant],
    *,
    clean: bool = True,
    batch_windows: int = 4,
    label: str = "downstream",
    kept: KeptLosses | None = None,
) -> Losses:
    """Compute the mean cross-entropy of each window, clean and with hooks replaced, and the KL from clean.

    Args:
        runs: The subject and its hooks that are replaced.
        store: The dataset, for tokens and sinks.
        windows: Numbers of windows of the dataset.
        variants: Name -> what replaces the rows.
        clean: Also compute the clean loss and the KLs, which takes the upper blocks once more.
        batch_windows: Windows per pass.
        label: Label of the progress bar.
        kept: Has the losses of the first windows, if an earlier call was stopped, and gets those of this one
            batch by batch.

    Returns:
        Each variant's name and, unless `clean` is false, `clean` and `kl.` + its name -> [len(windows)] nats.
    """
    names = [*variants, *(("clean", *(f"kl.{name}" for name in variants)) if clean else ())]
    begun = kept.begun(len(windows), label) if kept is not None else {}
    out = {name: [torch.from_numpy(begun[name])] if begun else [] for name in names}
    done = len(begun[names[0]]) if begun else 0
    with torch.no_grad(), Progress(label, len(windows), "windows", done) as bar:
        for first in range(done, len(windows), batch_windows):
            batch = windows[first : first + batch_windows]
            start = runs.clean(store, batch, logits=clean)
            # One mask for all variants: losses recovered compare them, so all must leave the same positions
            # clean.
            weights = torch.from_numpy(store.window_weights(list(runs.hooks), batch) > 0)
            chosen = weights.reshape(-1, 1).to(start.ids.device)
            if start.logits is not None:
                out["clean"].append(costs(start.logits, start.ids)[0])
            for name, variant in variants.items():
                patched = runs.patched(start, chosen, variant(start.rows.float(), batch))
                loss, kl = costs(patched, start.ids, start.logits)
                out[name].append(loss)
                if kl is not None:
                    out[f"kl.{name}"].append(kl)
                # Before the next variant's logits, W x T x V numbers, are made.
                del patched
            bar.advance(len(batch))
            if kept is not None:
                kept.write(lambda: joined(out))
    return joined(out)


def joined(parts: Mapping[str, Sequence[Tensor]]) -> Losses:
    """Join the batches' losses, each variant's [windows] nats in float64; on a GPU it waits for that."""
    return {name: torch.cat([part.double().cpu() for part in found]).numpy() for name, found in parts.items()}


def costs(logits: Tensor, ids: Tensor, clean: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Compute the next token's cross-entropy and KL(clean, logits) in nats, means over positions 0 to T-2.

    Args:
        logits: [W, T, V], any float dtype.
        ids: int64 [W, T].
        clean: [W, T, V] clean logits, if the KL is wanted.

    Returns:
        (float32 [W], float32 [W] or None)
    """
    loss = torch.empty(len(logits), device=logits.device)
    kl = None if clean is None else torch.empty_like(loss)
    # Window by window: the float32 log-softmaxes of all would be W x T x V numbers each.
    for window in range(len(logits)):
        q = logits[window, :-1].float().log_softmax(-1)
        loss[window] = -q.gather(1, ids[window, 1:, None]).mean()
        if clean is not None and kl is not None:
            p = clean[window, :-1].float().log_softmax(-1)
            kl[window] = (p.exp() * (p - q)).sum(-1).mean()
    return loss, kl


def sae_variants(
    sae: Sae, store: ActivationStore, hooks: Sequence[str], device: torch.device
) -> dict[str, Variant]:
    """Make the variants: reconstruction, zeros, and the mean of the training rows of the replaced hooks."""
    # The mean leaves sinks out: their norms, hundreds of times the median, would make it a mean of sinks.
    mean = torch.cat([torch.from_numpy(store.mean(hook)).to(device, torch.float32) for hook in hooks])
    return {
        "sae": lambda x, _: sae(x),
        "zero": lambda x, _: mean.new_zeros(len(x), len(mean)),
        "mean": lambda x, _: mean.expand(len(x), -1),
    }


class Reached(NamedTuple):
    """Windows in which a splice can change a loss; others say nothing about it and are not samples."""

    windows: NDArray[np.bool_]
    """[W]: whether a prediction is made at or after a replaced position."""

    @classmethod
    def of(cls, store: ActivationStore, hooks: Sequence[str], windows: Sequence[int]) -> Reached:
        """Find those of some windows in which `hooks` are replaced; the last position predicts nothing."""
        weights = store.window_weights(list(hooks), list(windows))
        return cls(np.asarray((weights[:, :-1] > 0).any(axis=1)))

    @property
    def note(self) -> str:
        """How many windows are left out, for the reader; empty if none is."""
        left_out = int((~self.windows).sum())
        if not left_out:
            return ""
        return (
            f"{left_out} of {len(self.windows)} windows left out: no prediction follows a replaced position"
        )


def figures_of(losses: Losses, reached: Reached, seed: int = 0) -> list[Figure]:
    """Compute the figures from `splice_losses` of `sae_variants`, over the windows that a splice reaches."""
    kept = {name: values[reached.windows] for name, values in losses.items()}
    clean = kept["clean"]
    delta = kept["sae"] - clean
    options: dict[str, Any] = {"seed": seed, "note": reached.note}
    figures = [
        mean_figure("ce_clean", clean, **options),
        mean_figure("ce_patched", kept["sae"], **options),
        mean_figure("delta_ce", delta, **options),
        mean_figure("kl", kept["kl.sae"], **options),
    ]
    for name in ("zero", "mean"):
        # As a ratio of means, not a mean of ratios: a window whose ablation costs nothing has no ratio.
        gap = kept[name] - clean
        figures.append(figure(f"loss_recovered_{name}", lambda d, g: 1 - d / g, delta, gap, **options))
    return figures


def joint_figures(
    subjects: Mapping[str, Subject],
    sae: Sae,
    store: ActivationStore,
    windows: Sequence[int],
    spec: EvaluateSpec,
    kept: KeptLosses | None = None,
) -> tuple[list[Figure], dict[str, float]]:
    """Measure an SAE of several subjects in each that it writes to; ids and losses end with its name.

    `kept` has what an earlier call measured, and gets what this one does.
    """
    assert sae.card is not None
    reads, writes = sae.card.input_hooks, sae.card.output_hooks
    figures: list[Figure] = []
    means: dict[str, float] = {}
    for name in hooks_by_root(writes):
        runs = AcrossSubjects(subjects, name, reads, writes, store)
        losses = kept.finished.get(name) if kept is not None else None
        if losses is None:
            variants = sae_variants(sae, store, writes, subjects[name].device)
            options: dict[str, Any] = {"batch_windows": spec.batch_windows, "label": f"delta CE of {name}"}
            losses = splice_losses(runs, store, windows, variants, **options, kept=kept)
            if kept is not None:
                kept.finish(name, losses)
        found = figures_of(losses, Reached.of(store, runs.hooks, windows), spec.seed)
        figures += [figure.model_copy(update={"id": f"{figure.id}.{name}"}) for figure in found]
        means |= {f"{key}.{name}": float(values.mean()) for key, values in losses.items()}
    return figures, means


def runs_for(setting: Setting) -> Runs:
    """How a setting's SAE is read and replaced."""
    card = setting.card
    if card.target_hooks or card.with_hooks:
        return AcrossHooks(setting.subject, card.input_hooks, card.output_hooks, setting.dataset)
    return AtHook(setting.tail)


def measure(setting: Setting, kept: KeptLosses | None = None) -> Measured:
    """Run the subject over the held-out windows, clean and with hook or target replaced three ways.

    `kept` has the losses of the windows that an earlier call measured, and gets those of this one.
    """
    if setting.joined:
        dataset, windows, spec = setting.dataset, setting.windows, setting.spec
        figures, found = joint_figures(setting.subjects, setting.sae, dataset, windows, spec, kept)
        return Measured(figures, {"mean_nats": found})
    losses = splice_losses(
        runs_for(setting),
        setting.dataset,
        setting.windows,
        sae_variants(setting.sae, setting.dataset, setting.card.output_hooks, setting.device),
        batch_windows=setting.spec.batch_windows,
        kept=kept,
    )
    # `n2g` compares with the same reconstruction, and need not run it again.
    setting.losses.update(losses)
    means = {name: float(values.mean()) for name, values in losses.items()}
    reached = Reached.of(setting.dataset, setting.hooks, setting.windows)
    return Measured(figures_of(losses, reached, setting.spec.seed), {"mean_nats": means})
