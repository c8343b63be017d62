"""The page of the Python API: directives that mkdocstrings replaces by signatures and docstrings."""

from __future__ import annotations

import winnow

INTRODUCTION = """# Python API

The front door holds the names that most programs need:

```python
from winnow import ActivationStore, Sae, Subject, TranscoderSet
from winnow import evaluate, load_config, reporting, train
```

`winnow.__version__` is the version. A name is imported when it is first used, so `import winnow` is quick.
Everything else has its place in a room, and is imported by that. This page is generated from the program.
"""
ROOMS = {
    "Circuits": (
        "winnow.evaluator.circuits.tracing.trace",
        "winnow.evaluator.circuits.editing.edit",
        "winnow.evaluator.circuits.editing.Edit",
        "winnow.evaluator.circuits.faithful.faithfulness",
        "winnow.evaluator.circuits.quality.set_quality",
        "winnow.evaluator.circuits.fitting.set_digest",
        "winnow.evaluator.circuits.graph.Graph",
    ),
    "Training many": ("winnow.trainer.run.loop.train_fleet",),
    "Other libraries' files": (
        "winnow.sae.formats.convert.import_sae",
        "winnow.sae.formats.convert.export_sae",
        "winnow.sae.formats.plain.Plain",
        "winnow.sae.formats.sets.import_set",
        "winnow.sae.formats.sets.export_set",
    ),
    "Activations": (
        "winnow.sae.activations.base.Activation",
        "winnow.sae.activations.base.DenseCodes",
        "winnow.sae.activations.activation_of",
        "winnow.schemas.activations.Traits",
    ),
    "Metrics": (
        "winnow.evaluator.setting.Setting",
        "winnow.evaluator.setting.Measured",
        "winnow.schemas.evaluation.Figure",
        "winnow.schemas.evaluation.Evaluation",
    ),
    "Object storage": (
        "winnow.store.objects.open.open_store",
        "winnow.store.objects.base.ObjectStore",
        "winnow.store.testing.conformance.StoreConformance",
    ),
    "Errors": ("winnow.schemas.errors.WinnowError",),
}
"""Heading -> names beyond the front door, each by the module that defines it."""


def names() -> dict[str, str]:
    """Return the names of the front door, each with the place that defines it."""
    # From the table of places: asking for the names themselves would import torch.
    return {name: f"{winnow._PLACES[name]}.{name}" for name in winnow.__all__ if name != "__version__"}


def page() -> str:
    """Write the page of all public names."""
    parts = [INTRODUCTION, "## The front door { #front-door }"]
    parts += [_directive(place, f"winnow.{name}") for name, place in names().items()]
    for title, places in ROOMS.items():
        parts += [f"## {title}", *map(_directive, places)]
    return "\n\n".join(parts) + "\n"


def _directive(place: str, heading: str | None = None) -> str:
    said = f'\n      heading: "{heading}"' if heading else ""
    return f"::: {place}\n    options:\n      heading_level: 3{said}"
