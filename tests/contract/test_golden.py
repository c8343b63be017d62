"""Artefacts written by an earlier Winnow keep parsing, and their digests keep their values.

`golden/` holds what `write_dataset(make_plan(units=2, hooks={"resid_post.1": 2}, context_length=8,
seed=7))` wrote. A failure here means that existing datasets would become unreadable.
"""

from __future__ import annotations

from pathlib import Path

from winnow.schemas.base import sha256_hex
from winnow.schemas.harvest import HarvestManifest, HarvestPlan, UnitReceipt
from winnow.store.objects import open_store
from winnow.store.records.index import check_receipt
from winnow.store.records.parts import dataset_digest, part_key, read_part
from winnow.store.testing import make_plan, write_dataset

GOLDEN = Path(__file__).parent / "golden"
FINGERPRINT = "23bf62a606b37302ad78a2ce39f970566e3abaf9f7f0681078cfc57c4e82b6fe"
CONTENT = "d1ac1f0735e8942cb6da7f1e2d06e9bffa6e8d9273162fdb0947fdb637a7b0ba"
DATASET = "8aa31a8b672ba50fbb5090c2af09001e78587aae591e103981acd6def27dce52"


def golden_plan() -> HarvestPlan:
    return HarvestPlan.from_json((GOLDEN / "plan.json").read_bytes(), origin="golden plan")


def test_plan() -> None:
    plan = golden_plan()
    assert plan.fingerprint == FINGERPRINT
    assert plan.rows == 2 * 64 * 7


def test_a_plan_that_names_its_joining_token() -> None:
    plan = HarvestPlan.from_json((GOLDEN / "plan-tokens.json").read_bytes(), origin="golden plan")
    assert plan.fingerprint == "8bd494285e9abf3f1079a326a2a3dfaa818ad18e9bb38b5ba000f399998ee684"
    assert (plan.spec.join, plan.join_token, plan.bos_token) == ("<|endoftext|>", 3, 5)
    assert plan.spec.control_tokens == "text"
    old = golden_plan()
    assert (old.spec.join, old.join_token, old.bos_token) == ("eos", old.subject.eos_token_id, None)
    assert old.spec.control_tokens == "token"


def test_receipt() -> None:
    receipt = UnitReceipt.from_json((GOLDEN / "receipt.json").read_bytes(), origin="golden receipt")
    check_receipt(golden_plan(), receipt)
    assert sha256_hex(receipt.content()) == CONTENT


def test_manifest_and_part(tmp_path: Path) -> None:
    manifest = HarvestManifest.from_json((GOLDEN / "manifest.json").read_bytes(), origin="golden manifest")
    assert manifest.dataset_sha256 == DATASET
    store = open_store(str(tmp_path))
    (part,) = manifest.parts
    assert part.key == part_key(part.sha256)
    store.put_new(part.key, (GOLDEN / "part.parquet").read_bytes())
    receipts = list(read_part(store, golden_plan(), part))
    assert [receipt.unit for receipt in receipts] == [0, 1]
    assert sha256_hex(receipts[0].content()) == CONTENT
    assert dataset_digest(golden_plan(), receipts) == DATASET


def test_the_same_data_still_gives_the_same_digest(tmp_path: Path) -> None:
    plan = make_plan(units=2, hooks={"resid_post.1": 2}, context_length=8, seed=7)
    assert plan.fingerprint == FINGERPRINT
    manifest = write_dataset(open_store(str(tmp_path)), plan)
    assert manifest is not None
    assert manifest.dataset_sha256 == DATASET
