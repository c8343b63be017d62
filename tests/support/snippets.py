"""Runs the code blocks of a page of the documentation, in order, at toy size.

Shell: `winnow` commands run in this process. Of those that do not end, or need a cluster, the options and the
config are checked. YAML that begins with a comment naming a file is that file, in small. Python that begins
so is that module of Winnow; other Python runs as it is.
"""

from __future__ import annotations

import json
import random
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

from tests.support.chat_templates import CHATML
from tests.support.pipeline import WORDS, write_corpus
from tests.support.tiny import make_subject
from winnow.cli.main import app, load_command
from winnow.common.config_file import load_config

REPO = Path(__file__).parents[2]
SKIPPED = ("export ", "ray ", "make ")
"""Commands that set a user's own credentials, need other machines, or are run by `test_readme.py`."""
ENDLESS = ("explore", "serve-trainer", "watch")
CROWDED = ("--address", "harvest.actors=")
"""Words of commands that need a cluster, or several actors of one."""
SMALL: dict[str, dict[str, Any]] = {
    "plan": {"context_length": 17, "windows_per_unit": 64, "train_units": 4, "validation_units": 1},
    "harvest": {"batch_windows": 16, "threads_per_actor": 1},
    # No Ray: the README's test starts it.
    "storage": {"single_writer": True},
    "train": {"latents": 64, "k": 4, "batch_rows": 256, "epochs": 2, "sample_rows": 512, "threads": 1},
}
"""Values that replace those of a page's config, in the sections that it has."""


class Block(NamedTuple):
    """A code block of a page."""

    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that its first line names."""
        found = re.match(r"# ([\w/.-]+\.(?:yaml|py))\n", self.text)
        return found[1] if found else None

    @property
    def commands(self) -> list[str]:
        """The lines of a shell block without comments; continued lines are joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return [Block(*block) for block in found]


def define(block: Block, patch: pytest.MonkeyPatch) -> ModuleType:
    """Make the module that a block of Python is the file of, importable until `patch` is undone."""
    assert block.file is not None
    name = f"winnow.{block.file.removesuffix('.py').replace('/', '.')}"
    module = ModuleType(name)
    patch.setitem(sys.modules, name, module)
    exec(compile(block.text, block.file, "exec"), module.__dict__)
    parent, _, own = name.rpartition(".")
    patch.setattr(import_module(parent), own, module, raising=False)
    return module


class Workspace:
    """A folder in which a page's commands run, and the current one until `patch` is undone.

    Args:
        folder: Empty.
        patch: Undone at the end of the test.
        layers: Blocks of the tiny subject.
        bucket: What `s3://my-bucket` stands for.
    """

    def __init__(
        self, folder: Path, patch: pytest.MonkeyPatch, *, layers: int = 10, bucket: str = ""
    ) -> None:
        self.folder, self.patch, self.bucket = folder, patch, bucket
        patch.chdir(folder)
        self.subject = make_subject(folder / "subject", "llama", layers=layers, width=16)
        tokenizer = AutoTokenizer.from_pretrained(folder / "subject")
        tokenizer.chat_template = CHATML
        tokenizer.save_pretrained(folder / "subject")
        write_corpus(folder / "corpus.jsonl", documents=200)
        write_conversations(folder / "conversations.jsonl")
        (folder / "configs").mkdir()
        for path in (REPO / "configs").glob("*.yaml"):
            text = path.read_text(encoding="utf-8")
            small = path.name != "paper-16m.yaml"  # of which only an estimate is made
            (folder / "configs" / path.name).write_text(self.small(text) if small else text, encoding="utf-8")
        self.names: dict[str, Any] = {}
        self.ran = 0

    def small(self, text: str) -> str:
        """A config in small: same fields, tiny subject and corpus, few and narrow rows."""
        config: dict[str, Any] = yaml.safe_load(text)
        if "subject" in config:
            config["subject"] = {"model": "subject", "device": "cpu"}
        for source in config.get("corpus", {}).get("sources", ()):
            chat = source.get("format") == "chat"
            source["uri"] = "conversations.jsonl" if chat else "corpus.jsonl"
            source.pop("group_by", None)
        if any(hook.startswith("mlp_in.0-") for hook in config.get("plan", {}).get("hooks", ())):
            config["plan"]["hooks"] = ["mlp_in.0-2", "mlp_out.0-2"]
        # A plan on another's windows takes their sizes.
        copied = "tokens_from" in config.get("plan", {})
        for section, values in SMALL.items():
            if copied and section == "plan":
                continue
            if section in config or section in ("harvest", "storage"):
                config[section] = {**config.get(section, {}), **values}
        if "train" in config:
            config["train"] |= {"device": "cpu"}
            config["train"].pop("group_bytes", None)
        return yaml.safe_dump(config, sort_keys=False)

    def run(self, block: Block) -> None:
        """Run one block; an AssertionError names what failed."""
        if block.language == "yaml" and block.file:
            (self.folder / "as-written.yaml").write_text(block.text, encoding="utf-8")
            load_config("as-written.yaml")
            (self.folder / block.file).write_text(self.small(block.text), encoding="utf-8")
        elif block.language == "python" and block.file:
            define(block, self.patch)
        elif block.language == "python":
            text = block.text.replace("s3://my-bucket", self.bucket)
            exec(compile(text, "page", "exec"), self.names)
        elif block.language == "sh":
            for command in block.commands:
                self.command(command.replace("s3://my-bucket", self.bucket))

    def command(self, written: str) -> None:
        """Run one command, or check its options."""
        if written.startswith(SKIPPED):
            return
        words = shlex.split(written)
        if words[0] == "torchrun":
            # What follows `-m winnow.trainer` are the words of `winnow train`.
            self.check(["train", *words[words.index("winnow.trainer") + 1 :]])
        elif words[1] in ENDLESS or any(word.startswith(CROWDED) for word in words):
            self.check(words[1:])
        else:
            assert words[0] == "winnow", written
            done = CliRunner().invoke(app, self.known(words[1:]))
            assert done.exit_code == 0, f"{written}\n{done.output}\n{done.exception}"
        self.ran += 1

    def check(self, words: list[str]) -> None:
        """Parse a command's words with the real command line, and load the config that it names."""
        if "--" in words:
            self.check(words[words.index("--") + 1 :])
        load_command(words[0]).make_context(words[0], list(words[1:]))
        sets = [words[number + 1] for number, word in enumerate(words) if word == "--set"]
        for word in words:
            if word.endswith(".yaml"):
                load_config(word, sets)

    def known(self, words: list[str]) -> list[str]:
        """The words with a latent of the page's graph replaced by one of the graph that is there."""
        if "--edit" not in words:
            return words
        graph = json.loads((self.folder / "graph.json").read_text(encoding="utf-8"))
        node = next(node for node in graph["nodes"] if node["feature_type"] == "cross layer transcoder")
        layer, latent, position = node["node_id"].split("_")
        place = words.index("--edit") + 1
        edited = re.sub(r"^[^=*]*", f"{layer}.{latent}@{position}", words[place])
        return [*words[:place], edited, *words[place + 1 :]]


def write_conversations(path: Path, count: int = 400) -> None:
    """A jsonl file of random conversations."""
    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            messages = [{"role": "user", "content": text(8)}, {"role": "assistant", "content": text(40)}]
            file.write(json.dumps({"messages": messages}) + "\n")
