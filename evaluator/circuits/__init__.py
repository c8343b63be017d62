"""Circuits: which latents of a transcoder set make a subject say what it says, and whether that is so.

`trace` makes an attribution graph of a prompt, `edit` changes latents in the subject and compares what
happens with what the graph foretells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.common.lazy import lazy_getattr

if TYPE_CHECKING:
    from winnow.evaluator.circuits.editing import Edit as Edit
    from winnow.evaluator.circuits.editing import edit as edit
    from winnow.evaluator.circuits.faithful import faithfulness as faithfulness
    from winnow.evaluator.circuits.fitting import set_digest as set_digest
    from winnow.evaluator.circuits.graph import Graph as Graph
    from winnow.evaluator.circuits.quality import set_quality as set_quality
    from winnow.evaluator.circuits.tracing import trace as trace

__all__ = ["Edit", "Graph", "edit", "faithfulness", "set_digest", "set_quality", "trace"]

__getattr__ = lazy_getattr(
    __name__,
    {
        "Edit": "winnow.evaluator.circuits.editing",
        "Graph": "winnow.evaluator.circuits.graph",
        "edit": "winnow.evaluator.circuits.editing",
        "faithfulness": "winnow.evaluator.circuits.faithful",
        "set_digest": "winnow.evaluator.circuits.fitting",
        "set_quality": "winnow.evaluator.circuits.quality",
        "trace": "winnow.evaluator.circuits.tracing",
    },
)
