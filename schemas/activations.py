"""What a spec must know of an activation before any weight exists; the code is in `sae.activations`.

Winnow's own are in a table, so that reading a spec imports no torch. Any other name is looked up as a module
of that package, whose `ACTIVATION.traits` apply: a new activation is one file.
"""

from __future__ import annotations

import importlib
import re
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator

ROOM = "winnow.sae.activations"


class Traits(NamedTuple):
    """Facts of an activation."""

    name: str
    selects: Literal["row", "batch"] | None = None
    """Whether it keeps the K largest of each row, or K per row on average over a batch; then it has the
    sparse route. None if a latent is active regardless of the others, so that codes are dense."""
    threshold: Literal["one", "each"] | None = None
    """What else an SAE holds for it: one number that is set after training, or a trained one per latent."""


OWN = {
    traits.name: traits
    for traits in (
        Traits("topk", selects="row"),
        Traits("batchtopk", selects="batch", threshold="one"),
        Traits("relu"),
        Traits("jumprelu", threshold="each"),
    )
}


def traits_of(name: str) -> Traits:
    """Return the traits of an activation; ValueError if there is none of that name."""
    if name in OWN:
        return OWN[name]
    module = f"{ROOM}.{name}"
    # The pattern first: the name may come from a card of anybody's, and must not reach outside the package.
    if re.fullmatch(r"[a-z][a-z0-9_]*", name):
        try:
            return importlib.import_module(module).ACTIVATION.traits
        except ModuleNotFoundError as error:
            if error.name != module:  # the activation's own file lacks something
                raise
        except AttributeError:  # a module of the package that is no activation
            pass
    raise ValueError(f"activation is one of {', '.join(sorted(OWN))}, or a module of {ROOM}")


def _known(name: str) -> str:
    return traits_of(name).name


Activation = Annotated[str, AfterValidator(_known)]
