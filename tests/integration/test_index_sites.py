"""Promoted tokens at hooks outside the residual stream: by what the rows there add to it, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.support.evaluated import identity_sae, save_sae, toy_config
from tests.support.tiny import make_subject
from winnow.cli.main import app
from winnow.explorer.index.directions import require_written
from winnow.explorer.index.promoted import promoted_columns
from winnow.explorer.index.subjects import LazySubject
from winnow.explorer.index.table import FeatureTable
from winnow.sae import Sae
from winnow.schemas.errors import ConfigError
from winnow.store.objects import open_store
from winnow.subject import Subject


# Heads as wide as the stream behind a linear layer without a bias, and behind one that has a bias and its
# matrix the other way round; twice as wide; with a norm between projection and stream.
@pytest.mark.parametrize(
    ("architecture", "extra"), [("llama", {}), ("gpt2", {}), ("qwen3", {"head_dim": 16}), ("gemma2", {})]
)
def test_a_latent_of_the_heads_promotes_what_their_projection_makes_of_it(
    architecture: str, extra: dict[str, object], tmp_path: Path
) -> None:
    folder = make_subject(tmp_path / "subject", architecture, layers=2, **extra)
    subject = Subject.load({"model": str(folder), "device": "cpu"})
    (site,) = subject.sites(["attn_z.1"])
    sae = Sae(site.d_model, 6, 2, "none")
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(6, site.d_model, generator=torch.Generator().manual_seed(0)))
    card = sae.save(open_store(str(tmp_path / "sae")), hook="attn_z.1")
    lazy = {"": LazySubject(subject.spec, subject.identity)}
    found = promoted_columns(sae, card, lazy, 5)(1, 5)

    model, block = subject.model, subject.layout
    matrix = model.get_submodule(block.path(1, "projection")).weight.detach()
    matrix = matrix if architecture == "gpt2" else matrix.T
    added = sae.W_dec.detach()[1:5] @ matrix
    if (norm := block.path(1, "attention_post_norm")) is not None:
        added = model.get_submodule(norm)(added)
    final, head = model.get_submodule(block.final_norm), model.get_output_embeddings()
    with torch.no_grad():
        logits = head(final(added)) - head(final(torch.zeros_like(added)))
    assert found["promoted_ids"].to_pylist() == logits.topk(5).indices.tolist()
    assert found["suppressed_ids"].to_pylist() == logits.topk(5, largest=False).indices.tolist()


def test_what_the_stream_never_holds_is_refused_before_a_row_is_encoded(tmp_path: Path) -> None:
    config = toy_config(tmp_path, units=1, plan={"hooks": ["mlp_in.1"]})
    uri = save_sae(config, tmp_path / "sae", identity_sae(), hook="mlp_in.1")

    def index(*more: str) -> tuple[int, str]:
        done = CliRunner().invoke(app, ["index", uri, "--root", config.root, *more])
        return done.exit_code, " ".join(done.stderr.split())

    code, told = index()
    assert code == 2
    assert "got mlp_in.1, which the MLP alone reads. Index with `--logits 0`" in told
    assert not (tmp_path / "sae" / "features").exists()
    assert index("--logits", "0")[0] == 0
    with pytest.raises(ConfigError, match=r"got base/router\.3, which only chooses experts"):
        require_written(["base/resid_post.3", "base/router.3"])


def test_an_index_with_tokens_of_rows_that_are_no_directions_is_refused(tmp_path: Path) -> None:
    config = toy_config(tmp_path, units=1, plan={"hooks": ["attn_z.1", "mlp_in.1"]})

    def index(hook: str, *more: str) -> tuple[Path, Callable[[], tuple[int, str]]]:
        uri = save_sae(config, tmp_path / hook, identity_sae(), hook=hook)

        def run() -> tuple[int, str]:
            done = CliRunner().invoke(app, ["index", uri, "--root", config.root, *more])
            return done.exit_code, " ".join(done.stderr.split())

        assert run()[0] == 0
        return tmp_path / hook / "features" / "index.json", run

    def change(path: Path, **fields: object) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    # Written now: read again. As an earlier version wrote it, without the mark: not read, and not kept.
    heads, again = index("attn_z.1")
    assert json.loads(heads.read_text())["projected"]
    FeatureTable.open(str(heads.parent))
    assert again()[0] == 0
    change(heads, projected=False)
    code, told = again()
    assert code == 2
    assert "an earlier version took the rows at attn_z.1 for directions of the residual stream" in told
    assert "Delete this folder and run `winnow index` again" in told
    with pytest.raises(ConfigError, match=r"wrong promoted tokens.* attn_z\.1"):
        FeatureTable.open(str(heads.parent))

    mlp, _ = index("mlp_in.1", "--logits", "0")
    written = json.loads(mlp.read_text())
    assert "projected" not in written
    FeatureTable.open(str(mlp.parent))
    change(mlp, spec=written["spec"] | {"logits": 12})
    with pytest.raises(ConfigError, match=r"wrong promoted tokens.* mlp_in\.1"):
        FeatureTable.open(str(mlp.parent))
