"""The time, as written into records."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> str:
    """Return the time in UTC, ISO 8601 to the second."""
    # For provenance only: clocks may be wrong, and no order or liveness is judged by it.
    return datetime.now(UTC).isoformat(timespec="seconds")
