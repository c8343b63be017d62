"""A part of a harvest: the units that one job of several makes, as in a job array.

Parts need no leases and no messages between them: each unit belongs to one part, and a receipt is
create-only in any case.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError
from winnow.schemas.harvest import HarvestPlan


@dataclass(frozen=True)
class Part:
    """Part `index` of `count` equal ones."""

    index: int
    """From 0."""
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """`3/8` -> the fourth of eight parts.

        Raises:
            ConfigError: Anything else, or an index that is not below the count.
        """
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
        index, count = map(int, found.groups()) if found else (0, 0)
        if index >= count:
            raise ConfigError("--part", expected="I/N with I from 0 to N - 1, such as 0/8", got=repr(text))
        return cls(index, count)

    def units(self, plan: HarvestPlan) -> range:
        """Its units: every `count`-th, so that held-out units are spread over the parts as well."""
        return range(self.index, plan.units, self.count)


ALL = Part(0, 1)
"""The part that is the whole harvest."""


def check_part(config: Config) -> None:
    """Check that nothing in a config counts on one harvest that makes all units.

    Raises:
        ConfigError: It does.
    """
    if config.harvest.follow is not None:
        raise ConfigError(
            "harvest.follow with --part",
            expected="one of the two: a part does not see what the others have written",
            fix="Leave --part out, or harvest.follow",
        )
    if config.storage.single_writer:
        raise ConfigError(
            "storage.single_writer with --part",
            expected="one of the two: parts are several writers",
            fix="Use a store that honours if-none-match for a harvest in parts",
        )
