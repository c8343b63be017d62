"""The step reckoned without a GPU, at tiny size: every case has its counts, and every bar its verdict."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu_paper


def test_every_case_is_counted_and_every_bar_read(tmp_path, monkeypatch, capsys):
    out = tmp_path / "paper.json"
    monkeypatch.setattr("sys.argv", ["gpu_paper", "--tiny", "--json", str(out)])
    gpu_paper.main()
    found = json.loads(out.read_text())
    assert "reckoned, not measured" in found["is"]
    assert "cases" not in json.loads(capsys.readouterr().out), "figures of every line go to the file only"
    (size,) = gpu_paper.TINY
    assert set(found["cases"]) == {f"{size.rows}, {name}" for name in gpu_paper.CASES}
    for case in found["cases"].values():
        parts = case["parts"].values()
        for total in ("operations", "launches"):
            assert case[total] == sum(part[total] for part in parts) > 0
        assert (
            case["synchronisations"]
            == sum(part["syncs"] for part in parts)
            == sum(line["syncs"] for line in case["lines"])
        )
        assert case["bytes_streamed"] == sum(part["streamed"] for part in parts)
        assert case["peak"] > sum(case["held"].values()) > 0
        assert list(case["products"]) == ["0.6", "0.8", "0.95"]
        assert case["products"]["0.6"] >= case["products"]["0.95"] > 0
    plain, dead = (found["cases"][f"{size.rows}, {name}"] for name in ("plain", "auxk, a tenth dead"))
    assert dead["operations"] > plain["operations"]
    for bar in found["bars"]:
        assert bar["met"] == (bar["value"] <= bar["bar"])
        assert bar["is"] == gpu_paper.MARK
    assert all(one["host_ms"] > 0 < one["device_ms"] for one in found["host"])
    for one in found["sets"].values():
        # of the device or, at this size, of the host
        assert one["products"] >= sum(one["parts"].values()) * (1 - 1e-9) > 0
    cross, alone = (found["sets"][name] for name in ("cross-layer", "per-layer"))
    # three layers decode to six targets instead of three
    assert cross["bytes_gathered"] > 1.5 * alone["bytes_gathered"]
    assert found["own_product_shares"]["bars_read_at"] in gpu_paper.SHARES


def test_a_step_that_only_multiplies_takes_one_product():
    """Of a step whose other costs are nothing, the products are the inverse share of the fused product."""
    size = gpu_paper.Size(4096, 768, 16_384, 4)
    paper = gpu_paper.step_on_paper(gpu_paper.spec_of(size, {}), size.width)
    own = {site: entry for site, entry in paper.entries.items() if any(mine for _, mine in entry.flops)}
    alone = paper._replace(entries=own)
    for share in (0.5, 1.0):
        rates = gpu_paper.Rates.of(gpu_paper.GPUS["h100"], share)._replace(
            operation=0.0, sync=0.0, gather=1e30
        )
        assert gpu_paper.products(size, alone, rates) == pytest.approx(1 / share, rel=0.15)
