"""What `winnow attribute` does: the effects of latents on what the subject says after a prompt."""

from __future__ import annotations

from typing import Any

import torch

from winnow.evaluator.attribution import Attribution, attribute, logit_difference, without
from winnow.evaluator.set_setting import SetSetting
from winnow.evaluator.setting import Setting
from winnow.schemas.errors import ConfigError
from winnow.schemas.window import WindowRule
from winnow.subject.load import Subject


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
        JSON: `bos` (whether it goes before the prompt, as in the dataset), `metric` of the clean pass,
        `latents` and `error` (sums of the effects), `effects` (hook, position, token, latent, code,
        first_order, ablated), the largest first.

    Raises:
        ConfigError: No prompt, one longer than the subject takes, or an answer that is not one token.
    """
    subject, saes = setting.subject, setting.saes
    rule, ids = setting.window, subject.encode(prompt, setting.window)
    skip = setting.dataset.plan.spec.drop_leading if skip is None else skip
    if len(ids) <= skip:
        raise ConfigError("--prompt", expected=f"more than {skip - rule.bos} tokens", got=len(ids) - rule.bos)
    one, other = _single_token(subject, "--answer", answer), None
    if against is not None:
        other = _single_token(subject, "--against", against)
    metric, tokens = logit_difference(one, other), torch.tensor(ids)
    found = attribute(subject, saes, tokens[None], metric)
    effects = [
        effect
        for hook, each in found.items()
        for effect in _effects(each, hook, [place[1:] for place in each.top(top, skip=skip)])
    ]
    # The largest over all hooks; equal ones stay in the order of the hooks.
    effects = sorted(effects, key=lambda effect: -abs(effect["first_order"]))[:top]
    for hook in found:
        mine = [effect for effect in effects if effect["hook"] == hook]
        places = [(effect["position"], effect.pop("slot")) for effect in mine]
        for effect, lost in zip(
            mine, without(subject, hook, saes[hook], tokens, places, metric).tolist(), strict=True
        ):
            effect |= {"token": subject.tokenizer.decode([ids[effect["position"]]]), "ablated": lost}
    return {
        "hook": setting.hook,
        "hooks": list(found),
        "prompt": prompt,
        "bos": rule.bos,
        "answer": answer,
        "against": against,
        "metric": float(metric(subject.logits(tokens[None]))),
        "latents": sum(float(each.effects[0, skip:].sum()) for each in found.values()),
        "error": sum(float(each.error[0, skip:].sum()) for each in found.values()),
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
