"""`winnow init`: the config that it writes for a model and a corpus runs as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.support.pipeline import make_alone, write_corpus
from tests.support.tiny import make_subject
from winnow.cli.main import app
from winnow.common.config_file import load_config
from winnow.harvester.run import forecast
from winnow.store import ActivationStore
from winnow.trainer.run.loop import train

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "subject"
    make_subject(folder, "llama", layers=3, width=16)
    return folder


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch) -> Path:
    """A working directory, since results of a written config are named relative to it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(subject: Path, *arguments: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, ["init", "--model", str(subject), "--json", *arguments])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if code == 0 else " ".join(done.stderr.split())


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_written_config_harvests_and_trains(subject, work, monkeypatch):
    monkeypatch.setattr(forecast, "MEASURE_SECONDS", 0.0)
    write_corpus(work / "corpus.jsonl", documents=400)
    found = init(subject, "--corpus", "corpus.jsonl", "--out", "mine.yaml")
    assert found["forecast"]["hours"] > 0
    # Below a megabyte everything is read, so the estimate is the plan's count.
    text = Path("mine.yaml").read_text()
    assert f"# The corpus: {found['corpus_tokens']:,} tokens in 1 file" in text
    assert sorted(path.name for path in work.iterdir()) == ["corpus.jsonl", "mine.yaml"]
    cpu = ["subject.device=cpu", "train.device=cpu", "train.threads=1", "train.epochs=1"]
    config = load_config("mine.yaml", [*cpu, "train.sample_rows=512"])
    assert config.root == "data/mine"
    assert config.plan is not None
    assert config.plan.hooks == ("resid_post.1",)
    plan, _ = make_alone(config)
    assert plan.corpus_facts.tokens == found["corpus_tokens"]
    assert plan.units == found["forecast"]["units"]
    summary = train(config)
    assert summary["hook"] == "resid_post.1"
    assert Path("runs/mine/sae.safetensors").is_file()
    assert ActivationStore.open("data/mine").rows >= summary["tokens"]


def test_a_corpus_beyond_the_limit_is_taken_in_part(subject, work):
    write_corpus(work / "corpus.jsonl", documents=400)
    init(subject, "--corpus", "corpus.jsonl", "--tokens", "50000", "--no-measure")
    spec = load_config("config.yaml").plan
    assert spec is not None
    assert spec.train_units is not None
    tokens = (spec.train_units + spec.validation_units) * spec.windows_per_unit * spec.context_length
    assert 40_000 < tokens <= 50_000


def test_formats_and_columns_are_recognised(subject, work):
    lines = texts(write_corpus(work / "corpus.jsonl", documents=300))
    pq.write_table(pa.table({"body": lines, "stars": list(range(300))}), work / "table.parquet")
    messages = [
        [{"role": "user", "content": text[:40]}, {"role": "assistant", "content": text}] for text in lines
    ]
    pq.write_table(pa.table({"messages": messages, "source": ["made"] * 300}), work / "chat.parquet")
    (work / "chat.jinja").write_text(CHAT)
    (work / "ids.jsonl").write_text(
        "".join(json.dumps({"input_ids": [5] * n}) + "\n" for n in range(200, 500))
    )
    for number in range(3):
        (work / f"part-{number}.txt").write_text("\n\n".join(lines[100 * number : 100 * number + 100]))
    cases = {
        "table.parquet": ([], "uri: table.parquet\n      column: body\n"),
        "chat.parquet": (
            ["--template", "chat.jinja"],
            "uri: chat.parquet\n      format: chat\n      column: messages\n      template: chat.jinja\n",
        ),
        "ids.jsonl": ([], "uri: ids.jsonl\n      format: tokens\n      column: input_ids\n"),
        # The shell has expanded the pattern: the rest of the files are arguments.
        "part-0.txt": (["part-1.txt", "part-2.txt"], "- uri: part-0.txt\n    - uri: part-1.txt\n"),
        # Three long files: cut, so that there are documents to hold out.
        "part-*.txt": ([], 'max_document_chars: 8000'),
    }  # fmt: skip
    for number, (corpus, (more, expected)) in enumerate(cases.items()):
        out = f"{number}.yaml"
        found = init(subject, "--corpus", corpus, *more, "--out", out, "--no-measure")
        assert expected in Path(out).read_text(), corpus
        assert found["forecast"]["hours"] is None
        assert found["forecast"]["bytes"] > 0
        load_config(out)
    assert "assistant" in Path("1.yaml").read_text()


def test_what_is_wrong_is_said_and_nothing_written(subject, work):
    write_corpus(work / "corpus.jsonl", documents=400)
    (work / "two.jsonl").write_text('{"title": "a", "body": "b"}\n')
    (work / "chat.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    (work / "none.jsonl").write_text('{"stars": 5}\n')
    (work / "list.csv").write_text("a,b\n")
    (work / "tiny.txt").write_text("A few words.")
    (work / "folder").mkdir()
    (work / "there.yaml").write_text("mine")
    before = sorted(path.name for path in work.iterdir())
    cases = {
        ("two.jsonl",): r"got title (text), body (text). Name one of them with --column.",
        ("two.jsonl", "--column", "tile"): "expected column 'tile' with text, messages or token ids",
        ("none.jsonl",): "got stars (neither).",
        ("chat.jsonl",): "has no chat template",
        ("corpus.jsonl", "--template", "x.jinja"): "--template: expected a corpus of conversations",
        ("tiny.txt",): "the corpus is too small: expected at least",
        ("corpus.jsonl", "--tokens", "100"): "Raise --tokens, or add text.",
        ("tiny.txt", "--column", "text"): "--column: expected JSON lines or Parquet",
        ("list.csv",): "its format cannot be told from its name",
        ("folder",): "Give a pattern, such as folder/*.txt.",
        ("absent/*.txt",): "matches nothing",
        ("corpus.jsonl", "--hook", "resid_post.7"): "resid_post.7",
        ("corpus.jsonl", "--out", "there.yaml"): "there.yaml exists",
        ("corpus.jsonl", "--out", "absent/c.yaml"): "--out: expected a file in a folder that exists",
    }  # fmt: skip
    for (corpus, *arguments), expected in cases.items():
        told = init(subject, "--corpus", corpus, "--no-measure", *arguments, code=2)
        assert expected in told, told
    told = init(work / "absent", "--corpus", "corpus.jsonl", code=2)
    assert "absent" in told
    assert sorted(path.name for path in work.iterdir()) == before
    assert (work / "there.yaml").read_text() == "mine"
