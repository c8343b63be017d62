"""Monitor chosen latents over a text.

from winnow.explorer.site.monitor import monitor

report = monitor("In the beginning was the Word", sae, [12, 407], subject)
report.model_dump_json()
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from winnow.explorer.index.directions import token_texts
from winnow.explorer.site.reading import Subjects, read_tokens, tokenise
from winnow.sae.model import Sae
from winnow.schemas.base import Artefact, Contract, ReadHook, Sha256
from winnow.schemas.errors import ConfigError
from winnow.schemas.window import WindowRule
from winnow.subject.load import Subject

# Also the limits of the pages: one forward pass of 512 tokens per request, and a page of 32 strips.
MAX_TOKENS = 512
MAX_LATENTS = 32


class Watched(Contract):
    """One latent over the text."""

    latent: int
    values: tuple[float, ...]
    """Activation at each token, in units of the SAE's normalised space."""
    largest: float
    fires: int
    """Tokens on which it is active."""


class MonitorReport(Artefact):
    """What chosen latents did on a text; the JSON that the monitor page exports."""

    kind: str = Field(default="winnow.monitor", pattern=r"^winnow\.monitor$")
    sae_sha256: Sha256
    hook: ReadHook
    text: str
    # Left out if false, so that reports of datasets without BOS keep the bytes they had before the field.
    bos: bool = Field(default=False, exclude_if=lambda bos: not bos)
    """Whether BOS was put before the text, as the SAE's windows begin."""
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    read: tuple[bool, ...]
    """False at leading positions and sinks, on which an SAE is not trained: values there are 0."""
    latents: tuple[Watched, ...]


def monitor(
    text: str,
    sae: Sae,
    latents: Sequence[int],
    subject: Subjects,
    *,
    rule: WindowRule | None = None,
    drop_leading: int = 1,
    sink_multiple: float = 10.0,
    texts: Sequence[str] | None = None,
) -> MonitorReport:
    """Activations of chosen latents at every token of a text.

    Args:
        text: At most 512 tokens, BOS included.
        sae: A published SAE.
        latents: At most 32 of its latents.
        subject: The subject it belongs to; of a crosscoder of several, all of them by name.
        rule: How the dataset's windows begin; None takes the rule of the SAE's card, or no BOS without one.
        drop_leading: The dataset's `plan.drop_leading`.
        sink_multiple: The dataset's `plan.sink_multiple`.
        texts: Text of every token id, such as an index's `texts`; None derives it from the tokenizer.

    Raises:
        ConfigError: The text is empty or too long, or the SAE lacks one of the latents.
    """
    if sae.card is None:
        raise ConfigError("sae", expected="a published SAE (`Sae.load`)", got="one without a card")
    if not 0 < len(latents) <= MAX_LATENTS or not all(0 <= latent < sae.latents for latent in latents):
        raise ConfigError(
            "latents",
            expected=f"1 to {MAX_LATENTS} numbers from 0 to {sae.latents - 1}",
            got=list(latents)[:40],
        )
    rule = rule or sae.card.window or WindowRule()
    first = subject if isinstance(subject, Subject) else next(iter(subject.values()))
    ids = tokenise(first, text, MAX_TOKENS, rule)
    reading = read_tokens(subject, sae, ids, drop_leading=drop_leading, sink_multiple=sink_multiple)
    if texts is None:
        texts = token_texts(first.tokenizer, first.identity.vocabulary)
    watched: list[Watched] = []
    for latent in latents:
        values = reading.of(latent)
        watched.append(
            Watched(
                latent=latent,
                values=tuple(values.tolist()),
                largest=float(values.max()),
                fires=int((values > 0).sum()),
            )
        )
    return MonitorReport(
        sae_sha256=sae.card.weights_sha256,
        hook=sae.card.hook,
        text=text,
        bos=rule.bos,
        token_ids=tuple(ids),
        tokens=tuple(texts[number] for number in ids),
        read=tuple(reading.read.tolist()),
        latents=tuple(watched),
    )
