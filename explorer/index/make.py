"""What `winnow index` does: alone or through a Ray crew, with its progress reported."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import NamedTuple

from winnow.common.reporter import Progress
from winnow.explorer.index.build import Recipe
from winnow.explorer.place import Place
from winnow.schemas.errors import ConfigError
from winnow.schemas.features import FeatureIndex, IndexSpec
from winnow.schemas.fit import other_windows

log = logging.getLogger("winnow.explorer")


class Staff(NamedTuple):
    """Who makes an index; see the options of `winnow index`."""

    workers: int = 1
    threads: int = 0
    gpus: float | None = None
    ray_address: str | None = None


ALONE = Staff()


def make_index(
    sae_uri: str, place: Place, out: str, scratch: str | None, spec: IndexSpec, staff: Staff = ALONE
) -> FeatureIndex:
    """What `winnow index` does, with progress on stderr."""
    if place.root is None:
        raise ConfigError("the dataset", expected="--root ROOT or --config FILE", got="neither")
    recipe = Recipe(sae_uri, place.root, out, scratch, spec, place.subject, place.storage)
    indexer = recipe.open()
    if (warning := other_windows(sae_uri, indexer.card, indexer.dataset.plan)) is not None:
        log.warning(warning)
    with ExitStack() as crew, ExitStack() as stack:
        bars: dict[str, Progress] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in bars:
                stack.pop_all().close()
                bars[step] = stack.enter_context(Progress(f"index, {step}", total, step, done))
            bars[step].update(done)

        hands = None
        if staff.workers > 1 and indexer.finished() is None:
            from winnow.explorer.index.crew import crew_of  # Ray is slow to import; one worker does without

            hands = crew.enter_context(crew_of(recipe, *staff))
        return indexer.run(progress, hands)
