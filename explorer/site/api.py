"""The explorer's JSON API. Every input is bounded here; nothing from a request names a file.

Requests use the subject and the SAE one at a time (`winnow.explorer.site.lane`); pages of latents do not
queue.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from winnow.explorer.index.subjects import LazySubject
from winnow.explorer.site.circuit import Circuits
from winnow.explorer.site.circuit_api import add_graphs
from winnow.explorer.site.exhibit import AXES, Exhibit, matches, overview
from winnow.explorer.site.lane import Lane
from winnow.explorer.site.monitor import MAX_LATENTS, MAX_TOKENS, MonitorReport, monitor
from winnow.explorer.site.reading import Ablation, ablate, read_tokens, tokenise
from winnow.schemas.errors import ConfigError
from winnow.schemas.window import WindowRule
from winnow.store import ActivationStore
from winnow.subject.generate import Steer
from winnow.subject.load import Subject

# What one request may cost; with the eight seats (`--seats`) this bounds how long the last one waits. The
# page takes its own limits from here (`/api/site`).
MAX_TEXT = 4000
_MAX_NEW_TOKENS = 200
_MAX_EDITS = 8
# A feature page offers 36 examples, each of which can be ablated: a few latents' worth.
_CACHED_ABLATIONS = 256
_TOP_PER_TOKEN = 8

_SaeNumber = Annotated[int, Path(ge=0, le=255, description="Which SAE, as listed by /api/site")]
Axis = Literal["density", "largest", "mean", "token_share", "logit_peak", "enc_dec_cosine"]
Text = Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
# Any SAE's numbers; whether this SAE has the latent is checked by `Desk.latent`, with a message that says
# which ones it has.
_LatentNumber = Annotated[int, Field(ge=0, lt=1 << 31)]


class _Body(BaseModel):
    # A misspelt field is an error, not a default that is taken silently.
    model_config = ConfigDict(extra="forbid")


class _TextBody(_Body):
    """A text to read."""

    text: Text


class _MonitorBody(_TextBody):
    """A text, and the latents to monitor on it."""

    latents: Annotated[list[_LatentNumber], Field(min_length=1, max_length=MAX_LATENTS)]


class _AblateBody(_Body):
    """A latent, and the text or the dataset's window in which it is ablated."""

    latent: _LatentNumber
    text: Text | None = None
    window: Annotated[int | None, Field(ge=0, lt=1 << 32)] = None


class Edit(_Body):
    """One change of one latent."""

    sae: Annotated[int, Field(ge=0, le=255)] = 0
    latent: _LatentNumber
    op: Literal["clamp", "scale", "add", "ablate"] = "clamp"
    # JSON parsers accept Infinity, which would make every logit NaN.
    strength: Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)] = 0.0


