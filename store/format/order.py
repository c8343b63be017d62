"""Lanes: which row comes when. Pure arithmetic on integers, no I/O.

Letters: B rows in a global batch, G lanes, U units in a group, W windows in a unit, R rows in a unit.

A unit's 64 slices are divided among G lanes, 64/G neighbouring slices each. U units form a group; within a
group every lane shuffles its own rows and contributes B/G of them per step. A rank owns whole lanes, so the
global batch is the same on every world size that divides G. Everything follows from the step number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from winnow.schemas.errors import ConfigError
from winnow.schemas.harvest import SLICES, HarvestPlan
from winnow.schemas.stream import StreamState
from winnow.store.format.layout import keyed_permutations, philox_key

# Part of checkpoints: a changed order needs a new name, or old runs would resume on other batches.
_ALGORITHM = "lanes.v2"
"""Name and version of this order; golden vectors in the tests pin what it yields."""
# At 1.05 a batch estimates as well as one with 5 % fewer independent rows.
LARGEST_DESIGN_EFFECT = 1.05
"""Largest design effect that is accepted."""
_WINDOW_CORRELATION = 0.1
"""Assumed correlation of two rows of one window in what a batch estimates."""


@dataclass(frozen=True)
class Place:
    """Position of a step: `epoch`, `group` of the epoch, `step_in_group`; all count from 0."""

    epoch: int
    group: int
    step_in_group: int


@dataclass(frozen=True)
class LaneOrder:
    """The order of one split's rows over endless epochs.

    In an epoch every row comes at most once: a group has `lane_rows // (B/G)` steps, and the remaining rows
    are dropped and counted. Epoch 0 takes the units as given; later epochs take them in an order keyed by
    (seed, epoch). A step is found in constant time and memory, whatever the size.

    Args:
        units: Unit numbers of the split in plan order; a `range` costs no memory.
        rows_per_slice: Rows in one slice of a unit.
        windows_per_unit: Windows W in a unit, for the mixing figures.
        batch_rows: Rows B of a global batch.
        seed: Key of every shuffle.
        lanes: Lanes G.
        group_units: Units U in a group; the last group of an epoch may be shorter.

    Raises:
        ConfigError: G does not divide 64, B is not divisible by G, a group too small for one step, or
            a design effect past `LARGEST_DESIGN_EFFECT`.
    """

    units: Sequence[int]
    rows_per_slice: int
    windows_per_unit: int
    batch_rows: int
    seed: int
    lanes: int = SLICES
    group_units: int = 16

    @classmethod
    def for_plan(
        cls,
        plan: HarvestPlan,
        *,
        batch_rows: int,
        seed: int,
        split: str = "train",
        lanes: int = SLICES,
        group_units: int = 16,
        **fields: Any,
    ) -> Self:
        """Make the order of one split (`train`, `validation` or `all`) of a dataset.

        A `group_units` above the split's units is the whole split; `fields` are those that a subclass adds.
        """
        # Not clipped if it is 0 or less, so that `__post_init__` refuses it.
        units = plan.split_units(split)
        return cls(
            units,
            plan.rows_per_slice,
            plan.spec.windows_per_unit,
            batch_rows,
            seed,
            lanes,
            min(group_units, len(units)) if group_units > 0 else group_units,
            **fields,
        )

    def __post_init__(self) -> None:
        if self.lanes < 1 or SLICES % self.lanes:
            raise ConfigError("lanes", expected=f"a divisor of {SLICES}", got=self.lanes)
        if self.batch_rows < 1 or self.batch_rows % self.lanes:
            raise ConfigError(
                "batch_rows",
                expected=f"a positive multiple of lanes ({self.lanes})",
                got=self.batch_rows,
                fix="Change batch_rows or lanes",
            )
        if self.group_units < 1:
            raise ConfigError("group_units", expected="1 or more", got=self.group_units)
        if not self.units:
            raise ConfigError("the split has no units", expected="1 or more", got=0)
        self._check_steps()
        if self.design_effect > LARGEST_DESIGN_EFFECT:
            raise ConfigError(
                f"group_units={self.group_units} mixes batches of {self.batch_rows} rows too little",
                expected=f"a design effect of at most {LARGEST_DESIGN_EFFECT}",
                got=f"{self.design_effect:.3f}",
                fix=f"Set group_units to {self.group_units_needed} or more (and group_bytes to match), "
                "or lower batch_rows",
            )

    def _check_steps(self) -> None:
        # The last group is the smallest: one without a step would be an epoch that skips units silently.
        smallest = self.units_in(self.groups - 1)
        if self.steps_in(self.groups - 1):
            return
        rows = smallest * self.rows_per_unit
        whole = self.groups == 1
        raise ConfigError(
            f"batch_rows={self.batch_rows} is more than the "
            + (f"split's {rows} rows" if whole else f"{rows} rows of the last group ({smallest} units)"),
            expected=f"at most {rows // self.lanes * self.lanes}",
            got=self.batch_rows,
            fix="Lower batch_rows"
            + ("" if whole else f", or change group_units so that it divides {len(self.units)}"),
        )

    # Sizes

    @property
    def rows_per_unit(self) -> int:
        """Rows R in a unit."""
        return self.rows_per_slice * SLICES

    @property
    def lane_slices(self) -> int:
        """Slices of a unit that one lane owns."""
        return SLICES // self.lanes

    @property
    def lane_unit_rows(self) -> int:
        """Rows of a unit that one lane owns."""
        return self.rows_per_slice * self.lane_slices

    @property
    def lane_batch(self) -> int:
        """Rows that one lane contributes per step, B/G."""
        return self.batch_rows // self.lanes

    @property
    def groups(self) -> int:
        """Groups in an epoch."""
        return -(-len(self.units) // self.group_units)

    def units_in(self, group: int) -> int:
        """Units in a group of the epoch: U, or what remains for the last one."""
        return min(self.group_units, len(self.units) - group * self.group_units)

    def steps_in(self, group: int) -> int:
        """Steps in a group of the epoch."""
        return self.units_in(group) * self.lane_unit_rows // self.lane_batch

    @property
    def steps_per_epoch(self) -> int:
        """Steps in every epoch: all epochs have the same group sizes."""
        return (self.groups - 1) * self.steps_in(0) + self.steps_in(self.groups - 1)

    @property
    def rows_per_epoch(self) -> int:
        """Rows yielded in an epoch."""
        return self.steps_per_epoch * self.batch_rows

    @property
    def dropped_rows(self) -> int:
        """Rows of the split that an epoch omits: the tails of its groups (other rows in each epoch)."""
        return len(self.units) * self.rows_per_unit - self.rows_per_epoch

    # From a step to rows

    def locate(self, step: int) -> Place:
        """Find epoch, group and step in the group of a step counted over all epochs, in constant time."""
        if step < 0:
            raise ConfigError("step", expected="0 or more", got=step)
        epoch, rest = divmod(step, self.steps_per_epoch)
        # All groups but the last have the same number of steps: a division finds the group, without a table.
        group = min(rest // self.steps_in(0), self.groups - 1)
        return Place(epoch, group, rest - group * self.steps_in(0))

    def first_step(self, epoch: int, group: int) -> int:
        """The first step of a group, counted over all epochs."""
        return epoch * self.steps_per_epoch + group * self.steps_in(0)

    def units_of(self, epoch: int, group: int) -> tuple[int, ...]:
        """Unit numbers of a group, in the order its lanes count them."""
        first = group * self.group_units
        stop = first + self.units_in(group)
        # In plan order, so that a trainer can follow a harvest, which works in that order.
        if epoch == 0:
            return tuple(self.units[first:stop])
        key = ("winnow.units.v2", self.seed, epoch)
        return tuple(self.units[shuffled(i, len(self.units), *key)] for i in range(first, stop))

    def lane_turns(self, epoch: int, group: int, lanes: range) -> list[NDArray[np.int64]]:
        """Per lane the rows [steps_in(group) * B/G] that it gives in a group; see `lane_permutation`."""
        length = self.steps_in(group) * self.lane_batch
        # The rest is the group's tail, which is dropped.
        return list(self.lane_permutations(epoch, group, lanes)[:, :length])

    def lane_permutation(self, epoch: int, group: int, lane: int) -> NDArray[np.int64]:
        """[units_in(group) * lane_unit_rows] row of the lane at each turn.

        Lane row r is row `r % lane_unit_rows` of the lane's share of the group's unit `r // lane_unit_rows`.
        """
        return self.lane_permutations(epoch, group, range(lane, lane + 1))[0]

    def lane_permutations(self, epoch: int, group: int, lanes: range) -> NDArray[np.int64]:
        """[lanes, ...] `lane_permutation` of some lanes."""
        length = self.units_in(group) * self.lane_unit_rows
        keys = [("winnow.lanes.v1", self.seed, epoch, lane, group) for lane in lanes]
        return keyed_permutations(length, keys)

    def lanes_of(self, rank: int, world: int) -> range:
        """Lanes that a rank owns.

        Raises:
            ConfigError: `world` does not divide the lanes, or there is no such rank.
        """
        if world < 1 or self.lanes % world:
            raise ConfigError(
                "world",
                expected=f"a divisor of lanes ({self.lanes})",
                got=world,
                fix="Start another number of ranks",
            )
        if not 0 <= rank < world:
            raise ConfigError("rank", expected=f"0 to {world - 1}", got=rank)
        share = self.lanes // world
        return range(rank * share, (rank + 1) * share)

    def rows_at(self, step: int, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
        """[B/world] dataset rows of a rank's batch, in batch order: the specification of a stream."""
        # Shuffles the whole group for one step; a stream keeps the shuffle instead.
        place = self.locate(step)
        units = np.asarray(self.units_of(place.epoch, place.group), dtype=np.int64)
        turn = slice(place.step_in_group * self.lane_batch, (place.step_in_group + 1) * self.lane_batch)
        parts: list[NDArray[np.int64]] = []
        for lane in self.lanes_of(rank, world):
            chosen = self.lane_turns(place.epoch, place.group, range(lane, lane + 1))[0][turn]
            unit, row = np.divmod(chosen, self.lane_unit_rows)
            parts.append(units[unit] * self.rows_per_unit + lane * self.lane_unit_rows + row)
        return np.concatenate(parts)

    # Mixing

    @property
    def same_window(self) -> float:
        """Probability that two rows of a batch share a window."""
        # 1/(u * W) inside a group of u units; the mean over all rows is this. Measured: 0.984 of it.
        return self.groups / (len(self.units) * self.windows_per_unit)

    @property
    def excess(self) -> float:
        """`same_window` beyond that of a uniform shuffle of the whole split, 1/(all units * W)."""
        # Not 1/(U*W), which compares with an endless corpus: if the split is one group, every batch is a
        # uniform draw from the split and the excess is 0. With many groups the two agree. A shorter last
        # group mixes worse than the others and enters by its share of rows.
        return (self.groups - 1) / (len(self.units) * self.windows_per_unit)

    @property
    def design_effect(self) -> float:
        """Variance of a batch's mean over that of B independent draws: 1 + (B-1) * 0.1 * excess."""
        return 1 + (self.batch_rows - 1) * _WINDOW_CORRELATION * self.excess

    @property
    def group_units_needed(self) -> int:
        """The smallest U whose design effect is at most `LARGEST_DESIGN_EFFECT`."""
        # The product with 1e-9 more: rounding must not ask for one unit more than `design_effect` does.
        allowed = (LARGEST_DESIGN_EFFECT - 1) / (max(self.batch_rows - 1, 1) * _WINDOW_CORRELATION)
        most_groups = 1 + int(allowed * len(self.units) * self.windows_per_unit * (1 + 1e-9))
        return -(-len(self.units) // most_groups)

    def state(self, plan_fingerprint: str, split: str, hooks: Sequence[str], step: int) -> StreamState:
        """Position of a stream of this order before `step`."""
        return StreamState(
            plan_fingerprint=plan_fingerprint,
            split=split,
            hooks=tuple(hooks),
            algorithm=_ALGORITHM,
            seed=self.seed,
            lanes=self.lanes,
            group_units=self.group_units,
            batch_rows=self.batch_rows,
            step=step,
        )


def group_units_for(budget_bytes: int, *, unit_bytes: int, units: int) -> int:
    """Choose the units U of a group by a byte budget, with groups as equal as possible.

    Args:
        budget_bytes: Memory for one group over all ranks; double buffering takes twice that.
        unit_bytes: A unit's rows of every hook that is read, in bytes.
        units: Units in the split.

    Returns:
        At least 1, at most `units`: of 22 units with room for 16, 11 (two groups of 11).
    """
    room = min(max(budget_bytes // unit_bytes, 1), units)
    # Equal groups rather than full ones: a short last group mixes worse than the others.
    groups = -(-units // room)
    return -(-units // groups)


def shuffled(number: int, length: int, *key: object) -> int:
    """Map `number` by a permutation of `range(length)` that `key` fixes, in constant time and memory."""
    # A balanced Feistel network of six keyed hashes permutes the next power of four. A result out of range is
    # mapped again until it is inside, which keeps it a permutation: on average at most four times.
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask, secret = (1 << half) - 1, philox_key(*key).to_bytes(16, "little")
    while True:
        left, right = number >> half, number & mask
        for turn in range(6):
            mixed = blake2b(right.to_bytes(8, "little"), digest_size=8, key=secret, salt=bytes([turn]))
            left, right = right, left ^ (int.from_bytes(mixed.digest(), "little") & mask)
        number = left << half | right
        if number < length:
            return number
