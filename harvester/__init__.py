"""From text to activations: corpus, plan, subject model, harvest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from winnow.subject.load import Subject as Subject

__all__ = ["Subject"]


def __getattr__(name: str) -> Any:  # importing the package alone must not load torch
    if name == "Subject":
        from winnow.subject.load import Subject

        return Subject
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
