"""What `winnow attribute` does: the effects of latents on what the subject says after a text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from winnow.evaluator.attribution import Attribution, attribute, logit_difference, without
from winnow.evaluator.attribution_joint import attribute_joint, without_joint
from winnow.evaluator.set_setting import SetSetting
from winnow.evaluator.setting import Setting
from winnow.schemas.errors import ConfigError
from winnow.schemas.joined import hooks_by_root
from winnow.schemas.window import WindowRule
from winnow.store.read.joined import JoinedStore
from winnow.subject.load import Subject

Metric = Callable[[Tensor], Tensor]


class Text(NamedTuple):
    """What is read, and where effects are counted."""

    ids: list[int]
    """Token ids [T]; the prediction is the one made at the last."""
    counted: NDArray[np.bool_]
    """[T]: positions whose latents and error are counted."""
    positions: dict[str, Tensor | None]
    """Name of the dataset -> int64 [1, T] for passes of windows of several documents; else None."""
    rows: str
    """The positions that are counted, in words."""
    begins: bool
    """Whether BOS was put before it."""


def prompt_text(setting: Setting | SetSetting, prompt: str, skip: int | None = None) -> Text:
    """A prompt as a window of the dataset; all of its positions count, but for the first `skip`.

    Raises:
        ConfigError: No prompt, or one longer than the subject takes.
    """
    rule, subject = setting.window, next(iter(_subjects(setting).values()))
    ids = subject.encode(prompt, rule)
    skip = setting.dataset.plan.spec.drop_leading if skip is None else skip
    if len(ids) <= skip:
        raise ConfigError("--prompt", expected=f"more than {skip - rule.bos} tokens", got=len(ids) - rule.bos)
    # A prompt has no labels by which rows could be chosen.
    return Text(
        ids, np.arange(len(ids)) >= skip, {}, f"every position of the prompt{_but_for(skip)}", rule.bos
    )


def window_text(setting: Setting | SetSetting, window: int, at: int | None, skip: int | None = None) -> Text:
    """The beginning of a window of the dataset: what is before position `at`, the last one by default.

    Counted are positions of the setting's reading that are no sinks, but for the first `skip`.

    Raises:
        ConfigError: No such window or position, or the reading chooses none of these positions.
    """
    plan = setting.dataset.plan
    if not 0 <= window < plan.windows:
        raise ConfigError("--window", expected=f"0 to {plan.windows - 1}", got=window)
    length = plan.spec.context_length
    at = length - 1 if at is None else at
    if not 0 < at < length:
        raise ConfigError("--at", expected=f"1 to {length - 1}", got=at)
    ids = [int(token) for token in setting.tokens([window])[0]]
    weights = setting.dataset.window_weights(setting.hooks, [window])[0, :at] > 0
    counted = weights & (np.arange(at) >= (skip or 0))
    reading = setting.dataset.reading
    rows = (reading.rows.words if reading else "all rows") + _but_for(skip or 0)
    if not counted.any():
        chosen = f" of those with {rows}" if reading else _but_for(skip or 0)
        raise ConfigError(f"window {window}", expected=f"a row before position {at}{chosen}", got="none")
    dataset = setting.dataset
    parts = dataset.parts if isinstance(dataset, JoinedStore) else {"": dataset}
    found = {name: part.positions([window]) for name, part in parts.items()}
    positions = {name: None if one is None else torch.from_numpy(one)[:, :at] for name, one in found.items()}
    return Text(ids[: at + 1], counted, positions, rows, setting.window.bos)


def attribute_prompt(
    setting: Setting | SetSetting,
    prompt: str,
    answer: str,
    against: str | None,
    top: int,
    skip: int | None = None,
) -> dict[str, Any]:
    """The effects of the latents active in a prompt; see `winnow attribute --help`.

    Returns:
        JSON: `hooks` that are read, `joint` (whether each latent reads all of them), `bos` (whether it goes
        before the prompt, as in the dataset), `rows` (the positions that are counted), `metric` of the clean
        pass, `latents` and `error` (sums of the effects), `effects` (hook, position, token, latent, code,
        first_order, ablated), the largest first. Of an SAE of several subjects, what differs between them is
        in `subjects`, by the name of the dataset.

    Raises:
        ConfigError: No prompt, one longer than the subject takes, or an answer that is not one token.
    """
    return {"prompt": prompt} | _attributed(setting, prompt_text(setting, prompt, skip), answer, against, top)


def attribute_window(
    setting: Setting | SetSetting,
    window: int,
    at: int | None = None,
    answer: str | None = None,
    against: str | None = None,
    top: int = 15,
    skip: int | None = None,
) -> dict[str, Any]:
    """The same in a window of the dataset, of the positions that the setting's reading chooses.

    Args:
        setting: What is measured; its reading says which positions count.
        window: Number of the window.
        at: Position of the token that is predicted; None is the last.
        answer: The token in question; None is the window's own.
        against: The token whose logit is subtracted; None takes the log-probability of the answer.
        top: Effects listed.
        skip: Leading positions left out besides.

    Raises:
        ConfigError: No such window or position, nothing to count, or an answer that is not one token.
    """
    text = window_text(setting, window, at, skip)
    own, text = text.ids[-1], text._replace(ids=text.ids[:-1])
    return {"window": window, "at": len(text.ids)} | _attributed(
        setting, text, own if answer is None else answer, against, top
    )


def _subjects(setting: Setting | SetSetting) -> Mapping[str, Subject]:
    """Name of the dataset -> its subject; the name is empty unless there are several."""
    if isinstance(setting, Setting) and setting.joined:
        return setting.subjects
    return {"": setting.subject}


def _attributed(
    setting: Setting | SetSetting, text: Text, answer: int | str, against: str | None, top: int
) -> dict[str, Any]:
    subjects = _subjects(setting)
    first = next(iter(subjects.values()))
    one = answer if isinstance(answer, int) else _single_token(first, "--answer", answer)
    other = None if against is None else _single_token(first, "--against", against)
    metric = logit_difference(one, other)
    joint = isinstance(setting, Setting) and bool(setting.card.with_hooks or setting.joined)
    common = {
        "hook": setting.hook,
        "hooks": list(setting.reads),
        # Whether each latent reads all of these hooks.
        "joint": joint,
        "bos": text.begins,
        "rows": text.rows,
        "answer": first.tokenizer.decode([one]) if isinstance(answer, int) else answer,
        "against": against,
    }
    if not joint:
        return common | _found(subjects[""], text, metric, *_singly(setting, text, metric), top=top)
    assert isinstance(setting, Setting)
    told: dict[str, dict[str, Any]] = {}
    for name in hooks_by_root(setting.card.output_hooks):
        found, drop = _jointly(setting, text, metric, name)
        told[name] = _found(subjects[name], text, metric, found, drop, top=top, name=name)
    return common | told.get("", {"subjects": told})


def _but_for(skip: int) -> str:
    """What is left out at the beginning, in words."""
    return f" but for the first {skip}" if skip else ""


Without = Callable[[str, list[tuple[int, int]]], Tensor]
"""(hook, places) -> what the metric loses without each."""


def _singly(
    setting: Setting | SetSetting, text: Text, metric: Metric
) -> tuple[dict[str, Attribution], Without]:
    """Effects by hook, of SAEs that read one hook each."""
    subject, saes, tokens = setting.subject, setting.saes, torch.tensor(text.ids)
    at = text.positions.get("")
    found = attribute(subject, saes, tokens[None], metric, positions=at)

    def drop(hook: str, places: list[tuple[int, int]]) -> Tensor:
        return without(subject, hook, saes[hook], tokens, places, metric, positions=at)

    return found, drop


def _jointly(
    setting: Setting, text: Text, metric: Metric, name: str
) -> tuple[dict[str, Attribution], Without]:
    """Effects in one subject of the latents of an SAE of several hooks."""
    subjects, sae, tokens = _subjects(setting), setting.sae, torch.tensor(text.ids)
    more: dict[str, Any] = {"name": name, "positions": text.positions}
    found = attribute_joint(subjects, sae, tokens[None], metric, **more)

    def drop(_: str, places: list[tuple[int, int]]) -> Tensor:
        return without_joint(subjects, sae, tokens, places, metric, **more)

    return {setting.hook: found}, drop


def _found(
    subject: Subject,
    text: Text,
    metric: Metric,
    found: Mapping[str, Attribution],
    drop: Without,
    *,
    top: int,
    name: str = "",
) -> dict[str, Any]:
    """The figures of one subject, as JSON."""
    counted = torch.from_numpy(text.counted)
    kept = {hook: each.among(counted) for hook, each in found.items()}
    effects = [
        effect
        for hook, each in kept.items()
        for effect in _effects(each, hook, [place[1:] for place in each.top(top)])
    ]
    # The largest over all hooks; equal ones stay in the order of the hooks.
    effects = sorted(effects, key=lambda effect: -abs(effect["first_order"]))[:top]
    for hook in kept:
        mine = [effect for effect in effects if effect["hook"] == hook]
        places = [(effect["position"], effect.pop("slot")) for effect in mine]
        for effect, lost in zip(mine, drop(hook, places).tolist(), strict=True):
            effect |= {"token": subject.tokenizer.decode([text.ids[effect["position"]]]), "ablated": lost}
    logits = subject.logits(torch.tensor([text.ids]), positions=text.positions.get(name))
    return {
        "metric": float(metric(logits)),
        "latents": sum(float(each.effects.sum()) for each in kept.values()),
        "error": sum(float(each.error.sum()) for each in kept.values()),
        "effects": effects,
    }


def _effects(found: Attribution, hook: str, places: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """The effects at some places (position, slot) of one hook, as JSON."""
    return [
        {
            "hook": hook,
            "position": position,
            "slot": slot,
            "latent": int(found.indices[0, position, slot]),
            "code": float(found.values[0, position, slot]),
            "first_order": float(found.effects[0, position, slot]),
        }
        for position, slot in places
    ]


def _single_token(subject: Subject, name: str, text: str) -> int:
    """The id of a text that is one token; ConfigError with its pieces where it is not."""
    ids = subject.encode(text, WindowRule(control_tokens="token"))
    if len(ids) != 1:
        pieces = [subject.tokenizer.decode([piece]) for piece in ids]
        raise ConfigError(
            name, expected="one token of the subject's", got=repr(pieces), fix="Most words begin with a space"
        )
    return ids[0]
