"""Objects in a local folder: create-only by hard link, durable on return."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from winnow.common.paths import expand_user
from winnow.schemas.errors import IntegrityError, MissingObject, StoreError
from winnow.store.objects.base import MAX_GET_BYTES, Data, Digest, ObjectStore, Pieces, Ready, check_key

T = TypeVar("T")

_TEMP = ".tmp"
# Longer than any put takes: a younger file may belong to a process that is still writing it.
_STALE_SECONDS = 24 * 3600
# How often a folder that another process removes between our mkdir and our use is made again. Each probe and
# each delete removes its folder once, so a few tries do.
_TRIES = 100
# Linux writes less than 2 GiB in one call, whatever it is asked for.
_WRITE_BYTES = 64 << 20


class LocalStore(ObjectStore):
    """Objects as files under one folder, which is created at the first put.

    A put writes `<root>/.tmp/<random>`, syncs it, links it to its key (which fails if the key exists), and
    syncs the folder. Files that a killed process leaves in `.tmp` are never listed; `probe` removes them a
    day later.
    """

    remote = False
    # A kernel's link is one step; a network file system that takes two shows it with small files too.
    probe_races = 1
    probe_race_bytes = 64

    def __init__(self, root: str | Path, temp: Path | None = None) -> None:
        self._root = expand_user(root).absolute()
        self._temp = temp or self._root / _TEMP
        self.uri = str(self._root)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    def put_new(
        self, key: str, data: Data | Pieces, ready: Ready | None = None, digest: Digest | None = None
    ) -> bool:
        """See `ObjectStore.put_new`."""
        del digest
        path = self._path(key)
        # Spares a second writer the whole write; only the link below decides.
        if path.exists():
            return False
        try:
            _again(lambda: _make_folder(path.parent))
            temp = self._write_temp(data, ready)
            try:
                # A link and not a rename, which would silently replace another writer's object.
                _in_folder(path.parent, lambda: os.link(temp, path))
            except FileExistsError:
                return False
            finally:
                temp.unlink(missing_ok=True)
        except OSError as error:
            self._fail(error, key, "writing")
        return True

    def put(self, key: str, data: Data) -> None:
        """See `ObjectStore.put`."""
        path = self._path(key)
        try:
            _again(lambda: _make_folder(path.parent))
            temp = self._write_temp(data)
            try:
                _in_folder(path.parent, lambda: temp.replace(path))
            finally:
                temp.unlink(missing_ok=True)
        except OSError as error:
            self._fail(error, key, "writing")

    def update(self, key: str, change: Callable[[bytes | None], bytes]) -> None:
        """See `ObjectStore.update`: under a lock of the root, which a kill releases."""
        try:
            _again(lambda: _make_folder(self._root))
            handle = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            self._fail(error, key, "writing")
        try:
            with suppress(OSError):  # NFS locks no folder; there the window is that of a read and a put
                fcntl.flock(handle, fcntl.LOCK_EX)
            super().update(key, change)
        finally:
            os.close(handle)

    def _write_temp(self, data: Data | Pieces, ready: Ready | None = None) -> Path:
        views = [memoryview(piece).cast("B") for piece in (data if isinstance(data, tuple) else (data,))]
        temp, handle = self._open_temp()
        try:
            # Pieces are written from where they are: joining a shard was a copy of 140 ms per GB.
            while views:
                done = os.writev(handle, _some(views))
                while views and done >= len(views[0]):
                    done -= len(views.pop(0))
                if views:
                    views[0] = views[0][done:]
            if ready is None:
                os.fsync(handle)
            else:
                # fsync waits 45 to 65 ms per shard of 150 MB; the 50 ms of CPU of `ready` fit beside it.
                with ThreadPoolExecutor(1, thread_name_prefix="winnow-fsync") as beside:
                    synced = beside.submit(os.fsync, handle)
                    ready()
                    synced.result()
        except BaseException:
            temp.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
        return temp

    def _open_temp(self) -> tuple[Path, int]:
        """Create a temporary file; its path and descriptor."""
        temp = self._temp / secrets.token_hex(16)

        def create() -> int:
            _make_folder(self._temp)
            # O_EXCL: two writers must never share a temporary file, whatever its name.
            return os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

        return temp, _again(create)

    def get(self, key: str, limit: int = MAX_GET_BYTES) -> bytes:
        """See `ObjectStore.get`."""
        try:
            with self._path(key).open("rb", buffering=0) as file:
                size = os.fstat(file.fileno()).st_size
                if size > limit:
                    raise IntegrityError(
                        f"{self.uri}/{key} is too large",
                        expected=f"at most {limit} bytes",
                        got=f"{size} bytes",
                    )
                return self._read(file.fileno(), key, 0, size)
        except OSError as error:
            self._fail(error, key, "reading")

    def get_range(self, key: str, start: int, end: int) -> bytes | memoryview:
        """See `ObjectStore.get_range`."""
        return self.get_ranges(key, [start], [end])[0]

    def get_ranges(self, key: str, starts: Sequence[int], ends: Sequence[int]) -> list[bytes | memoryview]:
        """See `ObjectStore.get_ranges`."""
        try:
            with self._path(key).open("rb", buffering=0) as file:
                pairs = zip(starts, ends, strict=True)
                return [self._read(file.fileno(), key, start, end) for start, end in pairs]
        except OSError as error:
            self._fail(error, key, "reading")

    def read_into(self, key: str, start: int, parts: Sequence[Sequence[NDArray[np.uint8]]]) -> Iterator[None]:
        """See `ObjectStore.read_into`: from the page cache into the buffers without another copy."""
        try:
            with self._path(key).open("rb", buffering=0) as file:
                handle = file.fileno()
                for part in parts:
                    end = start + sum(map(len, part))
                    # A short read is rare (a signal, the end of the file): the plain path completes it or
                    # says that the object is too short.
                    if os.preadv(handle, [buffer.data for buffer in part], start) != end - start:
                        rest = np.frombuffer(self._read(handle, key, start, end), np.uint8)
                        for buffer in part:
                            buffer[:], rest = rest[: buffer.size], rest[buffer.size :]
                    start = end
                    yield
        except OSError as error:
            self._fail(error, key, "reading")

    def get_suffix(self, key: str, length: int) -> bytes | memoryview:
        """See `ObjectStore.get_suffix`."""
        # Of an object that is missing or too short, the range below raises what the interface promises.
        size = self.size(key)
        return self.get_range(key, max(0, (size or 0) - length), max(size or 0, length))

    def _read(self, handle: int, key: str, start: int, end: int) -> bytes:
        """Read exactly [start, end): one `pread`, whose `bytes` need no copy; short reads are continued."""
        data = os.pread(handle, end - start, start)
        if len(data) == end - start:
            return data
        parts, done = [data], start + len(data)
        while done < end and parts[-1]:
            parts.append(os.pread(handle, end - done, done))
            done += len(parts[-1])
        if done < end:
            raise IntegrityError(
                f"{self.uri}/{key} is too short", expected=f"at least {end} bytes", got=f"{done} bytes"
            )
        return b"".join(parts)

    def size(self, key: str) -> int | None:
        """See `ObjectStore.size`."""
        try:
            return self._path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._fail(error, key, "looking up")

    def list(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """See `ObjectStore.list`; names that start with a dot are not objects."""
        top = self._path(prefix) if prefix else self._root
        found: list[tuple[str, int]] = []

        # `os.walk` ignores errors by default, and a folder it cannot read would look empty. One that vanished
        # while it was listed is no error: object storage has no folders.
        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        try:
            for folder, folders, files in os.walk(top, onerror=refuse):
                folders[:] = [name for name in folders if not name.startswith(".")]
                place = Path(folder)
                for name in files:
                    path = place / name
                    # An object that was deleted meanwhile is not listed.
                    with suppress(FileNotFoundError):
                        if not name.startswith("."):
                            found.append((path.relative_to(self._root).as_posix(), path.stat().st_size))
        except OSError as error:
            self._fail(error, prefix, "listing")
        found.sort()
        return iter(found)

    def delete(self, key: str) -> None:
        """See `ObjectStore.delete`."""
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._fail(error, key, "deleting")
        # Object storage has no empty folders. `rmdir` refuses one that is in use, and that is no error.
        if path.parent != self._root:
            with suppress(OSError):
                path.parent.rmdir()

    def child(self, prefix: str) -> LocalStore:
        """See `ObjectStore.child`."""
        # With the same temporary folder: `list` of the root hides one `.tmp`, and `probe` tidies it.
        return LocalStore(self._path(prefix), self._temp)

    def free_bytes(self) -> int | None:
        """Return the bytes free on the root's file system."""
        # The root may not exist yet: its nearest existing parent is on the same file system.
        place = self._root
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def probe(self, single_writer: bool = False) -> None:
        """See `ObjectStore.probe`; also removes day-old leftovers of killed processes.

        A root that did not exist before does not exist afterwards either, unless another process uses it
        meanwhile.
        """
        try:
            # What vanishes meanwhile is another's: a put that ends, or a probe that removes its folders.
            with suppress(FileNotFoundError, NotADirectoryError):
                for path in self._temp.iterdir():
                    with suppress(FileNotFoundError):
                        if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                            path.unlink()
        except OSError as error:
            self._fail(error, "", "tidying")
        # `winnow plan` probes before it reads the corpus; a plan that is then refused must leave no folder.
        new = [path for path in (self._temp, self._root, *self._root.parents) if not path.exists()]
        try:
            super().probe(single_writer)
        finally:
            with suppress(OSError):  # `rmdir` keeps a folder that another process has filled meanwhile
                for path in new:
                    path.rmdir()

    def _fail(self, error: OSError, key: str, doing: str) -> NoReturn:
        where = f"{self.uri}/{key}".rstrip("/")
        # A StoreError is an OSError too, and says more than this could.
        if isinstance(error, StoreError):
            raise error
        absent = isinstance(error, (FileNotFoundError, NotADirectoryError))
        if absent and doing != "writing":
            raise MissingObject(f"{where} does not exist") from error
        fixes = {
            errno.ENOSPC: "Free some space or choose another root, then run the same command again",
            errno.EDQUOT: "Free some quota or choose another root, then run the same command again",
            # Of a write: its folder cannot be made.
            errno.ENOENT: "Choose a root that is a folder, or can become one",
            errno.ENOTDIR: "Choose a root that is a folder: a part of this path is a file",
            errno.EEXIST: "Choose a root that is a folder: a part of this path is a file",
            errno.EACCES: "Choose a root this user may write to",
            errno.EROFS: "Choose a root this user may write to",
            # What `link` answers on file systems without hard links, such as FAT.
            errno.EPERM: "Choose a root on a file system with hard links",
            errno.EOPNOTSUPP: "Choose a root on a file system with hard links",
        }
        reason = error.strerror or type(error).__name__
        raise StoreError(f"{doing} {where} failed: {reason}", fix=fixes.get(error.errno or 0)) from error


