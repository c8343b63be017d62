"""Contracts: canonical digests, and artefacts from elsewhere parsed as hostile input."""

from __future__ import annotations

import json
import pickle
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given
from pydantic import TypeAdapter, ValidationError

from winnow.schemas import base, errors
from winnow.schemas.base import HookName, RelativeKey, canonical_json, validate
from winnow.schemas.config import Config
from winnow.schemas.errors import ConfigError, IntegrityError, UnsupportedVersion, WinnowError
from winnow.schemas.harvest import HarvestManifest, HarvestPlan, PlanSpec, UnitReceipt
from winnow.schemas.subject import parse_hook
from winnow.schemas.training import TrainSpec
from winnow.store.objects import open_store
from winnow.store.testing import make_plan, write_dataset, write_unit


@pytest.fixture(scope="module")
def receipt(tmp_path_factory: pytest.TempPathFactory) -> UnitReceipt:
    return write_unit(open_store(str(tmp_path_factory.mktemp("root"))), make_plan(), 0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> HarvestManifest:
    found = write_dataset(open_store(str(tmp_path_factory.mktemp("root"))), make_plan())
    assert found is not None
    return found


def altered(artefact: base.Artefact, path: str, value: Any) -> bytes:
    """The artefact's JSON with the field at a dotted path replaced."""
    raw = json.loads(artefact.to_json())
    *parents, leaf = path.split(".")
    node = raw
    for part in parents:
        node = node[int(part) if isinstance(node, list) else part]
    node[int(leaf) if isinstance(node, list) else leaf] = value
    return json.dumps(raw).encode()


# Digests


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=6))
def test_canonical_json_ignores_order(value: dict[str, Any]) -> None:
    turned = dict(reversed(list(value.items())))
    assert canonical_json(value) == canonical_json(turned)
    assert json.loads(canonical_json(value)) == value


def test_canonical_json_refuses_nan() -> None:
    with pytest.raises(ValueError):
        canonical_json({"x": float("nan")})


def test_fingerprint_covers_content_and_not_execution() -> None:
    plan = make_plan()
    other = plan.execution.model_copy(update={"batch_windows": 99, "code_version": "9"})
    assert plan.model_copy(update={"execution": other}).fingerprint == plan.fingerprint
    assert make_plan(seed=1).fingerprint != plan.fingerprint
    assert make_plan(hooks={"resid_post.2": 8}).fingerprint != plan.fingerprint


def test_content_ignores_attempt_and_revision(receipt: UnitReceipt) -> None:
    attempt = receipt.attempt.model_copy(update={"id": "other", "seconds": 9.0})
    assert receipt.model_copy(update={"attempt": attempt, "revision": 3}).content() == receipt.content()
    assert receipt.model_copy(update={"void": "x"}).content() != receipt.content()


def test_artefacts_round_trip(receipt: UnitReceipt, manifest: HarvestManifest) -> None:
    plan = make_plan()
    assert HarvestPlan.from_json(plan.to_json(), origin="x") == plan
    assert UnitReceipt.from_json(receipt.to_json(), origin="x") == receipt
    assert HarvestManifest.from_json(manifest.to_json(), origin="x") == manifest


def test_contracts_are_frozen() -> None:
    with pytest.raises(ValidationError):
        make_plan().units = 4  # pyright: ignore[reportAttributeAccessIssue]


# Hostile input


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"NaN", b'{"a":' * 50_000, b"\x00" * 10],
    ids=["empty", "cut", "not utf-8", "deep lists", "a number", "deep objects", "zeros"],
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    for kind in (HarvestPlan, UnitReceipt, HarvestManifest):
        with pytest.raises((IntegrityError, UnsupportedVersion), match="somewhere"):
            kind.from_json(data, origin="somewhere")


def test_too_large_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_JSON_BYTES", 100)
    with pytest.raises(IntegrityError, match="too large"):
        HarvestPlan.from_json(b" " * 101, origin="x")


