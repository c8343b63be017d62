"""Finds and opens the corpus's files: patterns to files, files to streams, through fsspec.

Credentials come from the usual environment of each protocol's client (for `s3://`: s3fs, which honours
`AWS_ENDPOINT_URL`); a URI that contains one is refused, since URIs are written into the plan.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape, has_magic
from pathlib import PurePosixPath
from typing import IO, Any, Literal, cast
from urllib.parse import unquote, urlsplit

import fsspec
from fsspec import AbstractFileSystem

from winnow.common.packages import is_package_uri, resolve_package
from winnow.schemas.corpus import CorpusSpec, SourceSpec
from winnow.schemas.errors import ConfigError, DependencyMissing, StoreError, WinnowError, install_command
from winnow.store.objects.s3 import s3_endpoint

BLOCK_BYTES = 8 * 2**20
"""Read-ahead of a remote file."""

FileFormat = Literal["txt", "jsonl", "parquet", "raw"]
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_FORMATS: dict[str, FileFormat] = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".bin": "raw",
}
_READ_AS: dict[str, tuple[FileFormat, ...]] = {
    "auto": ("txt", "jsonl", "parquet"),
    "chat": ("jsonl", "parquet"),
    "tokens": ("jsonl", "parquet", "raw"),
}
"""Formats of files, by the name, that a source's format takes."""
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_CLIENTS = ("botocore.", "aiobotocore.", "aiohttp.")
"""Modules whose errors, without a common base class, mean that remote storage failed."""
_LEAVES = ("file", "s3", "s3a")
"""Protocols that are not chained with another, so that names in them may contain `::`."""
_SIGNATURES = ("x-amz-signature", "x-amz-credential", "x-goog-signature", "sig=")


@dataclass(frozen=True)
class SourceFile:
    """One file of the corpus, and how to read it."""

    source: SourceSpec
    filesystem: AbstractFileSystem
    path: str
    """The file system's name of it."""
    size: int | None
    """Stored (compressed) bytes, if the file system tells them."""
    format: FileFormat
    compression: str | None
    number: int = 0
    """Number of its source in `corpus.sources`."""

    @property
    def name(self) -> str:
        """The path for messages, with its protocol unless it is local."""
        return self.path if _is_local(self.filesystem) else self.filesystem.unstrip_protocol(self.path)


def find_files(corpus: CorpusSpec, *, allow_http: bool = False) -> list[SourceFile]:
    """Every file of the corpus, in reading order: by source, then by path. Reads no data.

    Args:
        corpus: The corpus.
        allow_http: Permit an `http://` S3 endpoint beyond this machine's loopback, as `storage.allow_http`.

    Raises:
        ConfigError: A pattern without a match, a folder, a format that cannot be told, a URI that
            contains credentials, or a plain `http://` S3 endpoint beyond loopback.
        DependencyMissing: The protocol or the compression needs a package that is not installed.
        StoreError: The storage cannot be reached or refuses.
    """
    # s3fs sends credentials to whatever AWS_ENDPOINT_URL names; the store's rule for it applies here too.
    if any(source.uri.startswith(("s3://", "s3a://")) for source in corpus.sources):
        s3_endpoint(allow_http)
    return [file for number, source in enumerate(corpus.sources) for file in _files_of(source, number)]