class SteerBody(_Body):
    """What to generate, clean and steered with the same random numbers."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_TEXT)]
    edits: Annotated[list[Edit], Field(max_length=_MAX_EDITS)]
    tokens: Annotated[int, Field(ge=1, le=_MAX_NEW_TOKENS)] = 40
    temperature: Annotated[float, Field(ge=0, le=5, allow_inf_nan=False)] = 0.8
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0


@dataclass
class Desk:
    """What all requests share.

    Attributes:
        exhibits: The SAEs that the site shows.
        subject: The subject they belong to; None if nothing says which one, as for a graph's file alone.
        lane: The queue in front of the subject.
        dataset: Opens the dataset; None if it is not available.
        circuits: The graphs, and what their page needs.
        ablations: Newest replies by request, for repeated ones.
    """

    exhibits: list[Exhibit]
    subject: LazySubject | None
    lane: Lane
    dataset: Callable[[], ActivationStore] | None = None
    circuits: Circuits = field(default_factory=Circuits)
    ablations: OrderedDict[Any, Any] = field(default_factory=OrderedDict)

    def model(self) -> Subject:
        """The subject with all its layers, loaded when it is first needed.

        Raises:
            ConfigError: The server has none.
            SaeMismatch: Other weights than the dataset was harvested from.
        """
        if self.subject is None:
            raise ConfigError("subject", expected="a subject", got="none", fix="Name it in --config FILE")
        return self.subject.whole()

    def exhibit(self, number: int) -> Exhibit:
        """The SAE of a number.

        Raises:
            ConfigError: No such SAE.
        """
        if not self.exhibits:
            raise ConfigError("sae", expected="an index", got="none", fix="Run `winnow index SET` first")
        if not 0 <= number < len(self.exhibits):
            raise ConfigError("sae", expected=f"0 to {len(self.exhibits) - 1}", got=number)
        return self.exhibits[number]

    def latent(self, exhibit: Exhibit, number: int) -> int:
        """Return `number` if the SAE has such a latent.

        Raises:
            ConfigError: It has not.
        """
        if not 0 <= number < exhibit.table.meta.latents:
            raise ConfigError("latent", expected=f"0 to {exhibit.table.meta.latents - 1}", got=number)
        return number


def make_router(desk: Desk) -> APIRouter:
    """All routes below `/api`."""
    # The routes are plain functions, not coroutines: FastAPI runs them in threads, so that one that waits for
    # the model or for storage does not stop the others.
    router = APIRouter(prefix="/api")
    _add_lists(router, desk)
    _add_comparisons(router, desk)
    _add_readings(router, desk)
    add_graphs(router, desk.circuits, desk.exhibit, desk.lane)
    return router


def _add_lists(router: APIRouter, desk: Desk) -> None:
    """Routes about all latents of an SAE, and one of them: answered from the index alone."""

    @router.get("/site", summary="What the site shows")
    def site() -> dict[str, Any]:
        return {
            "saes": [exhibit.facts() for exhibit in desk.exhibits],
            # The last part of the name: a path of the server's disk is nobody's business.
            "subject": {
                "model": desk.subject.planned.model.rsplit("/", 1)[-1] if desk.subject else "no subject",
                "ready": desk.subject is not None and desk.subject.ready,
            },
            "graphs": bool(desk.circuits.shelf),
            "axes": AXES,
            "limits": {
                "text": MAX_TEXT,
                "tokens": MAX_TOKENS,
                "new_tokens": _MAX_NEW_TOKENS,
                "latents": MAX_LATENTS,
            },
            "windows": desk.dataset is not None,
        }

    @router.get("/saes/{sae}/map", summary="Coordinates of latents")
    def points(
        sae: _SaeNumber,
        x: Axis = "density",
        y: Axis = "token_share",
        q: Annotated[str, Query(max_length=200)] = "",
        low: Annotated[float, Query(ge=0, le=1)] = 0.0,
        high: Annotated[float, Query(ge=0, le=1)] = 1.0,
    ) -> dict[str, Any]:
        exhibit = desk.exhibit(sae)
        return exhibit.points(x, y, exhibit.find(q, low, high))

    @router.get("/saes/{sae}/latents", summary="A list of latents")
    def listing(
        sae: _SaeNumber,
        q: Annotated[str, Query(max_length=200)] = "",
        low: Annotated[float, Query(ge=0, le=1)] = 0.0,
        high: Annotated[float, Query(ge=0, le=1)] = 1.0,
        sort: Axis = "token_share",
        descending: bool = True,
        offset: Annotated[int, Query(ge=0, lt=1 << 31)] = 0,
        limit: Annotated[int, Query(ge=1, le=100)] = 25,
    ) -> dict[str, Any]:
        exhibit = desk.exhibit(sae)
        return exhibit.page(exhibit.find(q, low, high), sort, descending, offset, limit)

    @router.get("/saes/{sae}/brief/{latent}", summary="A latent in one line")
    def brief(sae: _SaeNumber, latent: Annotated[int, Path(ge=0, lt=1 << 31)]) -> dict[str, Any]:
        exhibit = desk.exhibit(sae)
        return exhibit.brief(desk.latent(exhibit, latent))

    @router.get("/saes/{sae}/features/{latent}", summary="A latent's page")
    def feature(sae: _SaeNumber, latent: Annotated[int, Path(ge=0, lt=1 << 31)]) -> dict[str, Any]:
        return desk.exhibit(sae).feature(latent)


def _add_comparisons(router: APIRouter, desk: Desk) -> None:
    """Routes about two SAEs: they need the decoders, not the subject."""

    @router.get("/compare/{one}/{other}", summary="How well the directions of two SAEs match")
    def compare(one: _SaeNumber, other: _SaeNumber) -> dict[str, Any]:
        return overview(desk.exhibit(one), desk.exhibit(other))

    @router.get("/compare/{one}/{other}/{latent}", summary="A latent's nearest latents in another SAE")
    def nearest(
        one: _SaeNumber, other: _SaeNumber, latent: Annotated[int, Path(ge=0, lt=1 << 31)]
    ) -> dict[str, Any]:
        left, right = desk.exhibit(one), desk.exhibit(other)
        return {
            "one": left.brief(desk.latent(left, latent)),
            "matches": matches(left, right, latent, 8),
        }


def _add_readings(router: APIRouter, desk: Desk) -> None:
    """Routes that run the subject, one request at a time."""

    @router.post("/saes/{sae}/text", summary="Which latents fire on a text, token by token")
    def text(sae: _SaeNumber, body: _TextBody) -> dict[str, Any]:
        exhibit = desk.exhibit(sae)
        with desk.lane.visit():
            subject = desk.model()
            ids = tokenise(subject, body.text, MAX_TOKENS, exhibit.window)
            meta = exhibit.table.meta
            reading = read_tokens(
                subject,
                exhibit.sae(subject.device),
                ids,
                drop_leading=meta.drop_leading,
                sink_multiple=meta.sink_multiple,
            )
        # Described outside the lane: the next request has the model meanwhile.
        return _describe_reading(exhibit, reading)

    @router.post("/saes/{sae}/monitor", summary="Chosen latents over a text")
    def watch(sae: _SaeNumber, body: _MonitorBody) -> MonitorReport:
        exhibit = desk.exhibit(sae)
        with desk.lane.visit():
            subject = desk.model()
            meta = exhibit.table.meta
            return monitor(
                body.text,
                exhibit.sae(subject.device),
                body.latents,
                subject,
                rule=exhibit.window,
                drop_leading=meta.drop_leading,
                sink_multiple=meta.sink_multiple,
                texts=exhibit.table.texts,
            )

    @router.post("/saes/{sae}/ablate", summary="How predictions on a text change without a latent")
    def effects(sae: _SaeNumber, body: _AblateBody) -> dict[str, Any]:
        return ablation(desk, sae, body)

    @router.post("/steer", summary="Generate clean and steered; one JSON object per line")
    def steer(body: SteerBody) -> StreamingResponse:
        return steering(desk, body)


def _describe_reading(exhibit: Exhibit, reading: Any) -> dict[str, Any]:
    """Describe a reading for the page: the strongest latents of each token, and of the whole text."""
    tokens: list[dict[str, Any]] = []
    columns = (reading.ids, reading.values, reading.indices, reading.read.tolist())
    for number, values, indices, read in zip(*columns, strict=True):
        best = values.topk(min(_TOP_PER_TOKEN, len(values)))
        latents = indices[best.indices].tolist()
        active = [[n, round(v, 5)] for n, v in zip(latents, best.values.tolist(), strict=True) if v > 0]
        tokens.append({"token": exhibit.table.texts[number], "read": read, "latents": active})
    totals: dict[int, float] = {}
    flat = zip(reading.indices.flatten().tolist(), reading.values.flatten().tolist(), strict=True)
    for latent, value in flat:
        if value > 0:
            totals[latent] = totals.get(latent, 0.0) + value
    strongest = sorted(totals, key=lambda latent: (-totals[latent], latent))[:24]
    # Each latent once, however many tokens it fires on: the page looks its words up by number.
    shown = set(strongest) | {latent for token in tokens for latent, _ in token["latents"]}
    return {
        "tokens": tokens,
        "latents": [
            exhibit.brief(latent)
            | {
                "total": totals[latent],
                "values": [round(value, 5) for value in reading.of(latent).tolist()],
            }
            for latent in strongest
        ],
        "briefs": {str(latent): exhibit.brief(latent) for latent in sorted(shown)},
    }


def ablation(desk: Desk, sae: int, body: _AblateBody) -> dict[str, Any]:
    """The effects of one latent on one text, computed or from the cache.

    Raises:
        ConfigError: No such latent, neither text nor window, both, or a text of unsuitable length.
    """
    exhibit = desk.exhibit(sae)
    desk.latent(exhibit, body.latent)
    if (body.text is None) == (body.window is None):
        raise ConfigError("text, window", expected="one of the two", got="both or neither")
    # Looked up before a seat is taken: a repeated request never meets a busy model.
    key = (sae, body.latent, body.text, body.window)
    if key in desk.ablations:
        desk.ablations.move_to_end(key)
        return desk.ablations[key]
    with desk.lane.visit():
        subject = desk.model()
        if body.text is not None:
            ids, positions = tokenise(subject, body.text, MAX_TOKENS, exhibit.window), None
        else:
            ids, positions = _window(desk, body.window or 0)
        meta, own = exhibit.table.meta, exhibit.sae(subject.device)
        common: dict[str, Any] = {"drop_leading": meta.drop_leading, "positions": positions}
        reading = read_tokens(subject, own, ids, sink_multiple=meta.sink_multiple, **common)
        found = ablate(subject, own, reading, body.latent, **common)
    reply = _described(exhibit, ids, found)
    desk.ablations[key] = reply
    while len(desk.ablations) > _CACHED_ABLATIONS:
        desk.ablations.popitem(last=False)
    return reply


def _window(desk: Desk, window: int) -> tuple[list[int], Any]:
    """Tokens of a window of the dataset, and their positions if attention stays inside documents."""
    if desk.dataset is None:
        raise ConfigError("window", expected="a text", got="a window, and the dataset is not available")
    dataset = desk.dataset()
    return [int(token) for token in dataset.tokens(window)], dataset.positions([window])


def _described(exhibit: Exhibit, ids: list[int], found: Ablation) -> dict[str, Any]:
    texts = exhibit.table.texts

    def votes(pairs: list[tuple[int, float]]) -> list[dict[str, Any]]:
        return [{"token": texts[number], "change": round(change, 6)} for number, change in pairs]

    return {
        "tokens": exhibit.words(ids),
        "values": [round(value, 5) for value in found.activation],
        # None at the last token: what comes after it is unknown.
        "loss_change": [None if each is None else round(each, 6) for each in found.loss_change],
        "kl": [round(each, 6) for each in found.kl],
        "up": [votes(each) for each in found.up],
        "down": [votes(each) for each in found.down],
    }


class _Seated(StreamingResponse):
    """A stream that keeps its seat in the lane until it ends, also by an error or a visitor who leaves."""

    def __init__(self, content: Iterator[str], lane: Lane) -> None:
        super().__init__(content, media_type="application/x-ndjson")
        self._lane = lane

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        # Here and not in the generator: a visitor who is gone before the first token never starts it, and a
        # generator that was not started runs no `finally`.
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._lane.leave()


def steering(desk: Desk, body: SteerBody) -> StreamingResponse:
    """Start both runs of a prompt.

    Raises:
        ConfigError: No such latent, a prompt of unsuitable length, or SAEs whose windows begin differently.
        Busy: No seat is free.
    """
    # Everything that can be refused is refused before the first byte: afterwards the status is sent, and a
    # failure would look like the end of a text.
    edits = [(desk.exhibit(edit.sae), edit) for edit in body.edits]
    for exhibit, edit in edits:
        desk.latent(exhibit, edit.latent)
    rule = _common_rule([exhibit for exhibit, _ in edits] or [desk.exhibit(0)])
    # `sit` and `turn` instead of `visit`: the seat is kept for the stream, the model only for each token.
    desk.lane.sit()
    try:
        with desk.lane.turn():
            subject = desk.model()
            prompt = tokenise(subject, body.prompt, MAX_TOKENS, rule)
            steers: dict[str, list[Steer]] = {}
            for exhibit, edit in edits:
                steer = Steer(
                    exhibit.sae(subject.device),
                    edit.latent,
                    edit.op,
                    edit.strength,
                    skip=exhibit.table.meta.drop_leading,
                )
                steers.setdefault(exhibit.table.meta.hook, []).append(steer)
            # One seed for both runs: they differ by the steer alone, not by the draws.
            kind: dict[str, Any] = {
                "max_new_tokens": body.tokens,
                "seed": body.seed,
                "temperature": body.temperature,
            }
            runs = {
                "clean": subject.generate(prompt, **kind),
                "steered": subject.generate(prompt, steer=steers, **kind),
            }
        return _Seated(_lines(desk.lane, runs), desk.lane)
    # Until the response exists nobody else would give the seat back, not even after an interrupt.
    except BaseException:
        desk.lane.leave()
        raise


def _common_rule(exhibits: list[Exhibit]) -> WindowRule:
    """How a prompt begins for all of several SAEs.

    Raises:
        ConfigError: Their datasets' windows begin differently.
    """
    # One prompt has one beginning, and activations after BOS differ from those without.
    rules = {exhibit.window.canonical(): exhibit.window for exhibit in exhibits}
    if len(rules) > 1:
        raise ConfigError(
            "edits",
            expected="SAEs of datasets whose windows begin alike",
            got=", ".join(f"{exhibit.name}: {exhibit.window.words}" for exhibit in exhibits),
            fix="Steer with one of them at a time",
        )
    return next(iter(rules.values()))


def _lines(lane: Lane, runs: dict[str, Any]) -> Iterator[str]:
    """The tokens of both runs in turn, one JSON object per line."""
    going = dict(runs)
    while going:
        for name, run in list(going.items()):
            # One token per turn, so that a generation of 200 tokens does not keep other requests waiting.
            with lane.turn():
                token = next(run, None)
            if token is None:
                del going[name]
                continue
            yield json.dumps({"run": name, "text": token.text, "logprob": token.logprob}) + "\n"
    # Tells a finished stream from one that was cut off.
    yield json.dumps({"done": True}) + "\n"
