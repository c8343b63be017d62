import importlib.util
import io
import json
import logging
import re
import sys

import pytest
import typer
from rich.console import Console

from winnow.cli import console
from winnow.cli.console import guard, print_table
from winnow.common.config_file import load_config
from winnow.common.reporter import Progress, say
from winnow.schemas.base import validate
from winnow.schemas.config import StorageSpec
from winnow.schemas.errors import ConfigError, IntegrityError, MissingObject, NonFiniteError, StoreError
from winnow.schemas.harvest import Moments


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_sets_win_over_the_file_and_are_yaml(tmp_path):
    path = write(tmp_path, "root: a\nharvest: {actors: 2}\n")
    config = load_config(
        str(path),  # a path or its text
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
        ("root: a\n", ["train.latent=8"], "train.latent: no such field; did you mean latents"),
        ("root: a\n", ["train.mesh.dat=2"], "train.mesh.dat: no such field; did you mean data"),
        ("root: a\ncorpus: {sources: [{urri: x}]}\n", [], "urri (line 2): no such field; did you mean uri"),
        ("root: a\n", ["harvst.actors=2"], "harvst: no such field; did you mean harvest"),
        ("root: a\n", ["latents=8"], "latents: no such field; did you mean train.latents"),
        ("root: a\n", ["evaluate.metrics=[reconstructin]"], "'reconstructin'); did you mean reconstruction"),
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
    with pytest.raises(ConfigError, match=re.escape(names)):
        load_config(write(tmp_path, text), sets)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("root: a\nharvest:\n  actors: 1\n  actors: 2\n", r"line 4: .*harvest\.actors again, after line 3"),
        ("root: a\n'root': b\n", "line 2: .*root again, after line 1"),
        ("root: a\ncorpus: {sources: [{uri: a, uri: b}]}\n", r"line 2: .*corpus\.sources\.0\.uri again"),
        ("root: a\nharvest: {actors: 010}\n", r"line 2: .*without leading zeros.*got 010"),
        ("root: a\nharvest: {actors: 08}\n", r"line 2: .*without leading zeros"),
        ("root: a\nharvest: {actors: 1:30}\n", r"harvest\.actors \(line 2\): .*integer.*'1:30'"),
        ("root: a\nharvest: {actors: yes}\n", r"harvest\.actors \(line 2\): .*integer.*'yes'"),
        ("root: a\nharvest:\n  actors: true\n", r"harvest\.actors \(line 3\): expected a number, got true"),
        (
            "root: a\nplan:\n  hooks: [resid_post.1, null]\n",
            r"hooks\.1 \(line 3\): [^;]*\(got None\)\. Correct",
        ),
        (
            "root: a\nplan: {hooks: [mlp_in.3-1]}\n",
            r"hooks \(line 2\): a range .* upwards, got 'mlp_in\.3-1'",
        ),
        ("root: a\nharvest: {actors: !!int '010'}\n", "line 2: .*without a tag.*got !!int"),
        ("root: a\nharvest:\n  actors: !!int ''\n", "line 3: .*without a tag"),
        ("root: !!timestamp a\n", "line 1: .*without a tag.*!!timestamp"),
        ("root: a\nplan: !!set {hooks}\n", "line 2: .*without a tag.*!!set"),
        ("root: a\n!!bool maybe: 1\n", "line 2: .*without a tag.*!!bool"),
        ("root: a\nplan: !!python/name:os.system\n", "line 2: .*without a tag"),
        ("root: a\nharvest:\n  temp_dir: None\n", r"line 3: expected null, got None"),
        ("root: a\nharvest:\n  gpus_per_actor: .inf\n", r"gpus_per_actor \(line 3\): .*finite number"),
        ("root: a\nstorage:\n  timeout_seconds: .nan\n", r"timeout_seconds \(line 3\): .*finite number"),
        ("root: a\nstorage: {timeout_seconds: 1e999}\n", r"timeout_seconds \(line 2\): .*finite number"),
        ("root: a\nstorage: {timeout_seconds: inf}\n", r"timeout_seconds \(line 2\): .*finite number"),
        ("root: a\nsubject:\n  modell: gpt2\n", r"modell \(line 3\).*|model \(line 2\): Field required"),
        ("root: a\non: 1\n", r"on \(line 2\)"),
        ("root: &a [*a]\n", "root"),
    ],
)
def test_what_two_readers_of_yaml_would_take_differently_is_refused_with_its_line(tmp_path, text, names):
    with pytest.raises(ConfigError, match=names):
        load_config(write(tmp_path, text))


