"""The explorer's JSON API. Every input is bounded (`bodies`); nothing from a request names a file.

Requests use the subject and the SAE one at a time (`winnow.explorer.site.lane`); pages of latents do not
queue.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from fastapi.responses import StreamingResponse

from winnow.explorer.site.bodies import (
    MAX_AROUND,
    MAX_NEW_TOKENS,
    MAX_TEXT,
    AblateBody,
    MonitorBody,
    PromotionBody,
    SteerBody,
    TextBody,
)
from winnow.explorer.site.circuit_api import add_graphs
from winnow.explorer.site.desk import Desk
from winnow.explorer.site.effects import ablation, measured_promotion, related
from winnow.explorer.site.exhibit import AXES, Exhibit, SteeredPlace, last_name, matches, overview
from winnow.explorer.site.lane import Lane
from winnow.explorer.site.monitor import MAX_LATENTS, MAX_TOKENS, MonitorReport, monitor
from winnow.explorer.site.reading import read_tokens, tokenise
from winnow.schemas.errors import ConfigError
from winnow.schemas.window import WindowRule
from winnow.subject.generate import Steer

_TOP_PER_TOKEN = 8

_SaeNumber = Annotated[int, Path(ge=0, le=255, description="Which SAE, as listed by /api/site")]
# Which axes there are depends on the SAE: a crosscoder has one per part. `Exhibit.axis` refuses others.
Axis = Annotated[str, Query(pattern=r"^[a-z0-9_.]{1,300}$")]
_Class = Annotated[str, Query(max_length=241, description="Of a crosscoder: one of its `classes`")]


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
            "subject": {
                "model": ", ".join(last_name(each.planned.model) for each in desk.subjects.values())
                or "no subject",
                "ready": bool(desk.subjects) and all(each.ready for each in desk.subjects.values()),
            },
            "graphs": bool(desk.circuits.shelf),
            "axes": AXES | {name: says for each in desk.exhibits for name, says in each.own_axes.items()},
            "limits": {
                "text": MAX_TEXT,
                "tokens": MAX_TOKENS,
                "new_tokens": MAX_NEW_TOKENS,
                "latents": MAX_LATENTS,
                "around": MAX_AROUND,
            },
            "windows": desk.dataset is not None,
            "labels": desk.kinds is not None and desk.kinds.known,
            "set": desk.relations is not None,
        }

    @router.get("/saes/{sae}/map", summary="Coordinates of latents")
    def points(
        sae: _SaeNumber,
        x: Axis = "density",
        y: Axis = "token_share",
        q: Annotated[str, Query(max_length=200)] = "",
        low: Annotated[float, Query(ge=0, le=1)] = 0.0,
        high: Annotated[float, Query(ge=0, le=1)] = 1.0,
        of: _Class = "",
    ) -> dict[str, Any]:
        exhibit = desk.exhibit(sae)
        return exhibit.points(x, y, exhibit.find(q, low, high, of=of))

    @router.get("/saes/{sae}/latents", summary="A list of latents")
    def listing(
        sae: _SaeNumber,
        q: Annotated[str, Query(max_length=200)] = "",
        low: Annotated[float, Query(ge=0, le=1)] = 0.0,
        high: Annotated[float, Query(ge=0, le=1)] = 1.0,
        of: _Class = "",
        sort: Axis = "token_share",
        descending: bool = True,
        offset: Annotated[int, Query(ge=0, lt=1 << 31)] = 0,
        limit: Annotated[int, Query(ge=1, le=100)] = 25,
    ) -> dict[str, Any]:
        exhibit = desk.exhibit(sae)
        return exhibit.page(exhibit.find(q, low, high, of=of), sort, descending, offset, limit)

    @router.get("/saes/{sae}/brief/{latent}", summary="A latent in one line")
    def brief(sae: _SaeNumber, latent: Annotated[int, Path(ge=0, lt=1 << 31)]) -> dict[str, Any]:
        exhibit = desk.exhibit(sae)
        return exhibit.brief(desk.latent(exhibit, latent))

    @router.get("/saes/{sae}/features/{latent}", summary="A latent's page")
    def feature(sae: _SaeNumber, latent: Annotated[int, Path(ge=0, lt=1 << 31)]) -> dict[str, Any]:
        return desk.exhibit(sae).feature(latent)

    @router.get("/saes/{sae}/features/{latent}/labels", summary="What the tokens of a latent's examples are")
    def labels(sae: _SaeNumber, latent: Annotated[int, Path(ge=0, lt=1 << 31)]) -> dict[str, Any]:
        exhibit = desk.exhibit(sae)
        if desk.kinds is None:
            raise ConfigError("labels", expected="the dataset", got="nothing: it is not available")
        examples = exhibit.table.latent(latent)["examples"]
        places = [(each["window"], each["position"]) for each in examples]
        return desk.kinds.of(exhibit.table.meta.plan_fingerprint, places)

    @router.get("/saes/{sae}/context", summary="The text around a token of the dataset, of its document")
    def context(
        sae: _SaeNumber,
        window: Annotated[int, Query(ge=0, lt=1 << 32)],
        position: Annotated[int, Query(ge=0, lt=1 << 32)],
        before: Annotated[int, Query(ge=0, le=MAX_AROUND)] = 200,
        after: Annotated[int, Query(ge=0, le=MAX_AROUND)] = 200,
    ) -> dict[str, Any]:
        exhibit = desk.exhibit(sae)
        if desk.contexts is None:
            raise ConfigError("text", expected="the dataset", got="nothing: it is not available")
        plan = exhibit.table.meta.plan_fingerprint
        found = desk.contexts.around(plan, window, position, before, after)._asdict()
        return {"tokens": exhibit.words(found.pop("ids"))} | found


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
    def text(sae: _SaeNumber, body: TextBody) -> dict[str, Any]:
        exhibit = desk.exhibit(sae)
        with desk.lane.visit():
            subjects = desk.readers(exhibit)
            first = next(iter(subjects.values()))
            ids = tokenise(first, body.text, MAX_TOKENS, exhibit.window)
            meta = exhibit.table.meta
            reading = read_tokens(
                subjects,
                exhibit.sae(first.device),
                ids,
                drop_leading=meta.drop_leading,
                sink_multiple=meta.sink_multiple,
            )
        # Described outside the lane: the next request has the model meanwhile.
        return _describe_reading(exhibit, reading)

    @router.post("/saes/{sae}/monitor", summary="Chosen latents over a text")
    def watch(sae: _SaeNumber, body: MonitorBody) -> MonitorReport:
        exhibit = desk.exhibit(sae)
        with desk.lane.visit():
            subjects = desk.readers(exhibit)
            meta = exhibit.table.meta
            return monitor(
                body.text,
                exhibit.sae(next(iter(subjects.values())).device),
                body.latents,
                subjects,
                rule=exhibit.window,
                drop_leading=meta.drop_leading,
                sink_multiple=meta.sink_multiple,
                texts=exhibit.table.texts,
            )

    @router.post("/saes/{sae}/ablate", summary="How predictions on a text change without a latent")
    def effects(sae: _SaeNumber, body: AblateBody) -> dict[str, Any]:
        return ablation(desk, sae, body)

    @router.post("/saes/{sae}/promotion", summary="What steering with a latent promotes, measured")
    def promoted(sae: _SaeNumber, body: PromotionBody) -> dict[str, Any]:
        return measured_promotion(desk, sae, body)

    @router.get(
        "/saes/{sae}/features/{latent}/relations", summary="Latents of other layers that it has to do with"
    )
    def relations(sae: _SaeNumber, latent: Annotated[int, Path(ge=0, lt=1 << 31)]) -> dict[str, Any]:
        return related(desk, sae, latent)

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
    places = [exhibit.place("steering", edit.part) for exhibit, edit in edits]
    name = _one_subject(places)
    rule = _common_rule([exhibit for exhibit, _ in edits] or [desk.exhibit(0)])
    # `sit` and `turn` instead of `visit`: the seat is kept for the stream, the model only for each token.
    desk.lane.sit()
    try:
        with desk.lane.turn():
            subject = desk.model(name)
            prompt = tokenise(subject, body.prompt, MAX_TOKENS, rule)
            steers: dict[str, list[Steer]] = {}
            for (exhibit, edit), place in zip(edits, places, strict=True):
                steer = Steer(
                    exhibit.sae(subject.device),
                    edit.latent,
                    edit.op,
                    edit.strength,
                    skip=exhibit.table.meta.drop_leading,
                    part=place.part,
                )
                steers.setdefault(place.hook, []).append(steer)
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


def _one_subject(places: list[SteeredPlace]) -> str:
    """The subject that all changes are made in, by the name of its dataset.

    Raises:
        ConfigError: They are parts of several.
    """
    names = {place.subject for place in places}
    if len(names) > 1:
        raise ConfigError("edits", expected="parts of one subject", got=" and ".join(sorted(names)))
    return names.pop() if names else ""


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
