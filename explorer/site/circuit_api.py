"""Routes of the graph's page: the graphs there are, one of them, its file, and edits of its latents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Response
from pydantic import BaseModel, ConfigDict, Field

from winnow.explorer.site.circuit import Circuits, LatentEdit, columns
from winnow.explorer.site.exhibit import Exhibit
from winnow.explorer.site.lane import Lane

MAX_GRAPH_EDITS = 16

_Name = Annotated[str, Path(min_length=1, max_length=600, description="A graph, as listed by /api/graphs")]


class GraphEdit(BaseModel):
    """One change of one latent of a graph."""

    # A misspelt field is an error, not a default that is taken silently.
    model_config = ConfigDict(extra="forbid")

    layer: Annotated[int, Field(ge=0, lt=1 << 16)]
    latent: Annotated[int, Field(ge=0, lt=1 << 31)]
    position: Annotated[int | None, Field(ge=0, lt=1 << 31)] = None
    op: Literal["clamp", "scale", "ablate"] = "ablate"
    # JSON parsers accept Infinity, which would make every logit NaN.
    strength: Annotated[float, Field(ge=-1e4, le=1e4, allow_inf_nan=False)] = 0.0


class GraphEdits(BaseModel):
    """Changes that are made together."""

    model_config = ConfigDict(extra="forbid")

    edits: Annotated[list[GraphEdit], Field(min_length=1, max_length=MAX_GRAPH_EDITS)]


def add_graphs(router: APIRouter, circuits: Circuits, exhibit: Callable[[int], Exhibit], lane: Lane) -> None:
    """Routes below `/api/graphs`."""

    @router.get("/graphs", summary="The attribution graphs that there are")
    def graphs() -> list[dict[str, Any]]:
        return circuits.shelf.list()

    @router.get("/graphs/{name}", summary="An attribution graph, one list per field")
    def one(name: _Name) -> dict[str, Any]:
        graph = circuits.shelf.graph(name)
        facts = circuits.facts(graph)
        shown = {int(layer): exhibit(number) for layer, number in facts["saes"].items()}
        return {"name": name} | facts | columns(graph, shown)

    @router.get("/graphs/{name}/file", summary="An attribution graph's file")
    def file(name: _Name) -> Response:
        return Response(circuits.shelf.raw(name), media_type="application/json")

    @router.post("/graphs/{name}/edit", summary="What a change of latents does: foretold, and in the subject")
    def edit(name: _Name, body: GraphEdits) -> dict[str, Any]:
        graph = circuits.shelf.graph(name)
        edits = [LatentEdit(**each.model_dump()) for each in body.edits]
        return {"logits": [asdict(each) for each in circuits.run(graph, edits, lane)]}
