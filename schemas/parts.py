"""The parts of a crosscoder: the hooks, of one or several subjects, that it reads and reconstructs."""

from __future__ import annotations

from winnow.schemas.errors import ConfigError
from winnow.schemas.fit import mismatch
from winnow.schemas.joined import split_hook
from winnow.schemas.training import SaeCard


def part_names(card: SaeCard) -> list[str]:
    """Name the parts of a crosscoder for ids: by dataset if each has one hook, otherwise by hook.

    Other SAEs have none.
    """
    if not card.with_hooks:
        return []
    hooks = card.input_hooks
    roots = [hook.rpartition("/")[0] for hook in hooks]
    if len(set(roots)) == len(hooks):
        return roots
    return [hook.replace("/", "_").replace(".", "_").lower() for hook in hooks]


def part_number(card: SaeCard, part: str) -> int:
    """Find a part by its name, or by its hook as the card has it.

    Raises:
        ConfigError: The SAE has no such part.
    """
    names, hooks = part_names(card), list(card.input_hooks)
    for known in (names, hooks):
        if names and part in known:
            return known.index(part)
    expected = " or ".join(names) if names else "none: the SAE is no crosscoder"
    raise ConfigError("part", expected=expected, got=part or "none")


def part_at(card: SaeCard, part: str, hook: str, weights_sha256: str | None = None) -> int:
    """Find the part of a crosscoder that is meant at a hook of a subject.

    Args:
        card: A crosscoder's card.
        part: Its name or hook; empty if hook and subject say which one.
        hook: The hook, as the subject names it.
        weights_sha256: Digest of the subject's weights; None if the subject is not known.

    Raises:
        ConfigError: The crosscoder does not read the hook, or several parts are meant.
        SaeMismatch: The part is of another subject.
    """
    names = part_names(card)
    numbers = [part_number(card, part)] if part else range(len(names))
    here = [at for at in numbers if split_hook(card.input_hooks[at])[1] == hook]
    if not here:
        read = ", ".join(f"{name} ({card.input_hooks[at]})" for at, name in enumerate(names))
        raise ConfigError(f"the part at {hook}", expected=f"one of {read}", got=part or hook)
    # Of parts without a digest, such as an import's, nothing says whose they are: they are taken.
    digests = {at: _weights(card, at) for at in here}
    fitting = [at for at in here if None in (weights_sha256, digests[at]) or digests[at] == weights_sha256]
    if not fitting:
        raise mismatch(
            "subject",
            f"the part {', '.join(names[at] for at in here)}",
            expected=weights_sha256,
            of="the loaded subject",
            got=", ".join(str(digests[at]) for at in here),
            fix="Load the subject of the part that is meant",
        )
    if len(fitting) > 1:
        meant = " or ".join(names[at] for at in fitting)
        raise ConfigError(f"the part at {hook}", expected=meant, got="none", fix="Name it, as `part`")
    return fitting[0]


def _weights(card: SaeCard, number: int) -> str | None:
    """Digest of the weights of a part's subject; None if the card does not say."""
    if card.identity is None:
        return None
    root = split_hook(card.input_hooks[number])[0]
    own = card.identity.roots.get(root) if root else card.identity
    return own.subject_weights_sha256 if own else None