def _some(views: list[memoryview]) -> list[memoryview]:
    """Return the first of `views`, as much as one write takes: `_WRITE_BYTES`, and far fewer than IOV_MAX."""
    chosen, room = list[memoryview](), _WRITE_BYTES
    for view in views[:256]:
        if not room:
            break
        chosen.append(view[:room])
        room -= len(chosen[-1])
    return chosen


def _again(act: Callable[[], T]) -> T:
    """Call `act`, which makes folders and uses them, until no other process removes them in between.

    Object storage has no folders, so `delete` and `probe` remove those that they leave empty, and a put
    beside them may find its own gone.
    """
    for _ in range(_TRIES - 1):
        with suppress(FileNotFoundError):
            return act()
    return act()


def _in_folder(folder: Path, place: Callable[[], object]) -> None:
    """Make `folder`, `place` a file in it, and sync the folder."""

    def act() -> None:
        _make_folder(folder)
        place()

    _again(act)
    # Without it a power cut may lose the name although the bytes are on the disk. A folder that is gone held
    # an object that was deleted since.
    with suppress(FileNotFoundError):
        _sync_folder(folder)


def _make_folder(path: Path) -> None:
    """Create `path` and its parents, each new one durable."""
    if path.is_dir():
        return
    # Not `makedirs`: each new folder's name is an entry of its parent, which has to be synced too.
    _make_folder(path.parent)
    path.mkdir(exist_ok=True)  # another writer may be making it
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
