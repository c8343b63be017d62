"""Contracts between the stages: pydantic models and the standard library only."""