@contextmanager
def open_file(file: SourceFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open `file`: (decompressed stream, raw stream); the raw one's `tell()` shows progress.

    Raises:
        ConfigError: The compressed stream is damaged or cut short.
        StoreError: Reading fails.
    """
    try:
        with file.filesystem.open(file.path, "rb", block_size=BLOCK_BYTES) as raw:
            with _decompress(raw, file) as stream:
                yield stream, cast(IO[bytes], raw)
    # The reader's own errors also come through here, since this is a context manager around it.
    except WinnowError:
        raise
    # Before OSError, of which gzip's error is a subclass: a damaged file is not storage that failed.
    except _DAMAGED as error:
        raise ConfigError(
            f"corpus file {file.name} is damaged",
            expected=f"a whole {file.compression} stream",
            got=str(error) or type(error).__name__,
            fix="Fetch or compress it again",
        ) from error
    except OSError as error:
        raise StoreError(f"corpus file {file.name} cannot be read", got=str(error)) from error
    except Exception as error:
        if not type(error).__module__.startswith(_CLIENTS):
            raise
        got = f"{type(error).__name__}: {error}"
        raise StoreError(f"corpus file {file.name} cannot be read", got=got) from error


def _files_of(source: SourceSpec, number: int) -> list[SourceFile]:
    _refuse_secrets(source.uri)
    if is_package_uri(source.uri):
        local = fsspec.filesystem("file")
        found = [(local, str(path), path.stat().st_size) for path in resolve_package(source.uri)]
    else:
        found = _match(source.uri)
    return [
        SourceFile(source, filesystem, path, size, *_kind(source, path), number)
        for filesystem, path, size in found
    ]


def _match(uri: str) -> list[tuple[AbstractFileSystem, str, int | None]]:
    try:
        filesystem, path = _filesystem(uri)
        # fsspec keeps instances and their listings for the whole process: a file added since would be missed.
        filesystem.invalidate_cache()
        found = _listed(filesystem, path)
        # A file:// URI may be percent-encoded or not; a file that is there under the name as written wins.
        if not found and uri.startswith("file://"):
            found = _listed(filesystem, unquote(path))
    except ImportError as error:
        protocol = uri.split("://", 1)[0]
        raise DependencyMissing(
            f"corpus source {uri!r} needs a package for {protocol}://", got=str(error), fix="Install it"
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"corpus source {uri!r}", expected="a path or an fsspec URI", got=str(error)
        ) from error
    except Exception as error:  # each protocol's client has errors of its own (no credentials, refused)
        raise StoreError(
            f"corpus source {uri!r} cannot be listed",
            got=f"{type(error).__name__}: {error}",
            fix="Check the address and the credentials in the environment",
        ) from error
    if not found:
        raise ConfigError(
            f"corpus source {uri!r} matches nothing",
            expected="at least one file",
            got="none",
            fix="Check corpus.sources (wildcards are *, ? and [...])"
            + ("" if "://" in uri else ": relative paths start at the working directory"),
        )
    for name, info in found.items():
        if info.get("type") == "directory":
            raise ConfigError(
                f"corpus source {uri!r}",
                expected="files",
                got=f"the folder {name}",
                fix=f"Give a pattern, such as {uri.rstrip('/')}/*.txt",
            )
    # Sorted, because the order of files is the order of documents, and listings come in any order.
    return [(filesystem, name, found[name].get("size")) for name in sorted(found)]


def _filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The file system of `uri`, and its name there."""
    scheme, found, _ = uri.partition("://")
    if found and scheme not in _LEAVES:
        return fsspec.url_to_fs(uri)
    # Not url_to_fs: it reads a name such as `a::b.txt` as a chain of protocols.
    kind: Any = fsspec.get_filesystem_class(scheme if found else "file")
    return kind(**kind._get_kwargs_from_urls(uri)), kind._strip_protocol(uri)


def _listed(filesystem: AbstractFileSystem, path: str) -> dict[str, dict[str, Any]]:
    """The file at `path`, or the files that match it as a pattern; empty if there is none.

    A part of the path that exists as it is written is not a pattern: `part[1].jsonl` names that file, and in
    `run[1]/*.txt` only the star is a wildcard.
    """
    parts = path.split("/")
    for at, part in enumerate(parts):
        if has_magic(part):
            if not filesystem.exists("/".join(parts[: at + 1])):
                break
            path = "/".join([*map(escape, parts[: at + 1]), *parts[at + 1 :]])
    else:
        try:
            name = "/".join(parts)
            return {name: filesystem.info(name)}
        except FileNotFoundError:
            return {}
    matches: dict[str, dict[str, Any]] = filesystem.glob(path, detail=True)  # pyright: ignore
    return {name: info for name, info in matches.items() if info.get("type") != "directory"}


def _kind(source: SourceSpec, path: str) -> tuple[FileFormat, str | None]:
    # By the name alone: reading the first bytes would be a request per file of a remote corpus.
    name = PurePosixPath(path.replace("\\", "/"))
    compression = _COMPRESSIONS.get(name.suffix.lower())
    if compression:
        name = name.with_suffix("")
    allowed = _READ_AS.get(source.format)
    kind = cast(FileFormat, source.format)
    if allowed is not None:
        kind = _FORMATS.get(name.suffix.lower())
    if kind is None or (allowed is not None and kind not in allowed):
        names = [suffix for suffix, kind in _FORMATS.items() if kind in (allowed or ())]
        raise ConfigError(
            f"corpus file {path}: its format cannot be told from its name",
            expected=f"one of {', '.join(names)} (and {', '.join(_COMPRESSIONS)})",
            got=repr(name.suffix),
            fix="Rename it"
            if source.format == "chat"
            else "Set the source's format to txt, jsonl or parquet",
        )
    # Parquet is read from its end, which a compressed stream does not allow.
    if kind == "parquet" and compression:
        raise ConfigError(
            f"corpus file {path}",
            expected="a plain Parquet file (it compresses inside)",
            got=compression,
            fix="Unpack it",
        )
    return kind, compression


def _refuse_secrets(uri: str) -> None:
    # What is no URL has no credentials in it; `_match` says what is wrong with it.
    try:
        parts = urlsplit(uri)
    except ValueError:
        return
    query = parts.query.lower()
    if (parts.scheme and "@" in parts.netloc) or any(sign in query for sign in _SIGNATURES):
        raise ConfigError(
            "corpus source: the URI contains credentials",
            expected="a URI without them, since the plan records it",
            got=f"{parts.scheme}:// with credentials",  # never the URI itself: messages end up in logs
            fix="Give the credentials in the environment",
        )


def _is_local(filesystem: AbstractFileSystem) -> bool:
    protocol = filesystem.protocol
    return "file" in ((protocol,) if isinstance(protocol, str) else protocol)


def _decompress(raw: Any, file: SourceFile) -> Any:
    if file.compression is None:
        return raw
    if not raw.read(1):
        raise EOFError("the file is empty")
    raw.seek(0)
    if file.compression == "gzip":
        return gzip.GzipFile(fileobj=raw)
    return io.BufferedReader(_Frames(raw, *_frames(file)), 2**17)


def _frames(file: SourceFile) -> tuple[Callable[[], Any], type[Exception]]:
    """What makes a decompressor of one frame of `file`, and the error that it raises."""
    if file.compression == "bz2":
        return bz2.BZ2Decompressor, OSError
    if file.compression == "xz":
        return lzma.LZMADecompressor, lzma.LZMAError
    try:
        import zstandard  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise DependencyMissing(
            f"corpus file {file.name} needs the package zstandard",
            fix=f"Install it: {install_command('zstd')}",
        ) from error
    # The largest window that the format's long mode may use; the library's default refuses such files.
    return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj, zstandard.ZstdError


class _Frames(io.RawIOBase):
    """Reads every frame of a bz2, xz or zstd file; raises if anything but a whole frame follows one."""

    # What the libraries' own files do with it: bz2's and lzma's stop without a word at bytes after a frame
    # that begin no other (lzma's also at the padding that xz allows there), zstandard's at a cut; fsspec's
    # opener of zstd files reads the first frame only.

    def __init__(self, raw: IO[bytes], new: Callable[[], Any], error: type[Exception]) -> None:
        self._raw, self._new, self._error = raw, new, error
        self._frame: Any = None
        self._pending = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._pending:
            data = b""
            if self._frame is not None and self._frame.eof:
                # The chunk that ended the last frame also holds the beginning of the next one.
                data, self._frame = self._frame.unused_data, None
            # What a bounded decompressor holds back comes first.
            if getattr(self._frame, "needs_input", True):
                data = data or self._raw.read(2**16)
                if not data:
                    if self._frame is not None:
                        raise EOFError("the last frame is cut short")
                    return 0
            if self._frame is None:
                # Padding between the frames of an xz file.
                if self._error is lzma.LZMAError and not (data := data.lstrip(b"\0")):
                    continue
                self._frame = self._new()
            self._pending = self._decompressed(data)
        count = min(len(buffer), len(self._pending))
        buffer[:count], self._pending = self._pending[:count], self._pending[count:]
        return count

    def _decompressed(self, data: bytes) -> bytes:
        # Bounded where the library allows it: 64 KiB of bz2 may hold a gigabyte of zeros.
        bound = (2**20,) if hasattr(self._frame, "needs_input") else ()
        try:
            return self._frame.decompress(data, *bound)
        except self._error as error:
            raise EOFError(str(error)) from error
