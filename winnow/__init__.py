"""From a language model's activations to sparse, readable features.

The names below are what most programs need. The rooms hold the rest, and are imported by their names
(`import winnow.store`, `from winnow.trainer.run.loop import train_fleet`)::

    from winnow import ActivationStore, Latents, Sae, Subject, TranscoderSet
    from winnow import evaluate, harvest, index, load_config, reporting, train
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnow.common.config_file import load_config as load_config
    from winnow.common.reporter import reporting as reporting
    from winnow.evaluator.report import evaluate as evaluate
    from winnow.explorer.latents import Latents as Latents
    from winnow.explorer.latents import index as index
    from winnow.harvester.run.start import harvest as harvest
    from winnow.sae.model import Sae as Sae
    from winnow.sae.sets import TranscoderSet as TranscoderSet
    from winnow.store.read.reader import ActivationStore as ActivationStore
    from winnow.subject.load import Subject as Subject
    from winnow.trainer.run.loop import train as train

    __version__: str

_PLACES = {
    "ActivationStore": "winnow.store.read.reader",
    "Latents": "winnow.explorer.latents",
    "Sae": "winnow.sae.model",
    "Subject": "winnow.subject.load",
    "TranscoderSet": "winnow.sae.sets",
    "evaluate": "winnow.evaluator.report",
    "harvest": "winnow.harvester.run.start",
    "index": "winnow.explorer.latents",
    "load_config": "winnow.common.config_file",
    "reporting": "winnow.common.reporter",
    "train": "winnow.trainer.run.loop",
}
__all__ = [  # pyright: ignore[reportUnsupportedDunderAll]
    "ActivationStore",
    "Latents",
    "Sae",
    "Subject",
    "TranscoderSet",
    "__version__",
    "evaluate",
    "harvest",
    "index",
    "load_config",
    "reporting",
    "train",
]


# A name is imported when it is first asked for: torch, transformers and Ray together take about 7 s of CPU,
# and a program that only reads a dataset needs none of them.
def __getattr__(name: str) -> Any:
    if name == "__version__":
        found = _version()
    elif name in _PLACES:
        found = getattr(import_module(_PLACES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Kept, so that later accesses find it without this function.
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    # Without it completion in a notebook would offer only what was imported already.
    return __all__


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # takes twice as long as this module

    from winnow.schemas.errors import DISTRIBUTION

    try:
        return version(DISTRIBUTION)
    except PackageNotFoundError:  # a copy of the source on the path, as on the nodes of a Ray cluster
        return "0+unknown"
