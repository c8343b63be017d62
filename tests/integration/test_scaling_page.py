"""`winnow scaling` on a sweep's folder that is written by hand from a known law: numbers, page, pictures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from winnow.cli.main import app
from winnow.evaluator.scaling.laws import JOINT
from winnow.schemas.training import SaeCard, SaeIdentity, TrainSpec
from winnow.store.objects import open_store

TRUTH = np.array([0.2, -0.2, -0.15, -0.02, -3.0, -0.1])
D = 32


def write_sae(root, n: int, k: int, seed: int, **changes) -> None:
    draw = np.random.default_rng(seed)
    final = float(JOINT.value(TRUTH, np.log([[n, k]]))[0]) * float(np.exp(0.002 * draw.standard_normal()))
    tokens = np.arange(1, 61) * 2000
    fvu = final * (0.98 + 0.6 * (tokens / 2000) ** -0.7)
    lines = [
        {"tokens": int(t), "fvu": float(v), "lr": 1e-3 if t <= 96_000 else 1e-4}
        for t, v in zip(tokens, fvu, strict=True)
    ]
    spec = TrainSpec(out="x", hook="h.1", latents=n, k=k)
    identity = SaeIdentity(
        plan_fingerprint="a" * 64, dataset_sha256=None, subject_model="tiny", subject_weights_sha256="b" * 64
    )
    facts = {
        "d_model": D, "latents": n, "k": k, "hook": "h.1", "normalize": "layer", "weights": "raw",
        "weights_sha256": "c" * 64, "identity": identity, "spec": spec,
        "metrics": {"fvu_normalised.raw": final, "tokens": 120_000.0},
    }  # fmt: skip
    out = root.child(f"latents-{n}_k-{k}")
    out.put("sae.json", SaeCard.model_validate(facts | changes).to_json())
    out.put("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())


def run(*arguments: str):
    return CliRunner().invoke(app, ["scaling", *arguments])


def test_the_whole_command(tmp_path):
    root = open_store(str(tmp_path / "sweep"))
    for seed, (n, k) in enumerate((n, k) for n in (64, 128, 256, 512) for k in (4, 8, 16)):
        write_sae(root, n, k, seed)
    result = run(str(tmp_path / "sweep"), "--out", str(tmp_path / "page"), "--bootstraps", "20", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert len(told["cells"]) == 12
    assert told["held_out"]["latents"] == 512
    errors = told["held_out"]["mean_error"]
    assert errors["joint"] < errors["nearest"]
    assert set(told["law_c"]) == {"4", "8", "16"}
    assert told["law_c"]["4"]["parameters"]["b"]["value"] <= 0
    assert {cell["converged"] for cell in told["cells"]} == {False}
    for cell in told["cells"]:
        assert cell["compute"] == 6 * D * cell["latents"] * 120_000
        assert cell["law"] == pytest.approx(cell["loss"], rel=0.02)
    page = (tmp_path / "page" / "scaling.md").read_text()
    assert "0 of 12 have converged" in page
    assert "| 512 |" in page
    assert str(tmp_path) not in page
    assert (tmp_path / "page" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (tmp_path / "page" / "scaling.svg").read_bytes()[:2000]
    assert json.loads((tmp_path / "page" / "scaling.json").read_text()) == told


def test_what_is_no_sweep_is_refused(tmp_path):
    root = open_store(str(tmp_path))
    assert run(str(tmp_path)).exit_code == 2
    write_sae(root, 64, 4, 0)
    write_sae(root, 128, 4, 0, normalize="none")
    result = run(str(tmp_path))
    assert result.exit_code == 2
    assert "normalize" in result.output
