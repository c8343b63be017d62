"""The command before any stage is imported: its list, its help, its version, its completion."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer
from typer.main import get_group
from typer.testing import CliRunner

import winnow
from winnow.cli.estimate import CARDS
from winnow.cli.evaluate import FAMILIES
from winnow.cli.formats import READ, WRITTEN
from winnow.cli.main import COMMANDS, ELSEWHERE, app, load_command
from winnow.cli.recovery import ALL

STAGES = {"fastapi", "matplotlib", "numpy", "obstore", "pyarrow", "ray", "scipy", "torch", "transformers"}
"""Packages that stages import. The list of commands does without pydantic too; typer itself may take it."""
COMMAND = Path(sys.executable).parent / "winnow"
IMPORTED = """
import contextlib, io, json, sys
from winnow.cli.main import app
found = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            app(arguments)
        except SystemExit as end:
            found.append([end.code, out.getvalue()])
print(json.dumps([found, sorted(sys.modules)]))
"""


def python(code: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def bash(script: str, cwd: Path) -> str:
    done = subprocess.run(
        ["bash", "--norc", "-c", script],
        cwd=cwd,
        env={**os.environ, "PATH": f"{COMMAND.parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]], ids=" ".join)
def test_the_list_of_commands_imports_no_command(arguments):
    [[code, out]], modules = json.loads(python(IMPORTED, json.dumps([arguments])))
    assert code == 0
    assert "Usage: " in out or out.startswith("winnow ")
    assert not set(modules) & {*STAGES, "pydantic"}
    ours = {name for name in modules if name.partition(".")[0] == "winnow"}
    assert ours <= {"winnow", "winnow.cli", "winnow.cli.main", "winnow.schemas", "winnow.schemas.errors"}


def test_no_stage_is_imported_for_the_help_of_a_command():
    results, modules = json.loads(python(IMPORTED, json.dumps([[name, "--help"] for name in COMMANDS])))
    for name, (code, out) in zip(COMMANDS, results, strict=True):
        assert code == 0
        assert f" {name} " in out
    assert not set(modules) & STAGES


def test_importing_winnow_imports_none_of_its_names():
    found = json.loads(
        python("import winnow, json, sys; dir(winnow); print(json.dumps(sorted(sys.modules)))")
    )
    assert not set(found) & {*STAGES, "pydantic", "typer", "rich", "importlib.metadata"}
    assert [name for name in found if name.partition(".")[0] == "winnow"] == ["winnow"]


def test_every_name_of_the_front_door_is_there_and_no_other():
    assert dir(winnow) == sorted(winnow.__all__)
    for name in winnow.__all__:
        assert getattr(winnow, name) is getattr(winnow, name)
    from winnow.common.reporter import reporting
    from winnow.evaluator.report import evaluate
    from winnow.sae.model import Sae
    from winnow.trainer.run.loop import train

    assert (winnow.Sae, winnow.evaluate, winnow.reporting, winnow.train) == (Sae, evaluate, reporting, train)
    with pytest.raises(AttributeError, match="module 'winnow' has no attribute 'Foo'"):
        winnow.Foo  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Foo'"):
        from winnow import Foo  # noqa: F401


def test_the_table_names_exactly_the_commands_that_the_modules_register():
    modules = sorted(path.stem for path in Path(winnow.__path__[0], "cli").glob("*.py"))
    registered: dict[str, str] = {}
    for module in modules:
        register = getattr(import_module(f"winnow.cli.{module}"), "register", None)
        if register is not None:
            group = typer.Typer()
            register(group)
            registered |= dict.fromkeys(get_group(group).commands, module)
    assert registered == {name: entry.module for name, entry in COMMANDS.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_line_of_the_table_is_what_the_command_says_about_itself(name):
    real, listed = load_command(name), get_group(app).commands[name]
    assert real.name == listed.name == name
    assert " ".join(real.help.split("\n\n")[0].split()) == COMMANDS[name].line
    assert real.get_short_help_str() == listed.get_short_help_str()


def test_names_that_a_help_lists_are_those_of_the_room():
    from winnow.evaluator.recovery.train import VARIANTS
    from winnow.sae.formats.convert import READERS, WRITERS
    from winnow.schemas import evaluation
    from winnow.trainer.plan.rates import GPUS

    assert ", ".join(READERS) == READ
    assert ", ".join(WRITERS) == WRITTEN
    assert ",".join(VARIANTS) == ALL
    assert ", ".join(evaluation.FAMILIES) == FAMILIES
    assert " or ".join(sorted(GPUS)) == CARDS


def test_a_mistyped_command_is_corrected_and_none_shows_the_list():
    result = CliRunner().invoke(app, ["trian"])
    assert result.exit_code == 2
    assert "Did you mean 'train'?" in result.stderr
    assert all(name in CliRunner().invoke(app, []).output for name in COMMANDS)


@pytest.mark.parametrize("word", ELSEWHERE)
def test_what_is_elsewhere_is_said_to_be_there(word):
    assert word not in COMMANDS
    result = CliRunner().invoke(app, [word, "runs/x"])
    assert result.exit_code == 2
    said = " ".join(result.stderr.replace("│", " ").split())
    assert f"No such command '{word}'." in said
    assert re.search(r"`winnow (explore|evaluate|runs) ", said)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_says_what_each_argument_and_option_is_in_a_sentence_and_shows_an_example(name):
    command = load_command(name)
    for parameter in command.params:
        assert parameter.help, parameter.name
        assert parameter.help.endswith("."), parameter.help
        # A default that the help names is not shown a second time as the number that stands for it.
        named = "default" in parameter.help.lower() and parameter.default not in (None, [], ())
        assert not (named and parameter.show_default), parameter.help
        assert not (parameter.nargs == -1 and "..." in parameter.metavar), (
            parameter.metavar
        )  # typer adds them
    assert "Example" in f"{command.help} {command.epilog}"


@pytest.mark.parametrize("command", ["plan", "harvest", "train", "sweep", "estimate"])
def test_a_mistake_in_a_config_is_told_before_a_large_library_is_loaded(command, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("root: data\ntrain: {out: runs/x, hook: a.b, latents: 8, k: 2, epoch: 3}\n")
    [[code, _]], modules = json.loads(python(IMPORTED, json.dumps([[command, str(path)]])))
    assert code == 2
    assert not set(modules) & {"torch", "scipy", "transformers", "ray"}


@pytest.mark.parametrize("arguments", [["runs", "."], ["watch", "."], ["stop", "."], ["resume", "."]])
def test_what_only_reads_a_status_waits_for_no_large_library(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [[code, _]], modules = json.loads(python(IMPORTED, json.dumps([arguments])))
    assert code == 2  # nothing is there: each has looked
    assert not set(modules) & {"torch", "pyarrow", "scipy", "transformers", "ray", "zarr", "matplotlib"}


def test_what_fills_and_lists_a_queue_waits_for_no_large_library(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "root: data/x\ntrain: {out: runs/x, hook: a.b, latents: 8, k: 2}\n"
        "sweep: {out: runs/grid, grid: {k: [1, 2]}}\n"
    )
    arguments = [["submit", "run.yaml", "--to", "queue"], ["runs", "queue"]]
    results, modules = json.loads(python(IMPORTED, json.dumps(arguments)))
    assert [code for code, _ in results] == [0, 0]
    assert "waiting" in results[1][1]
    assert not set(modules) & {"torch", "pyarrow", "scipy", "transformers", "ray", "zarr", "matplotlib"}


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"winnow {winnow.__version__}\n")


def test_a_copy_of_the_source_that_is_not_installed_says_so(tmp_path):
    """The nodes of a Ray cluster get one as their working folder."""
    (tmp_path / "winnow").symlink_to(Path(winnow.__path__[0]), target_is_directory=True)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import winnow; print(winnow.__version__)"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "0+unknown\n"


@pytest.mark.parametrize("module", ["winnow", "winnow.trainer"])
def test_modules_are_run_by_their_names(module):
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=120, check=True
    )
    assert f"Usage: python -m {module} " in done.stdout


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        (["winnow", "ex"], ["export", "explore", "export-features"]),
        (["winnow", "--v"], ["--version"]),
        (["winnow", "train", "--ex"], ["--extend"]),
        (["winnow", "verify", "--level", ""], ["list", "size", "index", "full"]),
        (["winnow", "train", "conf"], []),  # nothing of ours: readline completes files
    ],
    ids=" ".join,
)
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_bash_completes(typed, found, tmp_path):
    words = " ".join(f"'{word}'" for word in typed)
    script = (
        'eval "$(_WINNOW_COMPLETE=source_bash winnow)"; '
        f"COMP_WORDS=({words}); COMP_CWORD={len(typed) - 1}; _winnow_completion winnow; "
        "printf '%s\\n' \"${COMPREPLY[@]}\"; complete -p winnow"
    )
    *offered, how = bash(script, tmp_path).split("\n")[:-1]
    assert [one for one in offered if one] == found
    assert "-o default" in how


def test_zsh_is_offered_names_with_their_lines():
    out = python(
        "from winnow.cli.main import app; app(prog_name='winnow')",
        _WINNOW_COMPLETE="complete_zsh",
        _TYPER_COMPLETE_ARGS="winnow expl",
    )
    assert '"explore":"Look at SAEs in the browser' in out


@pytest.mark.parametrize("words", ["winnow ex", "winnow train --", "winnow import --"])
def test_completing_imports_no_stage(words):
    code = "import atexit, json, sys; atexit.register(lambda: print(json.dumps(sorted(sys.modules)))); "
    out = python(
        code + "from winnow.cli.main import app; app(prog_name='winnow')",
        _WINNOW_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split()) - 1),
    )
    *offered, modules = out.splitlines()
    assert [one for one in offered if one]
    assert not set(json.loads(modules)) & STAGES
