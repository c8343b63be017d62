"""The order of a reading: lanes of which each has as many rows as the labels of its units choose.

Letters as in `winnow.store.format.order`. A lane shuffles its chosen rows of a group's units, and gives B/G
of them per step, as many steps as the lane with the fewest has rows for; the others' remaining rows are the
group's tail. No batch is padded. A group's units are the same in every epoch, in plan order, so the steps
of each group are fixed numbers: a step is found by a search in their running sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.errors import ConfigError, IntegrityError
from winnow.schemas.stream import StreamState
from winnow.store.format.layout import keyed_permutation
from winnow.store.format.order import LaneOrder, Place


@dataclass(frozen=True)
class ReadingOrder(LaneOrder):
    """The order of the rows that a reading chooses of one split; see `LaneOrder`.

    Args:
        slices: [units of the split, 64]: chosen rows of each slice.
        squares: [units of the split]: sum over a unit's windows of the square of their chosen rows.
        mask: Gives the chosen rows of a unit, bool [R], in stored order.
        reading: Digest of the reading, part of the stream's state.

    Raises:
        ConfigError: As `LaneOrder`; also a group that has no step, since too few of its rows are chosen.
    """

    slices: NDArray[np.uint32] = field(kw_only=True, compare=False, repr=False)
    squares: NDArray[np.uint64] = field(kw_only=True, compare=False, repr=False)
    mask: Callable[[int], NDArray[np.bool_]] = field(kw_only=True, compare=False, repr=False)
    reading: str = field(kw_only=True)

    def _check_steps(self) -> None:
        empty = np.flatnonzero(self._steps == 0)
        if not empty.size:
            return
        group = int(empty[0])
        chosen = int(self._lane_rows[group].sum())
        raise ConfigError(
            f"batch_rows={self.batch_rows} is more than what the reading chooses of group {group} "
            f"({self.units_in(group)} units)",
            expected=f"a batch that {chosen} rows over {self.lanes} lanes can fill",
            got=self.batch_rows,
            fix="Lower batch_rows or lanes, or raise group_units (and group_bytes)",
        )

    # Tables

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """[groups]: place of each group's first unit in the split."""
        return np.arange(self.groups) * self.group_units

    @cached_property
    def _lane_rows(self) -> NDArray[np.int64]:
        """[groups, G]: chosen rows of each lane."""
        by_lane = self.slices.reshape(len(self.units), self.lanes, -1).sum(2, dtype=np.int64)
        return np.add.reduceat(by_lane, self._starts, axis=0)

    @cached_property
    def _steps(self) -> NDArray[np.int64]:
        """[groups]: steps of each group."""
        return self._lane_rows.min(1) // self.lane_batch

    @cached_property
    def _firsts(self) -> NDArray[np.int64]:
        """[groups + 1]: first step of each group in an epoch, and the steps of an epoch."""
        return np.concatenate([[0], np.cumsum(self._steps)])

    def steps_in(self, group: int) -> int:
        """Steps in a group of the epoch."""
        return int(self._steps[group])

    @property
    def steps_per_epoch(self) -> int:
        """Steps in every epoch."""
        return int(self._firsts[-1])

    @property
    def dropped_rows(self) -> int:
        """Chosen rows that an epoch omits: the tails of its groups (other rows in each epoch)."""
        return int(self._lane_rows.sum()) - self.rows_per_epoch

    # From a step to rows

    def locate(self, step: int) -> Place:
        """Find epoch, group and step in the group of a step counted over all epochs, in O(log groups)."""
        if step < 0:
            raise ConfigError("step", expected="0 or more", got=step)
        epoch, rest = divmod(step, self.steps_per_epoch)
        group = int(np.searchsorted(self._firsts, rest, side="right")) - 1
        return Place(epoch, group, rest - int(self._firsts[group]))

    def first_step(self, epoch: int, group: int) -> int:
        """The first step of a group, counted over all epochs."""
        return epoch * self.steps_per_epoch + int(self._firsts[group])

    def units_of(self, epoch: int, group: int) -> tuple[int, ...]:  # noqa: ARG002
        """Unit numbers of a group, in the order its lanes count them: the same in every epoch."""
        first = group * self.group_units
        return tuple(self.units[first : first + self.units_in(group)])

    def lane_turns(self, epoch: int, group: int, lanes: range) -> list[NDArray[np.int64]]:
        """Per lane the rows [steps_in(group) * B/G] that it gives in a group, in order.

        Raises:
            IntegrityError: The labels choose other rows than were counted.
        """
        units = self.units_of(epoch, group)
        share = slice(lanes.start * self.lane_unit_rows, lanes.stop * self.lane_unit_rows)
        # [lanes, units, rows of a unit that a lane owns]: a lane's rows are neighbours in every unit.
        masks = np.stack([self.mask(unit)[share].reshape(len(lanes), -1) for unit in units], 1)
        length = self.steps_in(group) * self.lane_batch
        turns: list[NDArray[np.int64]] = []
        for lane, mask in zip(lanes, masks, strict=True):
            chosen = np.flatnonzero(mask)
            if len(chosen) != self._lane_rows[group, lane]:
                raise IntegrityError(
                    f"rows that reading {self.reading[:12]} chooses in lane {lane} of group {group}",
                    expected=f"{self._lane_rows[group, lane]}, as counted",
                    got=len(chosen),
                    fix=f"Delete readings/{self.reading}.*: they are counted again from the labels",
                )
            key = ("winnow.reading.v1", self.seed, epoch, lane, group)
            turns.append(chosen[keyed_permutation(len(chosen), *key)][:length])
        return turns

    # Mixing

    @cached_property
    def _pairs(self) -> tuple[float, float]:
        """Probability that two chosen rows share a window: of a group, on average, and of the split."""
        squares = np.add.reduceat(self.squares.astype(np.float64), self._starts)
        rows = self._lane_rows.sum(1).astype(np.float64)
        inside = float((squares / rows**2 * rows).sum() / rows.sum())
        return inside, float(squares.sum() / rows.sum() ** 2)

    @property
    def same_window(self) -> float:
        """Probability that two rows of a batch share a window."""
        return self._pairs[0]

    @property
    def excess(self) -> float:
        """`same_window` beyond that of a uniform shuffle of all chosen rows of the split."""
        inside, whole = self._pairs
        return inside - whole

    @property
    def group_units_needed(self) -> int:
        """About the smallest U whose design effect is small enough, by the size of the whole split."""
        return min(len(self.units), max(super().group_units_needed, self.group_units + 1))

    def state(self, plan_fingerprint: str, split: str, hooks: Sequence[str], step: int) -> StreamState:
        """Position of a stream of this order before `step`."""
        state = super().state(plan_fingerprint, split, hooks, step)
        return state.model_copy(update={"reading": self.reading})
