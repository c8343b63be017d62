"""The index against brute force over the whole dataset, its resume, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from tests.support.dying_indexer import MARK, DyingWorker
from tests.support.explorer_site import HOOK, LATENTS, SPEC, Site, make_site
from winnow.cli.main import app
from winnow.explorer.index import build as index_module
from winnow.explorer.index import crew
from winnow.explorer.index.build import Indexer, Recipe, open_index_store
from winnow.explorer.index.latents import TOP_BAND
from winnow.explorer.index.subjects import LazySubject
from winnow.explorer.index.table import FeatureTable, part_key
from winnow.explorer.place import Place
from winnow.sae.model import Sae
from winnow.schemas.errors import ConfigError, IntegrityError, SaeMismatch
from winnow.schemas.training import SaeIdentity, SaeParts
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.subject.load import Subject


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Site:
    return make_site(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def table(site) -> FeatureTable:
    return FeatureTable.open(
        f"{site.saes[0]}/features", sae_sha256=Sae.load(site.saes[0]).card.weights_sha256
    )


@pytest.fixture(scope="module")
def dense(site) -> np.ndarray:
    """Activations float32 [windows, T, N] by brute force; 0 where nothing is read."""
    dataset, sae = ActivationStore.open(site.root), Sae.load(site.saes[0])
    values, indices = sae.encode(torch.from_numpy(dataset.read_rows(HOOK, 0, dataset.rows)))
    codes = torch.zeros(dataset.rows, LATENTS).scatter_add_(1, indices, values).numpy()
    codes *= dataset.weights([HOOK], 0, dataset.rows)[:, None]
    out = np.zeros((dataset.plan.windows, dataset.plan.spec.context_length, LATENTS), np.float32)
    window, position = dataset.locate(np.arange(dataset.rows))
    out[window, position] = codes
    return out


@pytest.mark.parametrize("latent", [0, 17, LATENTS - 1])
def test_figures_are_those_of_all_rows(table, dense, latent):
    found, mine = table.latent(latent), dense[..., latent]
    active = mine[mine > 0].astype(np.float64)
    assert found["fires"] == len(active) == sum(found["histogram"])
    assert table.density()[latent] == pytest.approx(len(active) / table.meta.rows)
    assert found["largest"] == pytest.approx(active.max())
    assert found["mean"] == pytest.approx(active.mean(), rel=1e-6)
    assert found["mean_square"] == pytest.approx(np.square(active).mean(), rel=1e-6)
    np.testing.assert_allclose(found["quantiles"], np.quantile(active, [0, 1 / 3, 2 / 3, 1]), rtol=1e-6)


@pytest.mark.parametrize("latent", [0, 17])
def test_the_best_windows_are_the_best_and_draws_lie_in_their_bands(site, table, dense, latent):
    found, mine = table.latent(latent), dense[..., latent]
    dataset = ActivationStore.open(site.root)
    peaks = np.sort(mine.max(1))[::-1]
    best = [each for each in found["examples"] if each["band"] == TOP_BAND]
    assert [max(each["values"]) for each in best] == pytest.approx(peaks[: SPEC.top])
    drawn = [each for each in found["examples"] if each["band"] != TOP_BAND]
    assert len(drawn) == SPEC.bands * SPEC.per_band
    for each in found["examples"]:
        span = slice(each["first"], each["first"] + len(each["tokens"]))
        assert each["tokens"] == dataset.tokens(each["window"])[span].tolist()
        np.testing.assert_array_equal(each["values"], mine[each["window"], span])
        assert each["position"] - each["first"] <= SPEC.before
        value = mine[each["window"], each["position"]]
        if each["band"] != TOP_BAND:
            low, high = found["quantiles"][each["band"] : each["band"] + 2]
            assert low - 1e-6 <= value <= high + 1e-6


def test_logits_are_the_norm_and_unembedding_of_the_row(site, table):
    subject, sae = Subject.load(site.config.subject), Sae.load(site.saes[0])
    row = sae.W_dec[17] / sae.W_dec[17].square().mean().sqrt()  # RMS norm of a lone direction
    logits = subject.model.lm_head(subject.model.model.norm.weight * row)
    logits = (logits - logits.mean()).detach()
    found = table.latent(17)
    assert found["promoted_ids"] == logits.topk(SPEC.logits).indices.tolist()
    assert found["suppressed_logits"] == pytest.approx(
        logits.topk(SPEC.logits, largest=False).values.tolist(), rel=1e-3
    )


def test_neighbours_are_exact(site, table, dense):
    rows = Sae.load(site.saes[0]).W_dec
    cosine = (rows @ rows.T).fill_diagonal_(-2)
    found = table.latent(17)
    assert found["cosine_ids"] == cosine[17].topk(SPEC.neighbours).indices.tolist()
    active = (dense > 0).reshape(-1, LATENTS).astype(np.float64)
    together = active.T @ active
    fires = np.diag(together).copy()
    score = together / np.sqrt(np.outer(fires, fires))
    np.fill_diagonal(score, 0)
    rare = int(np.argmin(np.where(fires > 0, fires, np.inf)))
    assert fires[rare] <= SPEC.coactivation_rows or fires[17] > SPEC.coactivation_rows
    exact = rare if fires[rare] <= SPEC.coactivation_rows else None
    if exact is not None:
        found = table.latent(exact)
        np.testing.assert_allclose(
            found["coactive_scores"], np.sort(score[exact])[::-1][: SPEC.neighbours], rtol=1e-5
        )
    drawn = table.latent(17)
    for other, value in zip(drawn["coactive_ids"], drawn["coactive_scores"], strict=True):
        assert value == pytest.approx(score[17, other], abs=0.25)  # 64 of its rows were looked at


def test_the_summary_repeats_the_parts(table):
    for latent in (0, 17):
        found = table.latent(latent)
        assert table.column("fires")[latent] == found["fires"]
        assert table.column("logit_peak")[latent] == pytest.approx(found["promoted_logits"][0])
        assert table.summary.column("promoted")[latent].as_py() == found["promoted_ids"][:6]
    assert len(table.texts) == table.meta.subject.vocabulary
    with pytest.raises(ConfigError):
        table.latent(LATENTS)


def indexer_of(site: Site, out: Path, **fields) -> Indexer:
    dataset = ActivationStore.open(site.root)
    subject = LazySubject(site.config.subject, dataset.plan.subject)
    store, scratch = open_index_store(str(out), None)
    spec = SPEC.model_copy(update={"logits": 0} | fields)
    return Indexer(
        dataset,
        site.root,
        Sae.load(site.saes[0]),
        store,
        scratch,
        spec,
        {"": subject},
        part_latents=16,
    )


def files_of(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.parquet"))}


def test_a_killed_index_goes_on_and_ends_with_the_same_bytes(site, tmp_path, monkeypatch):
    whole = indexer_of(site, tmp_path / "whole")
    whole.run()
    expected = files_of(tmp_path / "whole")
    assert sum(key.startswith("latents/") for key in expected) == 3

    class Killed(Exception): ...

    steps = 0

    def kill_at(stop):
        def progress(step, done, total):
            nonlocal steps
            steps += 1
            if steps == stop:
                raise Killed

        return progress

    for stop in (3, 5):  # in the middle of the units, and of the parts
        steps = 0
        with pytest.raises(Killed):
            indexer_of(site, tmp_path / "cut").run(kill_at(stop))
    made: list[int] = []
    original = index_module.make_block
    monkeypatch.setattr(index_module, "make_block", lambda *args: made.append(args[3]) or original(*args))
    indexer_of(site, tmp_path / "cut").run()
    assert files_of(tmp_path / "cut") == expected
    assert not (tmp_path / "cut" / "scratch").exists()
    made.clear()
    indexer_of(site, tmp_path / "cut").run()
    assert made == []  # a finished index is only shown


def test_two_workers_one_of_which_dies_make_the_same_bytes(site, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(crew, "IndexWorker", DyingWorker)
    monkeypatch.setenv(MARK, str(tmp_path / "died"))
    alone, shared = (
        Recipe(
            site.saes[0], site.root, str(tmp_path / name), None, SPEC, site.config.subject, part_latents=16
        )
        for name in ("alone", "shared")
    )
    steps: list[tuple[str, int, int]] = []
    alone.open().run()
    with crew.crew_of(shared, 2, threads=1) as make_all:
        meta = shared.open().run(lambda *step: steps.append(step), make_all)
    assert (tmp_path / "died").exists()
    assert "tried again" in caplog.text
    assert files_of(tmp_path / "shared") == files_of(tmp_path / "alone")
    assert not (tmp_path / "shared" / "scratch").exists()
    assert [done for step, done, _ in steps if step == "units"] == list(range(meta.windows // 64 + 1))
    assert steps[-1] == ("latents", LATENTS, LATENTS)


def test_a_worker_that_does_not_see_the_scratch_folder_says_so(site, tmp_path):
    recipe = Recipe(site.saes[0], site.root, str(tmp_path), None, SPEC, site.config.subject)
    with pytest.raises(ConfigError, match="--scratch"):
        crew.IndexWorker(recipe, threads=torch.get_num_threads()).ready()


def test_another_index_is_not_mixed_in(site, tmp_path):
    indexer_of(site, tmp_path / "a").run()
    with pytest.raises(ConfigError, match="another index"):
        indexer_of(site, tmp_path / "a", top=5).run()
    unfinished = indexer_of(site, tmp_path / "b")
    unfinished._claim()
    with pytest.raises(ConfigError, match="another, unfinished index"):
        indexer_of(site, tmp_path / "b", top=5).run()


@pytest.mark.parametrize("what", ["hook", "width D", "subject", "hooks"])
def test_an_sae_that_the_dataset_does_not_fit_is_refused(site, tmp_path, what):
    width, identity, hooks = ActivationStore.open(site.root).d_model(HOOK), None, {"hook": HOOK}
    parts = SaeParts(widths=(width, width)) if what == "hooks" else SaeParts()
    if what == "hook":
        hooks["hook"] = "resid_post.0"
    elif what == "hooks":
        hooks["with_hooks"] = ("resid_post.0",)
    elif what == "subject":
        identity = SaeIdentity(
            plan_fingerprint="0" * 64,
            dataset_sha256=None,
            subject_model="another/model",
            subject_weights_sha256="0" * 64,
        )
    size = {"hooks": 2 * width, "width D": width + 1}.get(what, width)
    Sae(size, LATENTS, 2, "none", parts).save(open_store(str(tmp_path / "sae")), identity=identity, **hooks)
    recipe = Recipe(str(tmp_path / "sae"), site.root, str(tmp_path / "index"), None, SPEC)
    with pytest.raises(SaeMismatch, match=f"the {what.removesuffix('s')} of the SAE: expected"):
        recipe.open()
    assert not list((tmp_path).glob("index/*"))


def test_damage_is_noticed(site, tmp_path):
    indexer_of(site, tmp_path / "a").run()
    path = tmp_path / "a" / part_key(0)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0xFF
    path.write_bytes(data)
    table = FeatureTable.open(str(tmp_path / "a"))
    with pytest.raises(IntegrityError):
        [table.latent(latent) for latent in range(16)]


def test_the_command_says_what_is_wrong(site, tmp_path):
    result = CliRunner().invoke(app, ["index", site.saes[0]])
    assert result.exit_code == 2
    assert "--root" in result.output
    open_store(str(tmp_path / "empty")).put("x", b"")
    with pytest.raises(ConfigError, match="no finished index"):
        FeatureTable.open(str(tmp_path / "empty"))
    assert Place.of(site.config_path, "elsewhere").root == "elsewhere"
