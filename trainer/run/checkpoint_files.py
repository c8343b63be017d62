"""Checkpoints in storage: safetensors by rows of latents, and a JSON index that completes them.

::

    <out>/checkpoints/<step>/latents-<first>-<stop>.safetensors   these latents' rows of every tensor
    <out>/checkpoints/<step>/state.safetensors                    every tensor without an axis of latents
    <out>/checkpoints/<step>/index.json                           CheckpointIndex: create-only, written last

Every rank writes its own rows (ranks that hold the same shard each write a part of it), in files of at most
LARGEST_FILE_BYTES. Files are split by latents, not by ranks, so any mesh reads what any other wrote: a rank
reads the files that hold its latents. One process is the mesh 1 x 1.

A checkpoint exists once its index does: data without one was never finished or is being deleted, and is
never chosen. The newest whose bytes match its index on every rank is taken; a damaged one is skipped with
a warning.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from winnow.schemas.base import sha256_hex
from winnow.schemas.checkpoint import CheckpointIndex, CheckpointRows
from winnow.schemas.errors import IntegrityError, MissingObject, StoreError
from winnow.schemas.stream import StreamState
from winnow.schemas.training import SaeIdentity
from winnow.store.objects import ObjectStore
from winnow.store.records.commit import settle
from winnow.trainer.mesh.shard import has_latents
from winnow.trainer.mesh.world import World
from winnow.trainer.run.checkpoint import pack
from winnow.trainer.step import Run, SetRun

log = logging.getLogger("winnow.trainer")

_STATE = "state.safetensors"
LARGEST_FILE_BYTES = 4 << 30
"""Longest file that is written, in bytes: S3 accepts at most 5 GiB in one put."""
_LARGEST_READ_BYTES = 1 << 40
"""A file longer than this is refused unread."""
_PLACE = re.compile(r"^checkpoints/(\d{12})/(.+)$")

Tensors = dict[str, Tensor]


class Saver:
    """Saves a run's checkpoints in the background, one at a time.

    Args:
        out: The run's folder.
        run: The run to save.
        identity: Dataset and subject that its weights belong to.
        threads: CPU threads of the run.

    A save copies the state to the host before it returns, so that the next step may change it; writing,
    the commit and the deletion of old checkpoints happen in a thread. An error there is raised by the next
    `save` or `wait`. On a mesh every rank calls the same methods.
    """

    def __init__(self, out: ObjectStore, run: Run | SetRun, identity: SaeIdentity, threads: int) -> None:
        self._out, self._run, self._identity, self._threads = out, run, identity, threads
        self._pending: Future[None] | None = None

    def save(self, stream: StreamState, then: Callable[[], None]) -> None:
        """Begin a checkpoint of the run's current state.

        Args:
            stream: The position of the stream.
            then: Called in the leading rank's thread once the checkpoint is durable.
        """
        # one at a time: a second copy of the state would take as much host memory again
        self.wait()
        run, world = self._run, self._run.world
        tensors = pack(run)
        index = CheckpointIndex(
            step=run.counts.step,
            spec=run.recipe.spec,
            identity=self._identity,
            stream=stream,
            files={},
            world=world.size,
            threads=self._threads,
            device=str(run.device),
            tokens=run.counts.tokens,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )

        def write() -> None:
            write_checkpoint(self._out, index, tensors, world)
            if world.leads:
                then()

        self._pending = world.writer.submit(write)

    def wait(self) -> None:
        """Return once no checkpoint is being written; raise the error of the last one, if any."""
        pending, self._pending = self._pending, None
        with self._run.world.together():
            if pending is not None:
                pending.result()

    def settle(self) -> None:
        """Return once no checkpoint is being written; its error, if any, is not raised."""
        # without `together`: this runs on the way out of an error, when other ranks may be gone
        if self._pending is not None:
            self._pending.exception()


def write_checkpoint(out: ObjectStore, index: CheckpointIndex, tensors: Tensors, world: World) -> None:
    """Write this rank's files; once every rank's are durable, one of them writes the index and prunes.

    Args:
        out: The run's folder.
        index: The index without its files.
        tensors: From `pack`.
        world: The mesh.

    Raises:
        StoreError: A rank could not write; there is no index.
    """
    # twelve digits, so that a listing is in the order of the steps
    folder = f"checkpoints/{index.step:012d}"
    written: dict[str, object] = {"files": {}, "rows": []}
    error: Exception | None = None
    try:
        # a damaged checkpoint of this step was skipped; its index is create-only, so it goes first
        if world.leads and out.size(f"{folder}/index.json") is not None:
            out.delete(f"{folder}/index.json")
        files, rows = {}, []
        for name, part, place in _files(tensors, index.spec.latents, world):
            data = safetensors.torch.save(part)
            out.put(f"{folder}/{name}", data)
            files[name] = sha256_hex(data)
            if place is not None:
                rows.append({"file": name, "first": place.start, "stop": place.stop})
        written = {"files": files, "rows": rows}
    except Exception as caught:
        # kept until all ranks have answered: one that raised here would leave the others in `share`
        error = caught
        written = {"error": f"{type(error).__name__}: {error}"}
    told = [json.loads(text) for text in world.files.share(json.dumps(written))]
    if error is not None:
        raise error
    if failed := [rank for rank in told if "error" in rank]:
        raise StoreError(f"another rank could not write checkpoint {index.step}", got=failed[0]["error"])
    if world.leads:
        files = {name: digest for rank in told for name, digest in rank["files"].items()}
        places = sorted((row for rank in told for row in rank["rows"]), key=lambda row: row["first"])
        rows = tuple(CheckpointRows.model_validate(place) for place in places)
        # the index last: until it stands, no resume chooses these files; then the old ones may go
        whole = index.model_copy(update={"files": files, "rows": rows})
        settle(out, f"{folder}/index.json", whole.to_json())
        _prune(out, index.step, index.spec.checkpoints_kept)


def _files(tensors: Tensors, latents: int, world: World) -> Iterator[tuple[str, Tensors, range | None]]:
    """Yield this rank's files: name, content, and which of the N latents it holds."""
    if world.leads:
        yield _STATE, {name: t for name, t in tensors.items() if not has_latents(name, t)}, None
    with_rows = {name: t for name, t in tensors.items() if has_latents(name, t)}
    shard, place, ranks = world.part(latents), world.data.rank, world.data.size
    mine = range(place * len(shard) // ranks, (place + 1) * len(shard) // ranks)
    row_bytes = sum(t[:1].nbytes for t in with_rows.values())
    # 64 KiB are left for the header of names and shapes
    step = max(1, (LARGEST_FILE_BYTES - (1 << 16)) // max(1, row_bytes))
    for first in range(mine.start, mine.stop, step):
        some = slice(first, min(first + step, mine.stop))
        rows = range(shard.start + some.start, shard.start + some.stop)
        part = {name: t[some].contiguous() for name, t in with_rows.items()}
        yield f"latents-{rows.start:010d}-{rows.stop:010d}.safetensors", part, rows


def _prune(out: ObjectStore, step: int, keep: int) -> None:
    """Delete all but the newest `keep` up to `step`, and all later ones."""
    places = _list(out)
    # a checkpoint later than this step is one that the resume skipped as damaged: it does not count as kept
    complete = sorted(
        (at for at, names in places.items() if "index.json" in names and at <= step), reverse=True
    )
    for step in sorted(set(places) - set(complete[:keep])):
        # the index first: a deletion that is interrupted must not leave an index without its files
        for name in sorted(places[step], key=lambda name: name != "index.json"):
            out.delete(f"checkpoints/{step:012d}/{name}")


def _list(out: ObjectStore) -> dict[int, list[str]]:
    places: dict[int, list[str]] = {}
    for key, _ in out.list("checkpoints"):
        if match := _PLACE.match(key):
            places.setdefault(int(match[1]), []).append(match[2])
    return places


def newest_checkpoint(out: ObjectStore, world: World | None = None) -> tuple[CheckpointIndex, Tensors] | None:
    """Load the newest checkpoint that is whole on every rank; None if the run has none yet.

    A damaged one is skipped with a warning.

    Args:
        out: The run's folder.
        world: The mesh; None if this process is alone.

    Returns:
        Its index, and the tensors of this rank's shard.

    Raises:
        IntegrityError: There are checkpoints, and all of them are damaged.
    """
    world = world or World()
    with world.together():
        found = sorted((step for step, names in _list(out).items() if "index.json" in names), reverse=True)
    # the first rank's list for all: with their own lists ranks could resume from different steps
    steps: list[int] = json.loads(world.whole.share(json.dumps(found))[0])
    for step in steps:
        folder, problem, state = f"checkpoints/{step:012d}", None, None
        with world.together():
            # caught inside `together`, which would stop all ranks: a damaged file only means the next one
            try:
                state = _read(out, folder, world)
            except (IntegrityError, MissingObject) as error:
                problem = error
        if not world.any(problem is not None)[0]:
            return state
        cause = problem or "on another rank"
        log.warning("checkpoint %d is damaged and is skipped: %s", step, cause)
    # an error and not a start from step 0, whose first checkpoint would delete the damaged ones
    if steps:
        raise IntegrityError(
            f"every checkpoint below {out.uri} is damaged",
            got=f"steps {steps}",
            fix="Delete the folder `checkpoints` to train from the start",
        )
    return None


def _read(out: ObjectStore, folder: str, world: World) -> tuple[CheckpointIndex, Tensors]:
    """Read the index, and the state of this rank's shard from whichever files hold it."""
    index = CheckpointIndex.from_json(out.get(f"{folder}/index.json"), origin=f"{folder}/index.json")
    part, state = world.part(index.spec.latents), _file(out, folder, index, _STATE)
    # checkpoints of version 1.0 have everything in one file
    if not index.rows:
        return index, {n: t[part.start : part.stop] if has_latents(n, t) else t for n, t in state.items()}
    pieces: dict[str, list[Tensor]] = {}
    reached = part.start
    for rows in sorted(index.rows, key=lambda rows: rows.first):
        first, stop = max(rows.first, part.start), min(rows.stop, part.stop)
        if first >= stop:
            continue
        if first != reached:
            break  # a gap: `reached` stays short, which is the error below
        reached = stop
        for name, tensor in _file(out, folder, index, rows.file).items():
            # a clone, because a view would keep the whole file's tensor in memory
            pieces.setdefault(name, []).append(tensor[first - rows.first : stop - rows.first].clone())
    if reached != part.stop:
        raise IntegrityError(f"{folder}/index.json", expected=f"latents up to {part.stop}", got=reached)
    return index, state | {name: torch.cat(tensors) for name, tensors in pieces.items()}


def _file(out: ObjectStore, folder: str, index: CheckpointIndex, name: str) -> Tensors:
    if name not in index.files:
        raise IntegrityError(f"{folder}/index.json", expected=f"the file {name}", got=sorted(index.files))
    data = out.get(f"{folder}/{name}", limit=_LARGEST_READ_BYTES)
    if sha256_hex(data) != index.files[name]:
        raise IntegrityError(f"{folder}/{name}", expected=f"sha256 {index.files[name]}", got=sha256_hex(data))
    try:
        return safetensors.torch.load(data)
    except SafetensorError as error:
        raise IntegrityError(f"{folder}/{name} is not safetensors", got=error) from error