def test_yaml_means_what_it_says(tmp_path):
    text = """\
root: 2026-01-01
subject: {model: no, revision: '010'}
corpus: {sources: [&file {uri: 1e3.txt, format: txt}, {<<: *file, uri: b.txt}], deduplicate: no}
harvest: {gpus_per_actor: 1e-3, actors: 1_000, threads_per_actor: 0x10, temp_dir: ~}
storage: {timeout_seconds: 1e2, allow_http: on, cache_bytes: 64e9}
"""
    config = load_config(write(tmp_path, text))
    assert config.root == "2026-01-01"
    assert config.subject is not None
    assert (config.subject.model, config.subject.revision) == ("no", "010")
    assert config.corpus is not None
    assert config.corpus.deduplicate is False
    assert [(source.uri, source.format) for source in config.corpus.sources] == [
        ("1e3.txt", "txt"),
        ("b.txt", "txt"),
    ]
    harvest, storage = config.harvest, config.storage
    assert (harvest.gpus_per_actor, harvest.actors, harvest.threads_per_actor) == (0.001, 1000, 16)
    assert harvest.temp_dir is None
    assert (storage.timeout_seconds, storage.allow_http, storage.cache_bytes) == (100.0, True, 64 * 10**9)


@pytest.mark.parametrize(
    ("item", "names"),
    [
        ("harvest={actors: 1, actors: 2}", r"--set harvest, line 1: .*actors again"),
        ("harvest.actors=010", "--set harvest.actors, line 1: .*leading zeros"),
        ("storage.timeout_seconds=.inf", r"storage\.timeout_seconds: .*finite number"),
        ("harvest.actors=true", r"harvest\.actors: expected a number, got true"),
        ("root=runs/a #1", "a comment in 'runs/a #1'.*if it is text: --set root=\"'runs/a #1'\""),
        ("root=#1", "a comment in '#1'"),
        ("root=@x", "--set root: expected a YAML value.*Quote it .*--set root=\"'@x'\""),
        ("root=*.txt", "--set root=\"'\\*.txt'\""),
        ("root=part[1]'s: [a", "--set root=\"'part\\[1\\]''s: \\[a'\""),
        ("root=[1].txt", "--set root=\"'\\[1\\].txt'\""),
        ("root=&name folder", "on one line, got '&name folder'"),
        ("root=--- folder", "on one line"),
        ("root=two\nlines", "on one line"),
        ("root=two\x85lines", "on one line"),
        ("root=!name folder", "without a tag, .*got !name"),
    ],
)
def test_a_set_that_means_something_else_is_refused(tmp_path, item, names):
    with pytest.raises(ConfigError, match=names):
        load_config(write(tmp_path, "root: a\nstorage:\n  timeout_seconds: 1\n"), [item])


def test_the_last_of_several_sets_wins_and_any_name_can_be_set(tmp_path):
    path = write(tmp_path, "root: a\nharvest: {actors: 1}\n")
    config = load_config(path, ["harvest.actors=2", "harvest.actors=3", "root=s3://b/date=1/a#b%20ä?"])
    assert (config.harvest.actors, config.root) == (3, "s3://b/date=1/a#b%20ä?")
    assert load_config(path, ["root='runs/a #1'"]).root == "runs/a #1"


def test_every_float_of_a_contract_is_finite():
    for number in (float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="finite number"):
            validate(StorageSpec, {"timeout_seconds": number}, origin="test")
        with pytest.raises(ConfigError, match="finite number"):
            validate(Moments, {"rows": 1, "sums": [number], "squares": [0.0]}, origin="test")


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


