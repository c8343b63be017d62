"""P2 over every kind of object a dataset is made of: damaged in every way, it gives its rows or an error.

What is read is compared with the sound dataset's rows, sink marks, tokens and labels: an error is a
WinnowError that names something to do, never a wrong value, and never a bare exception of a parser.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from winnow.cli.main import app
from winnow.schemas.errors import PlanMismatch, WinnowError
from winnow.store import ActivationStore
from winnow.store.check.repair import repair
from winnow.store.check.verify import damage, verify
from winnow.store.objects import open_store
from winnow.store.testing import make_plan, write_dataset

HOOK = "resid_post.1"
PLAN = make_plan(units=2, hooks={HOOK: 4}, labels=True)
KINDS = {
    "shard": f"activations/{HOOK}/c/1/0",
    "plan": "plan.json",
    "manifest": "manifest.json",
    "part": "manifest/*.parquet",
    "receipt": "receipts/00000001.json",
    "tokens": "tokens/c/1/0",
    "token digests": "token_digests/c/*/0",
    "labels": "labels/role/c/1/0",
    "label digests": "label_digests/c/0/0/0",
    "zarr group": "zarr.json",
    "zarr array": f"activations/{HOOK}/zarr.json",
}
FLIPS = 16
"""Bytes of an object in which a bit is flipped, one after another, the first and the last among them."""


@pytest.fixture(scope="module", params=["sealed", "unsealed"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_dataset(open_store(str(folder)), PLAN)
    if request.param == "unsealed":  # all receipts are there; a follower reads them
        shutil.rmtree(folder / "manifest")
        (folder / "manifest.json").unlink()
    return folder


def everything(root: Path) -> list[np.ndarray]:
    """All that a consumer can get: rows, tokens and labels, and of a sealed dataset sink marks too."""
    sealed = (root / "manifest").exists()
    store = ActivationStore.open(str(root), follow=not sealed, timeout_seconds=0.1)
    found = [store.read_rows(HOOK, 0, store.rows)]
    for unit in range(PLAN.units):
        found += [store.unit_tokens(unit), *store.unit_labels(unit).values()]
    return [*found, store.weights([HOOK], 0, store.rows)] if sealed else found


def damaged(body: bytes) -> Iterator[tuple[str, bytes]]:
    """What may become of an object."""
    yield "emptied", b""
    yield "cut in half", body[: len(body) // 2]
    yield "cut short", body[:-2]  # past the line's end of a JSON object
    yield "lengthened", body + bytes(7)
    yield "doubled", body + body
    yield "zeroed", bytes(len(body))
    for place in np.linspace(0, len(body) - 1, FLIPS).astype(int).tolist():
        flipped = bytearray(body)
        flipped[place] ^= 1 << place % 8
        yield f"a bit flipped in byte {place}", bytes(flipped)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_an_error_or_makes_no_difference(sound: Path, tmp_path: Path, kind: str) -> None:
    root = Path(shutil.copytree(sound, tmp_path / "root"))
    paths = list(root.glob(KINDS[kind]))
    if not paths:
        assert kind in ("manifest", "part"), "an unsealed dataset has neither"
        return
    expected, body = everything(root), paths[0].read_bytes()
    told = 0
    for what, other in damaged(body):
        paths[0].write_bytes(other)
        try:
            found = everything(root)
        except WinnowError:
            told += 1
            continue
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs, err_msg=f"{kind}, {what}")
    assert told or kind.startswith("zarr") or (kind == "receipt" and (root / "manifest").exists())


@pytest.mark.parametrize("kind", KINDS)
def test_verify_names_what_is_not_whole(sound: Path, tmp_path: Path, kind: str) -> None:
    root = Path(shutil.copytree(sound, tmp_path / "root"))
    for path in list(root.glob(KINDS[kind]))[:1]:
        body = path.read_bytes()
        for what, other in damaged(body):
            if "flipped" in what:
                continue
            path.write_bytes(other)
            try:
                problems = verify(open_store(str(root)), "full")
            except WinnowError:
                continue
            key = path.relative_to(root).as_posix()
            assert any(problem.key == key for problem in problems), f"{what}: {problems}"


def test_each_object_that_is_lost_is_named_and_comes_back_if_the_rest_determines_it(tmp_path: Path) -> None:
    write_dataset(open_store(str(tmp_path / "whole")), PLAN)
    digest = ActivationStore.open(str(tmp_path / "whole")).dataset_sha256
    for number, (key, _) in enumerate(list(open_store(str(tmp_path / "whole")).list())):
        store = open_store(str(shutil.copytree(tmp_path / "whole", tmp_path / str(number))))
        store.delete(key)
        assert key in {problem.key for problem in damage(verify(store))}, key
        # Rows, tokens, labels and the identity: nothing else in the root determines them.
        if key == "plan.json" or (key.startswith(("activations/", "tokens/", "labels/")) and "/c/" in key):
            continue
        repair(store)
        assert verify(store, "full") == [], key
        assert ActivationStore.over(store).dataset_sha256 == digest


def test_only_the_plan_that_was_lost_is_made_again_in_its_place(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_dataset(store, PLAN)
    store.delete("plan.json")
    with pytest.raises(PlanMismatch, match=r"receipts of another plan, whose plan.json is missing"):
        write_dataset(store, make_plan(units=2, hooks={HOOK: 4}, labels=True, seed=9))
    assert store.size("plan.json") is None
    write_dataset(store, PLAN)
    assert verify(store, "full") == []


def test_a_dataset_that_is_not_sealed_lacks_no_manifest(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_dataset(store, PLAN)
    store.delete("manifest.json")
    for key, _ in list(store.list("manifest")):
        store.delete(key)
    assert verify(store, "full") == []
    assert repair(store).manifest is None


@pytest.mark.parametrize("key", ["plan.json", "manifest.json", "receipts/00000001.json", "zarr.json"])
@pytest.mark.parametrize("body", [None, b"", b"{}"], ids=["lost", "emptied", "another"])
def test_the_command_lists_the_damage_and_says_what_mends_it(
    tmp_path: Path, key: str, body: bytes | None
) -> None:
    store = open_store(str(tmp_path))
    write_dataset(store, PLAN)
    store.delete(key) if body is None else store.put(key, body)
    found = CliRunner().invoke(app, ["verify", str(tmp_path), "--level", "full"])
    assert found.exit_code == 1, found.stderr
    assert f"[{key}]" in found.stdout
    said = "put back a copy of it" if key == "plan.json" else "--repair"
    assert said in " ".join(found.stderr.split())
