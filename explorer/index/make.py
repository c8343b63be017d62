"""What `winnow index` does: alone or through a Ray crew, with its progress reported."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any, NamedTuple

from winnow.common.reporter import Progress
from winnow.evaluator.set_setting import named_root
from winnow.explorer.index.build import Recipe
from winnow.explorer.index.subjects import LazySubject
from winnow.explorer.place import Place, layer_places
from winnow.sae.sets import layer_card
from winnow.schemas.errors import ConfigError
from winnow.schemas.features import FeatureIndex, IndexSpec
from winnow.schemas.fit import check_dataset, check_reads, other_windows
from winnow.schemas.layers import layer_folder
from winnow.schemas.sets import SetCard
from winnow.store import ActivationStore
from winnow.store.objects import open_store

log = logging.getLogger("winnow.explorer")


class Staff(NamedTuple):
    """Who makes an index; see the options of `winnow index`."""

    workers: int = 1
    threads: int = 0
    gpus: float | None = None
    ray_address: str | None = None


ALONE = Staff()


def make_index(
    sae_uri: str,
    place: Place,
    out: str,
    scratch: str | None,
    spec: IndexSpec,
    staff: Staff = ALONE,
    *,
    subject: LazySubject | None = None,
    label: str = "index",
) -> FeatureIndex:
    """What `winnow index` does of one SAE, with progress on stderr.

    Args:
        sae_uri: The SAE.
        place: The dataset and the subject.
        out: Folder of the index.
        scratch: Folder for blocks; None is one inside `out`.
        spec: What the index holds.
        staff: Who makes it.
        subject: The subject, if several indexes share it.
        label: What progress is headed with.
    """
    root = _root(place, sae_uri)
    more: dict[str, Any] = {"roots": place.roots, "subjects": place.subjects}
    recipe = Recipe(sae_uri, root, out, scratch, spec, place.subject, place.storage, **more)
    indexer = recipe.open(subject)
    if (warning := other_windows(sae_uri, indexer.card, indexer.dataset.plan)) is not None:
        log.warning(warning)
    with ExitStack() as crew, ExitStack() as stack:
        bars: dict[str, Progress] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in bars:
                stack.pop_all().close()
                bars[step] = stack.enter_context(Progress(f"{label}, {step}", total, step, done))
            bars[step].update(done)

        hands = None
        if staff.workers > 1 and indexer.finished() is None:
            from winnow.explorer.index.crew import crew_of  # Ray is slow to import; one worker does without

            hands = crew.enter_context(crew_of(recipe, *staff))
        return indexer.run(progress, hands)


def make_indexes(
    set_uri: str,
    card: SetCard,
    place: Place,
    out: str | None,
    scratch: str | None,
    spec: IndexSpec,
    staff: Staff = ALONE,
) -> dict[int, FeatureIndex]:
    """What `winnow index` does of a transcoder set: an index per layer, one after another.

    Stored rows are read, not the subject: each layer reads its own hook once, and nothing is computed twice.
    An interrupted command resumes at the layer, and the unit, at which it stopped.

    Args:
        set_uri: The set.
        card: Its card.
        place: The dataset and the subject.
        out: Folder of all indexes, one per layer; None is each layer's default.
        scratch: Folder for blocks, with a folder per layer; None is one inside each index.
        spec: What the indexes hold.
        staff: Who makes them.

    Returns:
        Layer -> its index.

    Raises:
        SaeMismatch: The dataset lacks a hook that a layer reads, or is of another subject.
    """
    dataset = ActivationStore.open(_root(place, set_uri), place.storage)
    # All layers before the first index is written.
    store, folders = open_store(set_uri, place.storage), layer_places(set_uri, card, out)
    check_reads(set_uri, card, dataset.plan)
    for entry in card.layers:
        check_dataset(folders[entry.layer][0], layer_card(store, entry), dataset.plan)
    subject = LazySubject(place.subject, dataset.plan.subject)
    made: dict[int, FeatureIndex] = {}
    for layer, (sae, where) in folders.items():
        mine = None if scratch is None else f"{scratch.rstrip('/')}/{layer_folder(layer)}"
        label = f"index of layer {layer}"
        made[layer] = make_index(sae, place, where, mine, spec, staff, subject=subject, label=label)
    return made


def _root(place: Place, uri: str) -> str:
    """The dataset's address; of an SAE of several datasets, that of one, unless another is given."""
    root = place.root or next(iter((place.roots or {}).values()), None) or named_root(uri, place.storage)
    if root is None:
        raise ConfigError("the dataset", expected="--root ROOT or --config FILE", got="neither")
    return root
