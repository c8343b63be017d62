"""A dataset is an ordinary zarr v3 group: zarr-python reads it, here and over s3fs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from s3fs import S3FileSystem
from zarr.core.sync import sync
from zarr.storage import FsspecStore

from tests.conftest import S3Server
from tests.support.snippets import blocks
from winnow.schemas.harvest import HarvestPlan
from winnow.store.check.repair import repair
from winnow.store.check.verify import verify
from winnow.store.format.layout import BFLOAT16_NAN, row_permutation, shard_key
from winnow.store.format.shards import to_float32, to_stored
from winnow.store.format.zarr_metadata import zarr_objects
from winnow.store.objects import ObjectStore, open_store
from winnow.store.testing import (
    flip_bit,
    make_plan,
    planned_rows,
    synthetic_labels,
    synthetic_rows,
    synthetic_tokens,
    write_dataset,
)

HOOKS = {"resid_post.1": 8, "model.layers.0.mlp": 5}
DOCUMENTED = ("bfloat16", "rows and labels", "the row of a token", "rows, tokens and labels with zarr alone")
"""The first lines of the blocks of Python in docs/data.md."""


def check(group: zarr.Group, plan: HarvestPlan) -> None:
    assert group.attrs["winnow"]["plan_fingerprint"] == plan.fingerprint
    for hook, width in HOOKS.items():
        array = group[f"activations/{hook}"]
        assert isinstance(array, zarr.Array)
        scale = 4 if plan.spec.dtype == "int8" else 0
        assert array.shape == (plan.rows, width + scale)
        assert array.shards == (plan.rows_per_unit, width + scale)
        assert array.chunks == (plan.rows_per_slice, width + scale)
        assert ("scale" in array.attrs) == bool(scale)
        assert array.metadata.dimension_names == ("row", f"dimension.{hook}")
        assert (array.attrs["logical_dtype"], array.attrs["hook"]) == (plan.spec.dtype, hook)
        for unit in range(plan.units):
            found = array[unit * plan.rows_per_unit : (unit + 1) * plan.rows_per_unit]
            expected = to_stored(synthetic_rows(plan, unit, hook), plan.spec.dtype)
            assert np.array_equal(found, expected)
    tokens = np.concatenate([synthetic_tokens(plan, unit) for unit in range(plan.units)])
    assert np.array_equal(group["tokens"][:], tokens)
    assert group["token_digests"].shape == (plan.units, 32)


@pytest.mark.parametrize("compress", ["none", "zstd"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8"])
def test_local(tmp_path: Path, dtype, compress) -> None:
    plan = make_plan(hooks=HOOKS, dtype=dtype, compress=compress)
    write_dataset(open_store(str(tmp_path)), plan)
    check(zarr.open_group(tmp_path, mode="r"), plan)


def test_no_dimension_name_has_two_lengths_or_is_an_arrays_own(tmp_path: Path) -> None:
    """What xarray wants of a group: one length for a name, and no array called like its dimension."""
    write_dataset(open_store(str(tmp_path)), make_plan(hooks=HOOKS))
    for group in (zarr.open_group(tmp_path, mode="r"), zarr.open_group(tmp_path / "activations", mode="r")):
        lengths: dict[str, set[int]] = {}
        for _, array in group.arrays():
            for name, length in zip(array.metadata.dimension_names, array.shape, strict=True):
                lengths.setdefault(name, set()).add(length)
        assert {len(found) for found in lengths.values()} == {1}
        assert not set(lengths) & {name.rsplit("/", 1)[-1] for name, _ in group.arrays()}


def test_a_dataset_with_the_dimension_names_of_before_is_sound(tmp_path: Path) -> None:
    plan, store = make_plan(hooks=HOOKS), open_store(str(tmp_path))
    write_dataset(store, plan, units=[0, 1])
    for key in zarr_objects(plan):
        body = store.get(key)
        for hook in HOOKS:
            body = body.replace(f'"dimension.{hook}"'.encode(), b'"dimension"')
        store.put(key, body)
    assert b"dimension." not in store.get("zarr.json")
    before = {key: store.get(key) for key in zarr_objects(plan)}
    write_dataset(store, plan)  # the harvest resumes, and seals
    assert verify(store, "full") == []
    assert repair(store).restored == []
    assert {key: store.get(key) for key in zarr_objects(plan)} == before


def documented(title: str, names: dict[str, Any]) -> dict[str, Any]:
    """Run the block of Python in docs/data.md that begins with `# title` on `names`; return all names."""
    page = Path(__file__).parents[2] / "docs/data.md"
    found = [block.text for block in blocks(page) if block.text.startswith(f"# {title}\n")]
    assert len(found) == 1
    exec(compile(found[0], title, "exec"), names)
    return names


def test_every_block_of_python_is_run_here() -> None:
    page = Path(__file__).parents[2] / "docs/data.md"
    titles = [block.text.splitlines()[0] for block in blocks(page) if block.language == "python"]
    assert sorted(titles) == sorted(f"# {title}" for title in DOCUMENTED)


def test_bfloat16_is_decoded_as_documented(tmp_path: Path) -> None:
    plan = make_plan(hooks=HOOKS)
    write_dataset(open_store(str(tmp_path)), plan)
    stored = zarr.open_group(tmp_path, mode="r")["activations/resid_post.1"][:]
    rows = documented("bfloat16", {"stored": stored})["rows"]
    assert rows.dtype == np.float32
    assert np.array_equal(rows, to_float32(stored, "bfloat16"))
    assert np.array_equal(rows, torch.from_numpy(stored).view(torch.bfloat16).float().numpy())


@pytest.mark.parametrize("drop_leading", [0, 1])
def test_rows_and_labels_are_read_as_documented(tmp_path: Path, drop_leading) -> None:
    plan = make_plan(hooks=HOOKS, labels=True, drop_leading=drop_leading)
    write_dataset(open_store(str(tmp_path)), plan)
    for unit in range(plan.units):
        given = {"root": str(tmp_path), "hook": "resid_post.1", "unit": unit}
        names = documented("rows and labels", given.copy())
        # The planned order is that of the windows: token after token, without the first positions.
        grids = {
            name: grid[:, drop_leading:].reshape(-1) for name, grid in synthetic_labels(plan, unit).items()
        }
        order = row_permutation(plan, unit)
        for name, grid in grids.items():
            assert np.array_equal(names["labels"][name], grid[order])
        assistant = grids["role"][order] == 3
        assert 0 < assistant.sum() < len(assistant)
        assert np.array_equal(names["rows"], synthetic_rows(plan, unit, "resid_post.1")[assistant])

        outside = documented("rows, tokens and labels with zarr alone", given.copy())
        assert np.array_equal(
            outside["stored"], to_stored(synthetic_rows(plan, unit, "resid_post.1"), "bfloat16")
        )
        tokens = synthetic_tokens(plan, unit)[:, drop_leading:].reshape(-1)[order]
        assert np.array_equal(outside["tokens"], tokens)
        assert np.array_equal(outside["roles"] == "assistant", assistant)


def test_the_row_of_a_token_is_found_as_documented(tmp_path: Path) -> None:
    plan = make_plan(hooks=HOOKS, labels=True)
    write_dataset(open_store(str(tmp_path)), plan)
    given = {"root": str(tmp_path), "hook": "resid_post.1", "unit": 0}
    names = documented("rows and labels", given)
    labels = synthetic_labels(plan, 2)
    names |= {"document": labels["document"][5, 3], "offset": labels["offset"][5, 3]}
    names = documented("the row of a token", names)
    # Planned row of window 5, position 3: one position of each window has no row.
    wanted = planned_rows(plan, 2, "resid_post.1")[5 * plan.rows_per_window + 2]
    assert np.array_equal(names["activation"], wanted)


def test_a_missing_shard_is_made_an_error_as_documented(
    damaged: tuple[ObjectStore, HarvestPlan, Path],
) -> None:
    store, plan, root = damaged
    array = zarr.open_group(root, mode="r")["activations/resid_post.1"]
    assert isinstance(array, zarr.Array)
    assert array.nchunks_initialized == array.nchunks == plan.units * 64
    store.delete(shard_key("resid_post.1", 1))
    assert array.nchunks_initialized == array.nchunks - 64


def test_unsealed_and_unconsolidated(tmp_path: Path) -> None:
    plan = make_plan(hooks=HOOKS)
    write_dataset(open_store(str(tmp_path)), plan, units=[0, 1, 2])
    check(zarr.open_group(tmp_path, mode="r", use_consolidated=False), plan)


@pytest.fixture
def filesystem(s3_environment: S3Server) -> Iterator[S3FileSystem]:
    server = s3_environment
    opened = S3FileSystem(
        key=server.access_key,
        secret=server.secret_key,
        endpoint_url=server.endpoint,
        client_kwargs={"region_name": server.region},
        asynchronous=True,
        skip_instance_cache=True,
    )
    yield opened
    sync(sync(opened.set_session()).close())  # in zarr's event loop, where it was opened


def test_over_s3fs(s3_uri: str, filesystem: S3FileSystem) -> None:
    plan = make_plan(hooks=HOOKS)
    write_dataset(open_store(s3_uri), plan)
    store = FsspecStore(filesystem, read_only=True, path=s3_uri.removeprefix("s3://"))
    check(zarr.open_group(store, mode="r"), plan)


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[ObjectStore, HarvestPlan, Path]:
    plan = make_plan()
    store = open_store(str(tmp_path))
    write_dataset(store, plan)
    return store, plan, tmp_path


def test_a_missing_shard_shows_as_nan(damaged: tuple[ObjectStore, HarvestPlan, Path]) -> None:
    store, plan, root = damaged
    store.delete(shard_key("resid_post.1", 1))
    rows = zarr.open_group(root, mode="r")["activations/resid_post.1"][:]
    gone = rows[plan.rows_per_unit : 2 * plan.rows_per_unit]
    assert (gone == BFLOAT16_NAN).all()
    assert np.isnan(to_float32(gone, "bfloat16")).all()
    assert np.isfinite(to_float32(rows[: plan.rows_per_unit], "bfloat16")).all()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_missing_shard_of_another_dtype(tmp_path: Path, dtype) -> None:
    plan = make_plan(dtype=dtype)
    write_dataset(open_store(str(tmp_path)), plan, units=[0])
    rows = zarr.open_group(tmp_path, mode="r")["activations/resid_post.1"][:]
    assert np.isnan(rows[plan.rows_per_unit :]).all()


def test_int8_is_read_as_documented(tmp_path: Path) -> None:
    plan = make_plan(dtype="int8")
    write_dataset(open_store(str(tmp_path)), plan, units=[0])
    stored = zarr.open_group(tmp_path, mode="r")["activations/resid_post.1"][:]
    rows = stored[:, :-4] * stored[:, -4:].copy().view("<f4")
    wanted = synthetic_rows(plan, 0, "resid_post.1")
    most = np.abs(wanted).max(axis=1, keepdims=True)
    assert (np.abs(rows[: plan.rows_per_unit] - wanted) <= most / 254 * 1.0001).all()
    assert np.isnan(rows[plan.rows_per_unit :]).all()


def test_zarr_refuses_a_flipped_bit(damaged: tuple[ObjectStore, HarvestPlan, Path]) -> None:
    store, _, root = damaged
    flip_bit(store, shard_key("resid_post.1", 0), 100)
    with pytest.raises(ValueError, match="checksum"):
        zarr.open_group(root, mode="r")["activations/resid_post.1"][:8]
