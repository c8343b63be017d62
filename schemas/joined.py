"""Several aligned datasets as one: their hooks are `NAME/HOOK`, and row i is the same token in each."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from winnow.schemas.base import canonical_json, sha256_hex
from winnow.schemas.errors import ConfigError, PlanMismatch
from winnow.schemas.harvest import HarvestPlan
from winnow.schemas.subject import HookSite

_ALIGNED = ("windows_per_unit", "context_length", "drop_leading", "seed", "validation_units")
"""Fields of `PlanSpec` that decide which token a row number stands for, beside the tokens themselves."""


def split_hook(hook: str) -> tuple[str, str]:
    """Split `"base/resid_post.9"` into `("base", "resid_post.9")`; the name is empty if there is none."""
    name, _, own = hook.rpartition("/")
    return name, own


def hooks_by_root(hooks: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The datasets that some hooks name -> each one's own hooks, in their order."""
    found: dict[str, tuple[str, ...]] = {}
    for name, own in map(split_hook, hooks):
        found[name] = (*found.get(name, ()), own)
    return found


class JoinedPlan(HarvestPlan):
    """The plans of aligned datasets as one plan, which is never stored. `JoinedPlan.of` makes one.

    `subject` stands for all subjects together: its name and digests are those of them all. What a single
    dataset decides, such as the dtype on disk, is that of the first and only to be asked of `parts`.
    """

    parts: dict[str, HarvestPlan]
    """Name -> the dataset's own plan, in the order of the names."""

    @classmethod
    def of(cls, parts: Mapping[str, HarvestPlan]) -> JoinedPlan:
        """Join plans.

        Raises:
            PlanMismatch: They are not aligned; the first difference is named.
        """
        parts = {name: parts[name] for name in sorted(parts)}
        first, *others = parts
        for other in others:
            if (found := difference(parts[first], parts[other])) is not None:
                raise not_aligned(first, other, *found)
        # A name with a slash is no hook of a stored plan, so these are made without validation.
        sites = tuple(
            HookSite.model_construct(name=f"{name}/{site.name}", d_model=site.d_model)
            for name, plan in parts.items()
            for site in plan.sites
        )
        own = parts[first]
        subjects = {name: plan.subject.weights_sha256 for name, plan in parts.items()}
        together = {
            "model": "; ".join(f"{name}: {plan.subject.model}" for name, plan in parts.items()),
            "revision": None,
            "weights_sha256": sha256_hex(canonical_json(subjects)),
        }
        fields: dict[str, Any] = {name: getattr(own, name) for name in HarvestPlan.model_fields} | {
            "subject": own.subject.model_copy(update=together),
            "spec": own.spec.model_copy(update={"hooks": tuple(site.name for site in sites)}),
            "sites": sites,
            "parts": parts,
        }
        return cls.model_construct(**fields)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of every part's name and fingerprint."""
        return sha256_hex(canonical_json({name: plan.fingerprint for name, plan in self.parts.items()}))

    def part_of(self, hook: str) -> tuple[HarvestPlan, str]:
        """Find the plan that a hook belongs to, and the hook's name there; ConfigError if there is none."""
        name, own = split_hook(hook)
        if name not in self.parts:
            known = ", ".join(self.spec.hooks)
            raise ConfigError(f"hook {hook!r}", expected=f"one of {known}", got=hook)
        return self.parts[name], own

    def d_model(self, hook: str) -> int:
        """Return the width D at `hook`; raise ConfigError if no part has such a hook."""
        plan, own = self.part_of(hook)
        return plan.d_model(own)

    def stored_width(self, hook: str) -> int:
        """Return the numbers on disk per row of `hook`."""
        plan, own = self.part_of(hook)
        return plan.stored_width(own)

    def shard_bytes(self, hook: str) -> int:
        """Return the size of one uncompressed shard of `hook` in bytes."""
        plan, own = self.part_of(hook)
        return plan.shard_bytes(own)


def difference(one: HarvestPlan, two: HarvestPlan) -> tuple[str, object, object] | None:
    """Find the first field by which row i is another token in `two`: its name and both values, or None."""
    facts = [(f"plan.{name}", getattr(one.spec, name), getattr(two.spec, name)) for name in _ALIGNED]
    facts += [("units", one.units, two.units), ("tokens_sha256", one.tokens_sha256, two.tokens_sha256)]
    return next((fact for fact in facts if fact[1] != fact[2]), None)


def not_aligned(first: str, other: str, field: str, expected: object, got: object) -> PlanMismatch:
    """Make the error of two datasets whose rows are not those of the same tokens."""
    return PlanMismatch(
        f"the datasets {first} and {other} of train.roots are not aligned: {field}",
        expected=f"{expected}, as in {first}",
        got=got,
        fix="Harvest one on the other's windows (plan.tokens_from)",
    )
