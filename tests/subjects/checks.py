"""What a subject does, found by trying it: one row of the table for each, its faults beside it.

Whatever the harvester gives is held to the bare transformers model of the same folder. A part that is refused
with a sentence (`ConfigError`) is right; any other exception, and any number that differs, is a fault.

Letters: W windows, T positions, D width, V vocabulary, L a layer.
"""

from __future__ import annotations

import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import logging as transformers_logging

from tests.subjects.catalogue import CLASSES, NOT_BUILT, TOKENS, VARIANTS, VISION, make_subject
from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError
from winnow.schemas.subject import HOOK_SITES, read_only
from winnow.subject import Subject
from winnow.subject.generate import Steer
from winnow.subject.tail import Tail

WINDOWS, LENGTH, PROMPT, NEW = 8, 24, 13, 12
"""Windows, their positions, a prompt's and the tokens after it: windows and prompts both cross the 16
positions that the catalogue gives to sliding windows, chunks and sparse attention."""

TOLERANCE = 2e-4
"""Of the largest number compared: float noise, with matrices of other shapes."""


@dataclass
class Row:
    """What was found of one subject; `faults` must be empty."""

    name: str
    model_class: str
    attention: str = "—"
    sites: str = "—"
    truncation: str = "—"
    generation: str = "—"
    tail: str = "—"
    documents: str = "—"
    notes: list[tuple[str, str]] = field(default_factory=list)
    """What was tried, and the sentence that refused it."""
    faults: list[str] = field(default_factory=list)


class WrongNumber(AssertionError):
    """A number is not what the bare model says."""


def examine(name: str, folder: Path) -> Row:
    """Make the subject `name` in `folder`, try everything, say what was found."""
    row = Row(name, CLASSES[VARIANTS.get(name, (name, {}))[0]])
    if name in NOT_BUILT:
        row.notes.append(("not built", NOT_BUILT[name]))
        return row
    with warnings.catch_warnings(), _without_bars():
        warnings.simplefilter("ignore")  # transformers' own advice to users of some architectures
        make_subject(folder, name)
        subject = _tried(row, "load", lambda: _load(folder))
        if subject is not None:
            _Examination(row, folder, subject).run()
    return row


@contextmanager
def _without_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _load(folder: Path, until: list[str] | None = None) -> Subject:
    return Subject.load({"model": str(folder), "device": "cpu"}, until)


def _tried(row: Row, what: str, run: Callable[[], Any]) -> Any:
    """The result of `run`, or None with what was wrong noted in the row, once for all layers."""
    try:
        return run()
    except ConfigError as error:
        if (note := (what, _sentence(row.name, error))) not in row.notes:
            row.notes.append(note)
        return None
    except WrongNumber as error:
        fault = f"{what}: wrong number: {error}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        message = (str(error).splitlines() or [""])[0]
        fault = f"{what}: {type(error).__name__}: {message} ({Path(last.filename).name}:{last.lineno})"
    if fault not in row.faults:
        row.faults.append(fault)
    return None


def _sentence(name: str, error: ConfigError) -> str:
    """What an error says, of any layer, folder and machine, so that a reason is told once and alike."""
    text = error.what if error.got is None else f"{error.what}: got {error.got}"
    text = re.sub(r"'?/[^ ']+'?", repr(name), text)
    text = re.sub(r"\b\d\.\d+e-\d+\b", "…", text)
    return re.sub(r"(\.|block |layer )\d+\b", r"\1L", text)


def _same(what: str, found: Tensor, expected: Tensor, *, exact: bool = False) -> None:
    """Raise `WrongNumber` where two tensors differ by more than noise, or at all."""
    if found.shape != expected.shape:
        raise WrongNumber(f"{what}: shape {list(found.shape)}, expected {list(expected.shape)}")
    if exact and torch.equal(found, expected):
        return
    off = (found.float() - expected.float()).abs().max().item()
    if exact or not off <= TOLERANCE * expected.abs().max().item():
        raise WrongNumber(f"{what} differs by {off:.2g} of {expected.abs().max().item():.2g}")


