"""Contracts between the stages: pydantic models and the standard library only."""

from winnow.schemas.names import check

check()
