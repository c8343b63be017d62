"""How torch says that it found no memory."""

from __future__ import annotations


def out_of_memory(error: BaseException) -> bool:
    """Whether torch found no memory for a tensor, on a GPU or on the CPU."""
    # On a CPU it raises a plain RuntimeError, which only its message tells from others. By the name on a GPU:
    # commands ask too, and need not have loaded torch.
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator" in str(error)
    )
