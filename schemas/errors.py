"""Every error Winnow raises on purpose, in one hierarchy.

::

    WinnowError
    ├── ConfigError (ValueError)           the user's input is wrong                      exit 2
    │   ├── PlanMismatch                   the root holds a different plan                exit 2
    │   └── SaeMismatch                    the SAE does not fit what it is used with      exit 2
    ├── UnsupportedVersion (ValueError)    an artefact of a version this code can't read  exit 2
    ├── DependencyMissing (ImportError)    an optional package is asked for and absent    exit 2
    ├── StoreError (OSError)               storage unreachable, refusing or full          exit 2
    │   ├── MissingObject (FileNotFoundError)  an object that must be there is not        exit 1
    │   └── CommitUnknown                  a commit neither confirmed nor denied          exit 1
    ├── IntegrityError (ValueError)        bytes differ from what was promised            exit 1
    ├── NonFiniteError (ValueError)        NaN or infinity where numbers must be finite   exit 2
    ├── EndpointError (OSError)            a language model behind HTTP does not answer   exit 1
    └── WorkerError (RuntimeError)         a worker died or gave up                       exit 1

A message names the field or object, what was expected, what was found and what to do. Every class also
inherits the builtin that a caller without Winnow's hierarchy would catch.
"""

from __future__ import annotations

from typing import ClassVar, Literal

# Messages once named extras of `winnow`, which would have installed somebody else's package.
DISTRIBUTION = "winnow-sae"
"""Winnow's name on the package index, on which `winnow` is another project."""
Extra = Literal["engine", "tensorboard", "wandb", "zstd"]
"""Extras of `DISTRIBUTION` that a message may tell a user to install."""


class WinnowError(Exception):
    """Base of all errors raised on purpose.

    Args:
        what: The field or object and what is wrong with it.
        expected: What would have been right.
        got: What was found.
        fix: What the reader can do about it, as an imperative sentence.
    """

    exit_code: ClassVar[int] = 1
    """Exit code of a command that ends with this error, as in the module's table."""

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.expected, self.got, self.fix = what, expected, got, fix
        parts = [what.rstrip(".")]
        if expected is not None:
            parts.append(f"expected {expected}")
        if got is not None:
            # Often a message that ends its own sentence.
            parts.append(f"got {str(got).removesuffix('.')}")
        message = ": ".join(parts[:1]) + (": " + ", ".join(parts[1:]) if parts[1:] else "") + "."
        if fix:
            message += f" {fix.rstrip('.')}."
        super().__init__(message)

    # Exceptions pickle by their positional arguments alone, so without this an error that Ray carries between
    # processes would lose its keyword fields: `expected`, `got` and `fix`.
    def __reduce__(self):
        return _rebuild, (type(self), self.what, self.expected, self.got, self.fix)


def _rebuild(
    kind: type[WinnowError], what: str, expected: object, got: object, fix: str | None
) -> WinnowError:
    return kind(what, expected=expected, got=got, fix=fix)


class ConfigError(WinnowError, ValueError):
    """The user's input (config, flag, corpus, hook name) is wrong."""

    exit_code = 2


class PlanMismatch(ConfigError):
    """The root already holds a plan that differs from the one asked for."""


class SaeMismatch(ConfigError):
    """The SAE does not fit the dataset, SAE or subject that it is used with. Raised by `schemas.fit`."""


class Unmeasurable(ConfigError):
    """A family of figures has nothing to measure in this data; other families may have."""


class UnsupportedVersion(WinnowError, ValueError):
    """An artefact of a kind or major version this code does not read."""

    exit_code = 2


class DependencyMissing(WinnowError, ImportError):
    """An optional dependency is needed and not installed."""

    exit_code = 2


def install_command(extra: Extra) -> str:
    """Return the command that installs one of Winnow's extras, for the `fix` of a `DependencyMissing`."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


class StoreError(WinnowError, OSError):
    """Storage is unreachable, refuses the credentials, breaks its promises, or is full."""

    exit_code = 2


class MissingObject(StoreError, FileNotFoundError):
    """An object that must exist does not."""

    exit_code = 1


class ConditionFailed(StoreError):
    """An object was not replaced: it changed meanwhile, or the server fails every condition."""


class NoSae(MissingObject):
    """The folder or URI that was named holds no SAE, or no transcoder set: another name is the remedy."""

    exit_code = 2


class CommitUnknown(StoreError):
    """A commit could be neither confirmed nor ruled out. Nothing was deleted; the next run settles it."""

    # Not 2, as for other storage errors: the same command, unchanged, is the remedy.
    exit_code = 1


class IntegrityError(WinnowError, ValueError):
    """Bytes differ from the digest, length or shape that was recorded for them."""


class NonFiniteError(WinnowError, ValueError):
    """NaN or infinity where every number must be finite."""

    exit_code = 2


class EndpointError(WinnowError, OSError):
    """A language model behind HTTP cannot be reached, stays busy, or gives no valid answer."""


class WorkerError(WinnowError, RuntimeError):
    """A worker died or failed more often than is allowed."""
