"""Family `judge` against a stand-in for a language model: a local server that speaks the API, by rules.

No real judge can be had here; what is tested is everything around it: what it is shown, how answers are read
and scored, what happens when it fails, and where the key goes.
"""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.evaluated import HOOK, random_sae, save_sae, toy_config
from winnow.cli.main import app
from winnow.evaluator.judge.endpoint import Endpoint
from winnow.evaluator.judge.family import balanced_accuracy, read_answers, read_explanations
from winnow.evaluator.judge.snippets import Snippet, wrong_marks
from winnow.evaluator.report import load_evaluation
from winnow.schemas.errors import ConfigError, EndpointError
from winnow.schemas.evaluation import JudgeSpec
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.subject import Subject

KEY = "sk-canary-4711"
LATENT, WIDTH = 7, 16


class StandIn:
    """A server whose answers a test sets; it keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.statuses: list[int] = []
        self.answer = lambda *_: "0"
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                stand_in.asked.append(body)
                stand_in.keys.append(self.headers["Authorization"])
                status = stand_in.statuses.pop(0) if stand_in.statuses else 200
                text = stand_in.answer(*(message["content"] for message in body["messages"]))
                reply = {"choices": [{"message": {"content": text}}], "usage": {"total_tokens": 7}}
                data = text if isinstance(text, bytes) else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def stand_in():
    made = StandIn()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    config = toy_config(folder, units=2)
    return save_sae(config, folder / "sae", random_sae()), config


def oracle(config, latent: int):
    """A stand-in that knows where a latent is active, from the subject and the SAE alone."""
    subject, sae = Subject.load(config.subject), random_sae()
    windows = range(24)
    dataset = ActivationStore.open(config.root)
    tokens = dataset.unit_tokens(0)[: len(windows)].astype(np.int64)
    rows = subject.activations(tokens, [HOOK])[HOOK]
    values, indices = sae.encode(rows.reshape(-1, rows.shape[-1]))
    fires = ((indices == latent) & (values > 0)).any(1).reshape(tokens.shape).numpy()
    fires &= dataset.window_weights([HOOK], list(windows)) > 0
    active, right = dict[str, bool](), set[str]()
    for line, told in zip(tokens, fires, strict=True):
        words = [subject.tokenizer.decode([token]) for token in line]
        for first in range(len(words) - WIDTH + 1):
            part = slice(first, first + WIDTH)
            snippet = Snippet(tuple(words[part]), tuple(told[part].tolist()))
            active[snippet.text()] = any(snippet.fires)
            right.add(snippet.text(snippet.fires))

    def answer(system: str, user: str) -> str:
        lines = re.findall(r"^\d+\. (.*)$", user, re.MULTILINE)
        if "between" in system:
            return f"Sure: {[int(line in right) for line in lines]}"
        return json.dumps([int(active[line]) for line in lines])

    return answer


def run(toy, stand_in, tmp_path, *more, metrics="judge"):
    uri, config = toy
    path = tmp_path / "config.json"
    judge = {"endpoint": stand_in.url, "model": "rules", "examples": 4, "tokens": WIDTH, "latents": 3}
    settings = {"windows": 24, "n2g_train_rows": 1000, "judge": judge}
    path.write_text(json.dumps({"root": config.root, "evaluate": settings}))
    out = str(tmp_path / "out")
    line = ["evaluate", uri, "--config", str(path), "--metrics", metrics, "--out", out, *more]
    return CliRunner(env={"WINNOW_JUDGE_KEY": KEY}).invoke(app, line), out


def test_a_judge_that_knows_is_right_and_one_that_guesses_is_not(toy, stand_in, tmp_path):
    explanations = tmp_path / "told.jsonl"
    explanations.write_text(json.dumps({"latent": LATENT, "text": "some tokens"}) + "\n")
    stand_in.answer = oracle(toy[1], LATENT)
    done, out = run(toy, stand_in, tmp_path, "--set", f"evaluate.judge.explanations={explanations}")
    assert done.exit_code == 0, done.output
    found = load_evaluation(open_store(out))
    (fact,) = found.families["judge"].details["latents"]
    assert fact["latent"] == LATENT
    assert fact["text"] == "some tokens"
    assert fact["positives"] == 4
    assert fact["detection"] == 1.0
    assert fact["fuzzing"] == 1.0
    assert set(stand_in.keys) == {f"Bearer {KEY}"}
    assert all(body["temperature"] == 0 and body["model"] == "rules" for body in stand_in.asked)
    stored = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert KEY not in stored + done.output

    stand_in.answer = lambda _, user: json.dumps([1] * len(re.findall(r"^\d+\. ", user, re.MULTILINE)))
    done, out = run(
        toy, stand_in, tmp_path, "--set", f"evaluate.judge.explanations={explanations}", "--again"
    )
    assert done.exit_code == 0, done.output
    assert load_evaluation(open_store(out)).figure("judge_detection").value == 0.5


def test_it_explains_itself_and_latents_without_an_answer_are_counted(toy, stand_in, tmp_path):
    replies = iter(["[1, 0]", "no idea"] * 100)

    def answer(system, user):
        return "Spaces   and\nletters." if "sentence alone" in system else next(replies)

    stand_in.answer = answer
    done, out = run(toy, stand_in, tmp_path)
    assert done.exit_code == 0, done.output
    family = load_evaluation(open_store(out)).families["judge"]
    assert [fact["text"] for fact in family.details["latents"]] == ["Spaces and letters."] * 3
    assert "3 of 3 latents without a detection score" in family.notes[0]
    assert all(figure.value is None for figure in family.figures)
    assert "«" in stand_in.asked[0]["messages"][1]["content"]


def test_without_a_judge_nothing_is_sent_and_asking_for_it_is_an_error(toy, stand_in, tmp_path):
    done, _ = run(toy, stand_in, tmp_path, "--set", "evaluate.judge=null", metrics="reconstruction")
    assert done.exit_code == 0, done.output
    assert stand_in.asked == []
    done, _ = run(toy, stand_in, tmp_path, "--set", "evaluate.judge=null")
    assert done.exit_code == 2
    assert "evaluate.judge" in done.output


def test_an_endpoint_that_is_busy_is_asked_again_and_one_that_refuses_is_not(stand_in):
    endpoint = Endpoint(JudgeSpec(endpoint=stand_in.url, model="m"), KEY)
    stand_in.statuses, stand_in.answer = [429, 503], lambda *_: "fine"
    assert endpoint.ask("system", "user") == "fine"
    assert (len(stand_in.asked), endpoint.requests, endpoint.tokens) == (3, 1, 7)
    stand_in.statuses = [401]
    with pytest.raises(ConfigError, match="401") as refused:
        endpoint.ask("system", "user")
    assert KEY not in str(refused.value)
    assert len(stand_in.asked) == 4
    stand_in.answer = lambda *_: b'{"choices": []}'
    with pytest.raises(EndpointError, match="chat completion"):
        endpoint.ask("system", "user")
    stand_in.answer = lambda *_: b"x" * (1 << 21)
    with pytest.raises(EndpointError, match="chat completion"):
        endpoint.ask("system", "user")


def test_a_key_does_not_travel_in_the_clear():
    with pytest.raises(ConfigError, match="https"):
        Endpoint(JudgeSpec(endpoint="http://example.org/v1", model="m"), KEY)
    Endpoint(JudgeSpec(endpoint="http://example.org/v1", model="m"))
    with pytest.raises(ConfigError, match=r"judge\.endpoint"):
        Endpoint(JudgeSpec(endpoint="file:///etc/passwd", model="m"))


def test_answers_are_read_strictly_and_scored_by_balanced_accuracy():
    assert read_answers("[1, 2] so: [1, 0, true]", 3) == [True, False, True]
    assert read_answers("[1, 0]", 3) is None
    assert read_answers("[1, 0, 2]", 3) is None
    assert read_answers('["1", 0, 1] or none', 3) is None
    assert balanced_accuracy([True, True, False, False], [True, False, False, False]) == pytest.approx(5 / 6)


def test_snippets_mark_runs_of_tokens_and_wrong_marks_miss_them_all():
    snippet = Snippet((" a", " b", " c", "\n", " d «x»"), (False, True, True, False, False))
    assert snippet.text() == "a b c / d <<x>>"
    assert snippet.text(snippet.fires) == "a« b c» / d <<x>>"
    for seed in range(8):
        marks = wrong_marks(snippet, np.random.default_rng(seed))
        assert sum(marks) == 2
        assert not any(mark and fires for mark, fires in zip(marks, snippet.fires, strict=True))
    assert wrong_marks(Snippet((" a", " b"), (True, True)), np.random.default_rng(0)) is None


def test_a_broken_file_of_explanations_is_named_with_its_line(tmp_path):
    path = tmp_path / "told.jsonl"
    path.write_text('{"latent": 1, "text": "fine"}\n{"latent": 99, "text": "too high"}\n')
    with pytest.raises(ConfigError, match="line 2"):
        read_explanations(str(path), 48)
    with pytest.raises(ConfigError, match="readable"):
        read_explanations(str(tmp_path / "none.jsonl"), 48)