def test_another_kind_is_refused(receipt: UnitReceipt) -> None:
    with pytest.raises(UnsupportedVersion, match=r"winnow\.plan.*winnow\.receipt"):
        HarvestPlan.from_json(receipt.to_json(), origin="x")


@pytest.mark.parametrize("version", ["2.0", "0.9", "", None, 7, "10.0"])
def test_unknown_versions_are_refused_in_words(version: object) -> None:
    with pytest.raises(UnsupportedVersion, match=r"expected 1\.x.*upgrade"):
        HarvestPlan.from_json(altered(make_plan(), "version", version), origin="x")


def test_later_minor_versions_are_read() -> None:
    assert HarvestPlan.from_json(altered(make_plan(), "version", "1.7"), origin="x").version == "1.7"


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("extra", 1, "extra"),
        ("spec.extra", 1, "spec.extra"),
        ("units", 0, "units"),
        ("units", 1, "training unit"),
        ("units", "many", "units"),
        ("tokens_sha256", "A" * 64, "tokens_sha256"),
        ("tokens_sha256", "0" * 63, "tokens_sha256"),
        ("spec.windows_per_unit", 63, "windows_per_unit"),
        ("spec.hooks", [], "hooks"),
        ("spec.hooks", ["../x"], "hooks"),
        ("spec.hooks", ["resid_post.2"], "sites must name"),
        ("spec.hooks", ["a/b"], "hooks"),
        ("spec.compress", "pickle", "compress"),
        ("spec.dtype", "object", "dtype"),
        ("sites.0.d_model", -4, "d_model"),
        ("sites.0.d_model", 10**12, "d_model"),
        ("units", 10**11, "units"),
        ("spec.context_length", 10**9, "context_length"),
        ("spec.windows_per_unit", 64 * 10**9, "windows_per_unit"),
        ("spec.windows_per_unit", 2**25, "windows_per_unit x context_length"),
        ("spec.hooks", [f"h{number}" for number in range(2000)], "hooks"),
    ],
)
def test_plans_that_do_not_fit(path: str, value: object, said: str) -> None:
    with pytest.raises(IntegrityError, match=said):
        HarvestPlan.from_json(altered(make_plan(), path, value), origin="x")


def test_a_shard_too_large_to_be_put_at_once_is_refused() -> None:
    plan = make_plan(hooks={"resid_post.1": 64})
    with pytest.raises(IntegrityError, match=r"a shard of resid_post\.1 \(D = 64\) would pass"):
        HarvestPlan.from_json(altered(plan, "spec.windows_per_unit", 2**21), origin="x")
    with pytest.raises(IntegrityError, match="units x hooks"):
        HarvestPlan.from_json(altered(make_plan(hooks={"a": 1, "b": 1}), "units", 2**24), origin="x")


@pytest.mark.parametrize(
    "key",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "s3://other/x",
        "a//b",
        "a/../b",
        "",
        "a\x00",
        "a" * 600,
        "-/..",
        ".a",
    ],
)
def test_keys_that_leave_the_root(key: str, receipt: UnitReceipt, manifest: HarvestManifest) -> None:
    shard = json.loads(receipt.to_json())
    shard["shards"]["resid_post.1"]["key"] = key
    with pytest.raises(IntegrityError, match="key"):
        UnitReceipt.from_json(json.dumps(shard).encode(), origin="x")
    with pytest.raises(IntegrityError, match="key"):
        HarvestManifest.from_json(altered(manifest, "parts.0.key", key), origin="x")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bytes", -1),
        ("slice_crc32c", [0] * 63),
        ("slice_crc32c", [2**32] * 64),
        ("sum_squares", -1.0),
        ("largest_norm", "Infinity"),
        ("sinks", [-1]),
        ("sha256", "x" * 64),
    ],
)
def test_shard_records_that_do_not_fit(field: str, value: object, receipt: UnitReceipt) -> None:
    raw = json.loads(receipt.to_json())
    raw["shards"]["resid_post.1"][field] = value
    with pytest.raises(IntegrityError, match=field):
        UnitReceipt.from_json(json.dumps(raw).encode(), origin="x")