class OutOfMemoryError(RuntimeError):
    """Named as torch's of a GPU, which is known by its name."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 3 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3 bytes"),
        OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_lack_of_memory_is_a_sentence_whichever_library_finds_it(error, capsys):
    with pytest.raises(typer.Exit) as caught, guard():
        raise error
    assert caught.value.exit_code == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert shown.startswith(f"error: this process ran out of memory ({error}).")
    assert "run the same command again" in shown
    with pytest.raises(RuntimeError, match="shapes"), guard():
        raise RuntimeError("shapes")


def test_errors_are_their_builtins_too():
    assert issubclass(ConfigError, ValueError)
    assert issubclass(MissingObject, FileNotFoundError)
    assert issubclass(StoreError, OSError)


def test_emit_writes_one_json_object(capsys):
    console.emit({"b": 1, "a": 2.5}, True, lambda: None)
    assert json.loads(capsys.readouterr().out) == {"a": 2.5, "b": 1}


def test_a_command_shows_lines_progress_and_warnings_on_stderr_and_only_inside_guard(capsys):
    log = logging.getLogger("winnow.store")
    with guard():
        say("one fact")
        with Progress("work", 4, "rows") as bar:
            bar.advance(4, fvu="0.5")
        log.warning("the cache at %s is full", "/x")
        log.info("a detail")
    say("after")
    log.warning("after")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert (out, lines[0], lines[-1]) == ("", "one fact", "warning: the cache at /x is full")
    assert [line.split(",")[0] for line in lines[1:-1]] == ["work: 4/4 (100%) rows"]


def test_a_guard_inside_another_shows_a_warning_once_and_leaves_the_outer_as_it_was(capsys):
    with guard():
        with guard():
            logging.getLogger("winnow.trainer").warning("inner")
        logging.getLogger("winnow.trainer").warning("outer")
    assert capsys.readouterr().err.splitlines() == ["warning: inner", "warning: outer"]


def test_on_a_terminal_lines_stand_above_a_live_bar(monkeypatch):
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=120, markup=False, highlight=False)
    monkeypatch.setattr(console, "stderr", terminal)
    with guard(), Progress("work", 4, "rows", done=1) as bar:
        bar.advance(1, fvu="0.5")
        say("a fact")
        logging.getLogger("winnow.harvester").warning("unit 3 failed")
        bar.advance(2, fvu="0.25")
    text = shown.getvalue()
    assert "a fact" in text
    assert "warning: unit 3 failed" in text
    last = text.rsplit("work", 1)[1]
    assert "4/4" in last
    assert "rows/s" in last
    assert "fvu 0.25" in last


def test_names_are_printed_as_they_are(capsys):
    name = "runs/[red]a[/] :bug: [link=x]"
    print_table(name, [(name, "1")], header=(name, name))
    assert capsys.readouterr().out.count(name) == 4
    with guard():
        say(name)
    assert capsys.readouterr().err == name + "\n"


def test_a_table_in_a_pipe_is_never_cut(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    names = [f"runs/{'long' * 20}-{number}" for number in range(4)]
    print_table("runs", [names], header=names)
    shown = capsys.readouterr().out
    assert [shown.count(name) for name in names] == [2] * 4


# Any command, whichever of its libraries imports PyTorch first; a search alone stands in for the import.
@pytest.mark.parametrize(
    ("loaded", "rank", "said"), [(False, None, ["loading PyTorch"]), (True, None, []), (False, "1", [])]
)
def test_a_command_says_once_that_pytorch_is_loaded(monkeypatch, capsys, loaded, rank, said):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    if loaded:
        monkeypatch.setitem(sys.modules, "torch", json)  # any module
    else:
        monkeypatch.delitem(sys.modules, "torch", raising=False)
    finders = list(sys.meta_path)
    with guard():
        for _ in range(2):
            importlib.util.find_spec("torch")
    assert capsys.readouterr().err.splitlines() == said
    assert sys.meta_path == finders


def test_a_command_that_needs_no_pytorch_says_nothing_of_it(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    finders = list(sys.meta_path)
    with guard():
        say("a fact")
    assert capsys.readouterr().err.splitlines() == ["a fact"]
    assert sys.meta_path == finders
