import json

import pytest
import typer

from schemas.errors import ConfigError, IntegrityError, MissingObject, NonFiniteError, StoreError
from store import console
from store.console import Progress, guard, load_config, print_table, say


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_sets_win_over_the_file_and_are_yaml(tmp_path):
    path = write(tmp_path, "root: a\nharvest: {actors: 2}\n")
    config = load_config(
        path,
        ["root=b", "harvest.batch_windows=4", "storage.allow_http=true", "harvest.temp_dir=null"],
    )
    assert config.root == "b"
    assert config.harvest.actors == 2
    assert config.harvest.batch_windows == 4
    assert config.storage.allow_http is True
    assert config.harvest.temp_dir is None


def test_sets_reach_into_lists_and_open_absent_sections(tmp_path):
    path = write(tmp_path, "root: a\ncorpus: {sources: [{uri: x.txt}]}\n")
    config = load_config(
        path, ["corpus.sources.0.uri=y.txt", "train.out=r", "train.hook=h.0", "train.latents=8", "train.k=2"]
    )
    assert config.corpus is not None
    assert config.corpus.sources[0].uri == "y.txt"
    assert config.train is not None
    assert config.train.latents == 8


@pytest.mark.parametrize(
    ("text", "sets", "names"),
    [
        ("root: a\nbogus: 1\n", [], "bogus"),
        ("root: a\n", ["nonsense"], "dotted.key=value"),
        ("- a\n", [], "mapping"),
        ("root: [", [], "YAML"),
        ("root: a\n", ["harvest.actors=0"], "harvest.actors"),
        ("root: a\ncorpus: {sources: []}\n", ["corpus.sources.3.uri=x"], "list index"),
        ("root: a\n", ["train={out: r, hook: h.0, latents: 8, k: 9}"], "K <= N"),
        ("root: a\n", ["train={out: r, hook: h.0, latents: 8, k: 2, batch_rows: 100}"], "batch_rows"),
    ],
)
def test_bad_config_is_one_sentence_that_names_the_field(tmp_path, text, sets, names):
    with pytest.raises(ConfigError, match=names.replace(".", r"\.")):
        load_config(write(tmp_path, text), sets)


def test_a_missing_file_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError, 2), (StoreError, 2), (NonFiniteError, 2), (MissingObject, 1), (IntegrityError, 1)],
)
def test_errors_become_exit_codes(error, code, capsys):
    with pytest.raises(typer.Exit) as caught, guard():
        raise error("thing", expected="x", got="y", fix="Do z")
    assert caught.value.exit_code == code
    shown = " ".join(capsys.readouterr().err.split())
    assert "thing: expected x, got y. Do z." in shown


def test_errors_are_their_builtins_too():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(MissingObject, FileNotFoundError)
    assert issubclass(StoreError, OSError)


def test_emit_writes_one_json_object(capsys):
    console.emit({"b": 1, "a": 2.5}, True, lambda: None)
    assert json.loads(capsys.readouterr().out) == {"a": 2.5, "b": 1}


def test_progress_counts_only_this_run_into_the_rate(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with Progress("work", 100, "rows", done=40) as bar:
        now[0] = 110.0
        bar.advance(20, fvu="0.5")
        assert bar.rate == pytest.approx(2.0)
        assert bar.eta_seconds == pytest.approx(20.0)
    shown = capsys.readouterr().err
    assert "60/100 (60%) rows, 2/s, ETA 0:20  fvu 0.5" in shown


def test_human_bytes():
    assert console.human_bytes(10) == "10 B"
    assert console.human_bytes(3 * 2**30) == "3.0 GiB"


def test_names_are_printed_as_they_are(capsys):
    name = "runs/[red]a[/] :bug: [link=x]"
    print_table(name, [(name, "1")], header=(name, name))
    assert capsys.readouterr().out.count(name) == 4
    say(name)
    assert capsys.readouterr().err == name + "\n"
