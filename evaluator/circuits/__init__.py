"""Circuits: which latents of a transcoder set make a subject say what it says, and whether that is so.

`trace` makes an attribution graph of a prompt, `edit` changes latents in the subject and compares what
happens with what the graph foretells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.common.lazy import lazy_getattr

if TYPE_CHECKING:
    from winnow.evaluator.circuits.graph import Graph as Graph
    from winnow.evaluator.circuits.tracing import trace as trace

__all__ = ["Graph", "trace"]

__getattr__ = lazy_getattr(
    __name__,
    {"Graph": "winnow.evaluator.circuits.graph", "trace": "winnow.evaluator.circuits.tracing"},
)