class _Examination:
    def __init__(self, row: Row, folder: Path, subject: Subject) -> None:
        self.row, self.folder, self.subject = row, folder, subject
        kind = "ImageTextToText" if row.name in VISION else "CausalLM"
        self.bare: Any = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).eval()
        draw = torch.Generator().manual_seed(1)
        self.ids = torch.randint(TOKENS.start, TOKENS.stop, (WINDOWS, LENGTH), generator=draw)
        self.layers = range(subject.layout.layers)
        self.hooks: list[str] = []
        self.rows: dict[str, Tensor] = {}

    def run(self) -> None:
        row = self.row
        row.attention = str(self.subject.identity.attention)
        _tried(row, "logits and loss", self.whole_pass)
        _tried(row, "causality", self.causality)
        row.sites = self.sites()
        for what, check in (
            ("resid against hidden_states", self.hidden_states),
            ("residual identity", self.residual_identity),
            ("router against experts", self.routers),
            ("batch of 1 against 8", self.batches),
            ("identity replacement", self.identity),
            ("zero replacement", self.zero),
        ):
            _tried(row, what, check)
        row.truncation = _tried(row, "truncation", self.truncation) or "refused"
        row.generation = _tried(row, "generation", self.generation) or "refused"
        row.tail = _tried(row, "tail", self.tail) or "refused"
        row.documents = _tried(row, "documents", self.documents) or "refused"

    def plain(self, ids: Tensor, **options: Any) -> Any:
        with torch.no_grad():
            return self.bare(input_ids=ids, use_cache=False, **options)

    def whole_pass(self) -> None:
        expected = self.plain(self.ids).logits
        _same("logits", self.subject.logits(self.ids), expected)
        loss = torch.nn.functional.cross_entropy(
            expected[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten(), reduction="none"
        )
        _same("loss", self.subject.loss(self.ids), loss.view(WINDOWS, LENGTH - 1))

    def causality(self) -> None:
        other = self.ids.clone()
        other[:, -1] = TOKENS.start + (other[:, -1] - TOKENS.start + 1) % len(TOKENS)
        one, two = (self.plain(ids).logits[:, :-1] for ids in (self.ids, other))
        _same("logits before a changed last token (accepted though not causal)", two, one)
        short = self.plain(self.ids[:, : LENGTH // 2]).logits
        try:
            _same("half a window", short, one[:, : LENGTH // 2])
        except WrongNumber:
            self.row.notes.append(("note", "rows depend on the window's length, in transformers itself"))

    def sites(self) -> str:
        works: list[str] = []
        for site in HOOK_SITES:
            at = [layer for layer in self.layers if self.site_works(site, layer)]
            if at:
                everywhere = len(at) == len(self.layers)
                works.append(site if everywhere else f"{site} (layers {', '.join(map(str, at))})")
        return ", ".join(works) or "none"

    def site_works(self, site: str, layer: int) -> bool:
        hook = f"{site}.{layer}"

        def read() -> Tensor:
            width = self.subject.sites([hook])[0].d_model
            rows = self.subject.activations(self.ids, [hook])[hook]
            if rows.shape != (WINDOWS, LENGTH, width):
                raise WrongNumber(f"rows are {list(rows.shape)}, the site says {width}")
            if not torch.isfinite(rows).all():
                raise WrongNumber("not finite")
            return rows

        found = _tried(self.row, site, read)
        if found is None:
            return False
        self.hooks.append(hook)
        self.rows[hook] = found
        return True

    def hidden_states(self) -> None:
        """Transformers' own record, which some architectures begin after the first block."""
        states = getattr(self.plain(self.ids, output_hidden_states=True), "hidden_states", None)
        if states is None or len(states) != len(self.layers) + 1:
            return
        late = "resid_post.0" in self.rows and torch.equal(self.rows["resid_post.0"], states[0])
        for layer in self.layers[:-1]:
            if (hook := f"resid_post.{layer}") in self.rows:
                _same(hook, self.rows[hook], states[layer if late else layer + 1])
            if (hook := f"resid_pre.{layer + 1}") in self.rows:
                _same(hook, self.rows[hook], states[layer if late else layer + 1])

    def residual_identity(self) -> None:
        for layer in self.layers:
            parts = [self.rows.get(f"{site}.{layer}") for site in ("resid_pre", "attn_out", "mlp_out")]
            whole = self.rows.get(f"resid_post.{layer}")
            if whole is not None and all(part is not None for part in parts):
                _same(f"resid_post.{layer}", sum(parts), whole)  # pyright: ignore
            self.middle(layer)

    @torch.no_grad()
    def middle(self, layer: int) -> None:
        """What the heads, and the norm of the MLP, read and give."""
        pre, attention, middle, given = (
            self.rows.get(f"{site}.{layer}") for site in ("resid_pre", "attn_out", "resid_mid", "mlp_in")
        )
        block = self.subject.layout.parts[layer]
        heads, projection = self.rows.get(f"attn_z.{layer}"), self.subject.layout.path(layer, "projection")
        if heads is not None and attention is not None and projection is not None:
            made = self.subject.model.get_submodule(projection)(heads)
            norm = self.subject.layout.path(layer, "attention_post_norm")
            _same(
                f"attn_z.{layer}", self.subject.model.get_submodule(norm)(made) if norm else made, attention
            )
        if block is None or pre is None or attention is None or middle is None or given is None:
            return
        _same(f"resid_mid.{layer}", middle, pre if block.parallel else pre + attention)
        norm = self.subject.layout.path(layer, "mlp_norm")
        with torch.no_grad():
            _same(
                f"mlp_in.{layer}", given, self.subject.model.get_submodule(norm)(middle) if norm else middle
            )

    def routers(self) -> None:
        """What the bare model's experts are given to do follows from the logits that were read."""
        for hook, rows in [(hook, rows) for hook, rows in self.rows.items() if read_only(hook)]:
            router = self.subject.layout.router(int(hook.rpartition(".")[2]))
            assert router is not None
            path = f"{self.subject.layout.blocks}.{hook.rpartition('.')[2]}.{router.experts}"
            logits = rows.flatten(0, 1)
            with _given(self.subject.model.get_submodule(path)) as given:
                self.subject.logits(self.ids)
            chosen = next((value for value in given if value.dtype == torch.int64), None)
            if chosen is None:  # Llama 4 runs every expert on rows times their weights
                continue
            weights = next(value for value in given if value.shape == chosen.shape and value is not chosen)
            own = logits.gather(1, chosen)
            largest = torch.equal(own.sort(1).values, logits.topk(chosen.shape[1]).values.sort(1).values)
            rising = weights.gather(1, own.argsort(1)).diff(dim=1)
            if not largest and (chosen.shape[1] < 2 or bool((rising < -1e-5).any())):
                raise WrongNumber(f"{hook}: other experts than its logits say")

    def batches(self) -> None:
        logits = self.subject.logits(self.ids)
        for window in range(WINDOWS):
            ids = self.ids[window : window + 1]
            _same("logits", self.subject.logits(ids)[0], logits[window])
            alone = self.subject.activations(ids, self.hooks) if self.hooks else {}
            for hook, rows in alone.items():
                _same(hook, rows[0], self.rows[hook][window])

    def identity(self) -> None:
        ids = self.ids[:2]
        clean = self.subject.logits(ids)
        for hook in self.hooks:
            if read_only(hook):
                self.refused(hook)
            else:
                _same(hook, self.subject.logits(ids, {hook: lambda rows: rows}), clean, exact=True)

    def refused(self, hook: str) -> None:
        """What would have no effect is not accepted in silence."""
        try:
            self.subject.logits(self.ids[:2], {hook: torch.zeros_like})
        except ConfigError:
            return
        raise WrongNumber(f"{hook} was replaced, though nothing reads it")

    def zero(self) -> None:
        """What takes the place of a row is what the next block gets; parts of zero add nothing."""
        ids, blocks = self.ids[:2], self.subject.layout.blocks
        clean = self.subject.logits(ids)
        for layer in self.layers:
            for hook in [f"{site}.{layer}" for site in HOOK_SITES]:
                if read_only(hook) or hook not in self.hooks:
                    continue
                if torch.equal(self.subject.logits(ids, {hook: torch.zeros_like}), clean):
                    raise WrongNumber(f"{hook} replaced by zeros changes nothing")
            hook = f"resid_post.{layer}"
            if hook in self.hooks and layer + 1 < len(self.layers):
                with _passing(self.subject.model.get_submodule(f"{blocks}.{layer + 1}")) as got:
                    self.subject.logits(ids, {hook: torch.zeros_like})
                if got and got[0].any():
                    raise WrongNumber(f"{hook} replaced by zeros: block {layer + 1} gets other numbers")
            parts = {f"{site}.{layer}": torch.zeros_like for site in ("attn_out", "mlp_out")}
            if set(parts) <= set(self.hooks) and f"resid_post.{layer}" in self.hooks:
                with _passing(self.subject.model.get_submodule(f"{blocks}.{layer}"), output=True) as got:
                    self.subject.logits(ids, parts)
                _same(f"block {layer} without its parts", got[0], self.rows[f"resid_pre.{layer}"][:2])
            self.emptied_middle(layer, ids)

    def emptied_middle(self, layer: int, ids: Tensor) -> None:
        """What replaces the middle is the stream that the block adds its MLP to."""
        block, hooks = self.subject.layout.parts[layer], (f"resid_mid.{layer}", f"mlp_out.{layer}")
        # In a parallel block the middle is the stream before it, to which attention still adds.
        if block is None or block.parallel or not set(hooks) <= set(self.hooks):
            return
        module = self.subject.model.get_submodule(f"{self.subject.layout.blocks}.{layer}")
        with _passing(module, output=True) as got:
            self.subject.logits(ids, dict.fromkeys(hooks, torch.zeros_like))
        if got[0].any():
            raise WrongNumber(f"{hooks[0]} replaced by zeros: the block adds to another stream")

    def truncation(self) -> str:
        hook = next((hook for hook in ("resid_post.1", "resid_post.0") if hook in self.hooks), None)
        if hook is None:
            return "—"
        short = _load(self.folder, [hook])
        _same(hook, short.activations(self.ids, [hook])[hook], self.rows[hook], exact=True)
        return "right"

    def generation(self) -> str:
        prompt = self.ids[0, :PROMPT].tolist()
        lengths: list[int] = []

        def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            lengths.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).shape[1])

        list(self.subject.generate(prompt, max_new_tokens=1))  # what is tried once for a model is tried here
        handle = self.subject.model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            clean = list(self.subject.generate(prompt, max_new_tokens=NEW, temperature=0.0))
        finally:
            handle.remove()
        ids = [*prompt, *(token.id for token in clean)]
        for step, token in enumerate(clean):
            expected = self.plain(torch.tensor([ids[: PROMPT + step]])).logits[0, -1]
            _same(f"logits of step {step}", token.logits, expected)
        for hook in [hook for hook in ("resid_post.1", "mlp_out.2") if hook in self.hooks]:
            steer = {hook: [Steer(_sae(self.rows[hook].shape[-1]), 3, "add", 0.0)]}
            steered = self.subject.generate(prompt, max_new_tokens=NEW, temperature=0.0, steer=steer)
            for step, (one, two) in enumerate(zip(steered, clean, strict=True)):
                _same(f"step {step} steered by nothing at {hook}", one.logits, two.logits, exact=True)
        whole = sum(length > 1 for length in lengths[1:])
        return "cached" if not whole else "whole passes" if whole == len(lengths) - 1 else "cached in parts"

    def tail(self) -> str:
        """Whole windows patched from the hook on, and one row changed with a cache; each right or refused."""
        sites = [site for site in HOOK_SITES if not read_only(f"{site}.0")]
        hooks = [f"{site}.{layer}" for site, layer in zip(sites, (2, 1, 2, 1, 1, 2, 1), strict=True)]
        hooks = [hook for hook in hooks if hook in self.hooks]
        if not hooks:
            return "—"
        ways = {"patched": self.patched, "continued": self.continued}
        right = [
            way
            for way, check in ways.items()
            if all(
                _tried(self.row, f"tail, {way}", lambda hook=hook, check=check: check(hook)) for hook in hooks
            )
        ]
        return "right" if len(right) == len(ways) else " ".join(right) or "refused"

    def documents(self) -> str:
        """Documents packed into windows, each against the document run alone."""
        ids, cuts = self.ids[:2], ((0, 9, LENGTH), (0, 4, 5, 15, LENGTH))
        positions = torch.stack(
            [torch.cat([torch.arange(high - low) for low, high in pairwise(cut)]) for cut in cuts]
        )
        try:
            logits = self.subject.logits(ids, positions=positions)
        except ConfigError as error:
            if "does not keep the documents" not in error.what:
                raise
            return "refused"
        rows = self.subject.activations(ids, self.hooks, positions=positions) if self.hooks else {}
        hook = next((hook for hook in ("resid_post.1", "mlp_out.1") if hook in self.hooks), None)
        patched = logits
        if hook is not None:
            tail = Tail(self.subject, hook)
            patched = tail.patched(tail.start(ids, positions=positions), lambda x: x)
        for window, cut in enumerate(cuts):
            for low, high in pairwise(cut):
                one = ids[window : window + 1, low:high]
                expected = self.plain(one).logits[0]
                _same("logits of a packed document", logits[window, low:high], expected)
                _same("the same, patched", patched[window, low:high], expected)
                alone = self.subject.activations(one, self.hooks) if self.hooks else {}
                for each, found in alone.items():
                    _same(f"{each} of a packed document", rows[each][window, low:high], found[0])
        return "apart"

    def patched(self, hook: str) -> bool:
        ids = self.ids[:2]
        tail, clean = Tail(self.subject, hook), self.subject.logits(ids)
        start = tail.start(ids)
        _same(f"{hook}: rows", start.rows, self.rows[hook][:2])
        _same(f"{hook}: logits", start.logits, clean)
        _same(f"{hook}: identity", tail.patched(start, lambda rows: rows), clean, exact=True)
        _same(f"{hook}: patched", tail.patched(start, _moved), self.subject.logits(ids, {hook: _moved}))
        _same(f"{hook}: logits afterwards", self.subject.logits(ids), clean, exact=True)
        return True

    def continued(self, hook: str) -> bool:
        window, first, stop = 1, 9, 20
        tail = Tail(self.subject, hook)
        start = tail.start(self.ids[:2], keep_cache=True)
        row = start.rows[window, first]
        variants = torch.stack([_moved(row), row])
        found = tail.continued(start, window, first, stop, variants)
        for variant, logits in zip(variants, found, strict=True):

            def one(rows: Tensor, variant: Tensor = variant) -> Tensor:
                rows = rows.clone()
                rows[first] = variant
                return rows

            expected = self.subject.logits(self.ids[window : window + 1], {hook: one})[0, first:stop]
            _same(f"{hook}: continued", logits, expected)
        return True


def _moved(rows: Tensor) -> Tensor:
    return rows * 0.7 + 0.1


def _sae(width: int) -> Sae:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        sae = Sae(width, 2 * width, 8).requires_grad_(False)
        sae.W_enc.normal_()
        sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_enc, dim=1))
    return sae


@contextmanager
def _given(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """All tensors that a module is given while this is open."""
    got: list[Tensor] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        got.extend(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield got
    finally:
        handle.remove()


@contextmanager
def _passing(module: torch.nn.Module, *, output: bool = False) -> Iterator[list[Tensor]]:
    """The tensors that enter (or leave) a module while this is open."""
    got: list[Tensor] = []

    def enter(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        got.append(args[0] if args else kwargs["hidden_states"])

    def leave(_: Any, __: Any, output: Any) -> None:
        got.append(output if isinstance(output, Tensor) else output[0])

    if output:
        handle = module.register_forward_hook(leave)
    else:
        handle = module.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield got
    finally:
        handle.remove()