def test_parts_larger_than_a_gibibyte_are_refused(manifest: HarvestManifest) -> None:
    with pytest.raises(IntegrityError, match=r"parts\.0\.bytes"):
        HarvestManifest.from_json(altered(manifest, "parts.0.bytes", 2**31), origin="x")


@given(st.text(max_size=30))
def test_relative_keys_never_climb(key: str) -> None:
    try:
        TypeAdapter(RelativeKey).validate_python(key)
    except ValidationError:
        return
    parts = key.split("/")
    assert all(part and not part.startswith(".") for part in parts)
    assert key.isascii()
    assert not set(key) & set("\\:\n\0 ")


@pytest.mark.parametrize("name", ["resid_post.9", "model.layers.3.mlp", "h"])
def test_hook_names(name: str) -> None:
    assert TypeAdapter(HookName).validate_python(name) == name


@pytest.mark.parametrize("name", ["", ".", "a..b", "a.", "../a", "a/b", "a b", "a\n", "x" * 201])
def test_hook_names_that_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(HookName).validate_python(name)


def test_parse_hook() -> None:
    assert parse_hook("resid_post.12") == ("resid_post", 12)
    assert parse_hook("model.layers.3") is None
    assert parse_hook("resid_post.x") is None


# Config


def test_config_names_every_wrong_field() -> None:
    raw = {"root": "", "plan": {"hooks": ["a"], "windows_per_unit": 100}, "trian": {}}
    with pytest.raises(ConfigError) as caught:
        validate(Config, raw, origin="config x.yaml")
    for part in ("config x.yaml", "root", "plan.windows_per_unit", "trian", "100"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"k": 9, "latents": 8}, "K <= N"),
        ({"lanes": 3}, "lanes must divide 64"),
        ({"batch_rows": 100}, "multiple of lanes"),
    ],
)
def test_training_specs_that_do_not_fit(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TrainSpec(**{"out": "x", "hook": "a", "latents": 64, "k": 4, **fields})


def test_plan_spec_refuses_what_cannot_be() -> None:
    with pytest.raises(ValidationError, match="drop_leading"):
        PlanSpec(hooks=("a",), context_length=8, drop_leading=8)
    with pytest.raises(ValidationError, match="repeat"):
        PlanSpec(hooks=("a", "a"))


# Errors


def all_errors() -> list[type[WinnowError]]:
    return [
        item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, WinnowError)
    ]


@pytest.mark.parametrize("kind", all_errors())
def test_errors_travel_between_processes(kind: type[WinnowError]) -> None:
    error = kind("what", expected=1, got="two", fix="Do this")
    assert str(error) == "what: expected 1, got two. Do this."
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), back.fix) == (kind, str(error), "Do this")


def test_errors_are_also_builtins() -> None:
    assert issubclass(errors.ConfigError, ValueError)
    assert issubclass(errors.StoreError, OSError)
    assert issubclass(errors.MissingObject, FileNotFoundError)
    assert issubclass(errors.WorkerError, RuntimeError)
    assert {kind.exit_code for kind in all_errors()} <= {1, 2}


def test_a_range_of_layers_stands_for_its_hooks() -> None:
    spec = PlanSpec.model_validate({"hooks": ["mlp_in.0-2", "resid_post.9", "model.layers.0.1"]})
    assert spec.hooks == ("mlp_in.0", "mlp_in.1", "mlp_in.2", "resid_post.9", "model.layers.0.1")
    assert PlanSpec.model_validate(spec.model_dump()) == spec
    for wrong in ("mlp_in.3-1", "model.layers.0-3", "mlp_in.0-1000000"):
        with pytest.raises(ValidationError, match="hooks"):
            PlanSpec.model_validate({"hooks": [wrong]})


def test_a_card_of_float32_products_as_before_is_read_by_older_versions():
    spec = TrainSpec(out="x", hook="a", latents=64, k=4)
    assert "float32_products" not in spec.model_dump(mode="json")
    bounded = spec.model_copy(update={"float32_products": "bounded"})
    assert bounded.model_dump(mode="json")["float32_products"] == "bounded"
