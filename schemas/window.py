"""What a plan says of how a window of text begins: it travels with everything that is made of the dataset."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from winnow.schemas.base import Contract
from winnow.schemas.harvest import HarvestPlan


class WindowRule(Contract):
    """How text becomes a window, for whatever runs it beside a dataset: index, card, tool, export."""

    bos: bool = False
    """Whether BOS goes before the text."""
    bos_token: int | None = Field(default=None, ge=0)
    """Its id; null takes that of the subject's tokenizer."""
    control_tokens: Literal["text", "token"] = "text"
    """What a special token's spelling in the text is read as: `text` like any other, or that `token`."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.bos_token is not None and not self.bos:
            raise ValueError("bos_token stands beside bos: true only")
        return self

    @classmethod
    def of(cls, plan: HarvestPlan) -> Self:
        """What a dataset's windows are like."""
        begins, control = plan.bos_token, plan.spec.control_tokens
        return cls(
            bos=begins is not None,
            bos_token=begins,
            control_tokens="token" if control == "token" else "text",
        )

    @property
    def inside(self) -> WindowRule:
        """The same for text that stands further on in a window."""
        return WindowRule(control_tokens=self.control_tokens)

    @property
    def words(self) -> str:
        """How a window begins, for people."""
        return "windows begin with BOS" if self.bos else "windows begin with text"
