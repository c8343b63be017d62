"""A grid of SAEs: its specs and their folders' names. Without torch: the list of jobs names them too."""

from __future__ import annotations

import itertools
import re
from typing import Any

from winnow.schemas.base import nearest, validate
from winnow.schemas.config import Config, section
from winnow.schemas.errors import ConfigError
from winnow.schemas.training import TrainSpec


def grid_specs(config: Config) -> list[TrainSpec]:
    """The specs of the config's sweep, in the order of the grid, each with its own `out`.

    Raises:
        ConfigError: A field that `train` lacks, or `out`; a value that does not fit its field; two
            combinations with the same name or the same values; or no combination.
    """
    base, sweep = section(config.train, "train"), section(config.sweep, "sweep")
    for field, values in sweep.grid.items():
        if field not in TrainSpec.model_fields or field == "out":
            known = [name for name in TrainSpec.model_fields if name != "out"]
            expected = f"fields of train ({', '.join(known)})"
            raise ConfigError("sweep.grid", expected=expected, got=f"{field!r}{nearest(field, known)}")
        if not values or len(set(map(repr, values))) < len(values):
            raise ConfigError(f"sweep.grid.{field}", expected="one or more values, each once", got=values)
    # a seed also orders the stream; with one order for all, SAEs that differ in seed share one read
    fixed: dict[str, Any] = {"order_seed": base.stream_seed} if "seed" in sweep.grid else {}
    specs, names = dict[str, TrainSpec](), dict[str, str]()
    for values in itertools.product(*sweep.grid.values()):
        chosen = {**fixed, **dict(zip(sweep.grid, values, strict=True))}
        fields = {**base.model_dump(), **chosen}
        # a grid over K and N has impossible corners, which are left out and are no error
        k, latents = fields["k"], fields["latents"]
        if isinstance(k, int) and isinstance(latents, int) and k > latents:
            continue
        name = _folder_name(dict(zip(sweep.grid, values, strict=True)))
        fields["out"] = f"{sweep.out.rstrip('/')}/{name}"
        # `_folder_name` replaces characters, so two values can come out the same
        if name in specs:
            raise ConfigError("sweep.grid", expected="combinations of different names", got=name)
        specs[name] = validate(TrainSpec, fields, origin=f"sweep.grid at {name}")
        # `3` and `3.0`, or `1e-3` and text that spells it, have different names and are the same value.
        trained = specs[name].model_dump_json(exclude={"out"})
        if trained in names:
            got = f"{names[trained]} and {name}, which are the same"
            raise ConfigError("sweep.grid", expected="combinations that differ", got=got)
        names[trained] = name
    if not specs:
        raise ConfigError("sweep.grid", expected="a combination with k at most latents", got="none")
    return list(specs.values())


def _folder_name(values: dict[str, Any]) -> str:
    """`latents-512_k-8`: fields and values, in characters that every storage accepts."""
    return "_".join(
        f"{field}-{re.sub('[^A-Za-z0-9._-]+', '-', str(value))}" for field, value in values.items()
    )
