"""How a dataset's windows of text begin: a rule that travels with everything made from the dataset."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from winnow.schemas.base import Contract
from winnow.schemas.harvest import HarvestPlan


class WindowRule(Contract):
    """How text becomes a window, for whatever runs other text beside a dataset: index, card, tool, export."""

    bos: bool = False
    """Whether the BOS token precedes the text."""
    bos_token: int | None = Field(default=None, ge=0)
    """Id of that token; null takes the one of the subject's tokenizer."""
    control_tokens: Literal["text", "token"] = "text"
    """How the spelling of a special token in the text is read: as `text` like any other, or as that
    `token`."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if self.bos_token is not None and not self.bos:
            raise ValueError("bos_token needs bos: true")
        return self

    @classmethod
    def of(cls, plan: HarvestPlan) -> Self:
        """Make the rule by which a dataset's windows were cut."""
        # A plan knows more values than the two here: only "token" is one, whatever an older plan says.
        begins, control = plan.bos_token, plan.spec.control_tokens
        return cls(
            bos=begins is not None,
            bos_token=begins,
            control_tokens="token" if control == "token" else "text",
        )

    @property
    def inside(self) -> WindowRule:
        """The rule for text that does not stand at the beginning of a window: the same without BOS."""
        # BOS occurs once, at the beginning of a window.
        return WindowRule(control_tokens=self.control_tokens)

    @property
    def words(self) -> str:
        """How a window begins, in words."""
        return "windows begin with BOS" if self.bos else "windows begin with text"
