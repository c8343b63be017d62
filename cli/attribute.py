"""`winnow attribute`: which latents make the subject say it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from winnow.cli.console import emit, guard, print_table
from winnow.common.config_file import load_config
from winnow.common.reporter import say
from winnow.evaluator.attribution import attribute, logit_difference, without
from winnow.evaluator.setting import Setting
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError
from winnow.schemas.window import WindowRule
from winnow.subject.load import Subject

HELP = """Show which latents make the subject say a token after a prompt.

For every latent active anywhere in the prompt: its first-order effect, code x gradient, on the
log-probability of --answer (or on its logit over that of --against), from one backward pass with the SAE
spliced in and its error kept; and, for the largest, what is really lost when that latent alone is taken away.
Positive: it speaks for the answer. The line below the table says how much lies in the SAE's error, which no
latent explains. The prompt begins as the dataset's windows do: with BOS where its plan says so.
"""
EPILOG = (
    "Example: `winnow attribute runs/quickstart --root data/quickstart --prompt "
    "'Wherefore art' --answer ' thou' --against ' you'`"
)


def register(app: typer.Typer) -> None:
    """Add the command `attribute` to an app."""
    app.command("attribute", help=HELP, epilog=EPILOG)(command)


def command(
    sae: Annotated[str, typer.Argument(metavar="SAE_URI", help="Folder or URI with sae.json.")],
    prompt: Annotated[str, typer.Option(help="Text; the answer is the token after its last one.")],
    answer: Annotated[str, typer.Option(help="One token, a leading space included.")],
    against: Annotated[str | None, typer.Option(help="One token to compare with.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with `root`, if not --root.")] = None,
    root: Annotated[str | None, typer.Option(help="The dataset the SAE was trained on.")] = None,
    top: Annotated[int, typer.Option(min=1, max=512, help="Effects shown, the largest.")] = 15,
    skip: Annotated[
        int | None,
        typer.Option(min=0, help="Leading positions left out; default the plan's `drop_leading`."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Attribute; the help text is `HELP`."""
    with guard():
        if (config is None) == (root is None):
            raise ConfigError("the dataset", expected="--root URI or --config FILE, one of them")
        settings = load_config(config, []) if config else Config(root=root or "")
        setting = Setting.open(sae, settings.root, subject=settings.subject, storage=settings.storage)
        found = told(setting, prompt, answer, against, top, skip)
        emit(found, as_json, lambda: show(found))


def told(
    setting: Setting, prompt: str, answer: str, against: str | None, top: int, skip: int | None = None
) -> dict[str, Any]:
    """The effects of the latents active in a prompt; see `HELP`.

    Returns:
        JSON: `bos` (whether it goes before the prompt, as in the dataset), `metric` of the clean pass,
        `latents` and `error` (sums of the effects), `effects` (position, token, latent, code, first_order,
        ablated), the largest first.

    Raises:
        ConfigError: No prompt, one longer than the subject takes, or an answer that is not one token.
    """
    subject, sae, hook = setting.subject, setting.sae, setting.hook
    rule, ids = setting.window, subject.encode(prompt, setting.window)
    skip = setting.dataset.plan.spec.drop_leading if skip is None else skip
    if len(ids) <= skip:
        raise ConfigError("--prompt", expected=f"more than {skip - rule.bos} tokens", got=len(ids) - rule.bos)
    one, other = token_of(subject, "--answer", answer), None
    if against is not None:
        other = token_of(subject, "--against", against)
    metric, tokens = logit_difference(one, other), torch.tensor(ids)
    found = attribute(subject, {hook: sae}, tokens[None], metric)[hook]
    places = [(position, slot) for _, position, slot in found.top(top, skip=skip)]
    ablated = without(subject, hook, sae, tokens, places, metric).tolist()
    effects = [
        {
            "position": position,
            "token": subject.tokenizer.decode([ids[position]]),
            "latent": int(found.indices[0, position, slot]),
            "code": float(found.values[0, position, slot]),
            "first_order": float(found.effects[0, position, slot]),
            "ablated": lost,
        }
        for (position, slot), lost in zip(places, ablated, strict=True)
    ]
    return {
        "hook": hook,
        "prompt": prompt,
        "bos": rule.bos,
        "answer": answer,
        "against": against,
        "metric": float(metric(subject.logits(tokens[None]))),
        "latents": float(found.effects[0, skip:].sum()),
        "error": float(found.error[0, skip:].sum()),
        "effects": effects,
    }


def token_of(subject: Subject, name: str, text: str) -> int:
    """The id of a text that is one token; ConfigError with its pieces where it is not."""
    ids = subject.encode(text, WindowRule(control_tokens="token"))
    if len(ids) != 1:
        pieces = [subject.tokenizer.decode([piece]) for piece in ids]
        raise ConfigError(
            name, expected="one token of the subject's", got=repr(pieces), fix="Most words begin with a space"
        )
    return ids[0]


def show(found: dict[str, Any]) -> None:
    """Print the effects as a table, and their sums."""
    what = f"log P({found['answer']!r})"
    if found["against"] is not None:
        what = f"logit({found['answer']!r}) - logit({found['against']!r})"
    lines = [
        [
            f"{effect['position']} {effect['token']!r}",
            str(effect["latent"]),
            f"{effect['code']:.3f}",
            f"{effect['first_order']:+.4f}",
            f"{effect['ablated']:+.4f}",
        ]
        for effect in found["effects"]
    ]
    title = f"{what} = {found['metric']:.4f}, by latents of {found['hook']}"
    print_table(title, lines, header=("token", "latent", "code", "first order", "lost without it"))
    if not lines:
        say("no latent that is active on the prompt has an effect: there is nothing to attribute")
    if found["bos"]:
        say("BOS goes before the prompt, as before each window of the dataset")
    say(f"first order: all latents {found['latents']:+.4f}, the SAE's error {found['error']:+.4f}")
