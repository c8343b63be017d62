"""What requests carry; every input is bounded here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from winnow.explorer.site.monitor import MAX_LATENTS

# What one request may cost; with the eight seats (`--seats`) this bounds how long the last one waits. The
# page takes its own limits from here (`/api/site`).
MAX_TEXT = 4000
"""Characters of a text."""
MAX_NEW_TOKENS = 200
"""Tokens that one request generates."""
MAX_AROUND = 2000
"""Tokens of a text on each side of an example. Each window that they are in costs reading a unit's tokens."""
MAX_EDITS = 8
"""Changes of one generation."""
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
# Any SAE's numbers; whether this SAE has the latent is checked by `Desk.latent`, with a message that says
# which ones it has.
LatentNumber = Annotated[int, Field(ge=0, lt=1 << 31)]


Part = Annotated[str, Field(max_length=241)]
"""Of a crosscoder: the name of the part that is steered or ablated; empty for other SAEs."""


class Body(BaseModel):
    """What all bodies share."""

    # A misspelt field is an error, not a default that is taken silently.
    model_config = ConfigDict(extra="forbid")


class TextBody(Body):
    """A text to read."""

    text: Text


class MonitorBody(TextBody):
    """A text, and the latents to monitor on it."""

    latents: Annotated[list[LatentNumber], Field(min_length=1, max_length=MAX_LATENTS)]


class AblateBody(Body):
    """A latent, and the text or the dataset's window in which it is ablated."""

    latent: LatentNumber
    text: Text | None = None
    window: Annotated[int | None, Field(ge=0, lt=1 << 32)] = None
    part: Part = ""


class PromotionBody(Body):
    """A latent, and the code to which it is clamped; null is its largest activation."""

    latent: LatentNumber
    strength: Annotated[float | None, Field(ge=-1e4, le=1e4, allow_inf_nan=False)] = None
    part: Part = ""


class Edit(Body):
    """One change of one latent."""

    sae: Annotated[int, Field(ge=0, le=255)] = 0
    latent: LatentNumber
    op: Literal["clamp", "scale", "add", "ablate"] = "clamp"
    # JSON parsers accept Infinity, which would make every logit NaN.
    strength: Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)] = 0.0
    part: Part = ""


class SteerBody(Body):
    """What to generate, clean and steered with the same random numbers."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
    edits: Annotated[list[Edit], Field(max_length=MAX_EDITS)]
    tokens: Annotated[int, Field(ge=1, le=MAX_NEW_TOKENS)] = 40
    temperature: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)] = 0.8
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
