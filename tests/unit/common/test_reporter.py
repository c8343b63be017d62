"""Library code is silent until it is asked, and reaches people through one seam only."""

from __future__ import annotations

import threading

import pytest

from tests.support.planted import planted_config
from winnow.common import reporter
from winnow.common.config_file import load_config
from winnow.common.reporter import Lines, Progress, reporting, say, set_reporter
from winnow.trainer.run.loop import train


def test_training_prints_nothing_unless_it_is_asked(tmp_path, capfd):
    train(load_config(planted_config(tmp_path, epochs=1, out=str(tmp_path / "silent"))))
    assert capfd.readouterr() == ("", "")
    with reporting():
        train(load_config(planted_config(tmp_path, epochs=1, out=str(tmp_path / "told"))))
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0].startswith(f"reading {tmp_path}")
    assert any(line.startswith("16 steps of 256 rows on cpu") for line in lines)
    assert any(line.endswith("told: measuring on the held-out rows") for line in lines)
    assert lines[-1].startswith("held out: 512/512 (100%) rows, ")
    last = [line for line in lines if line.startswith("train: ")][-1]
    assert last.startswith("train: 4,096/4,096 (100%) rows, ")
    assert "step 16/16" in last
    assert all("\r" not in line and "\x1b" not in line for line in lines)


def test_a_warning_reaches_the_script_that_asked_for_nothing(tmp_path, caplog, capfd):
    train(load_config(planted_config(tmp_path, epochs=1)))
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("{\n" + path.read_text())
    train(load_config(planted_config(tmp_path, epochs=2)), extend=True)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("winnow.trainer", "WARNING")
    assert record.getMessage() == "line 1 of metrics.jsonl is unreadable and is left out"
    assert capfd.readouterr().out == ""


def test_the_rate_counts_this_run_only_and_lines_keep_their_distance(told, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(reporter.time, "monotonic", lambda: now[0])
    with Progress("work", 100, "rows", done=40) as bar:
        now[0] = 110.0
        bar.advance(20, fvu="0.5")
        assert bar.rate == pytest.approx(2.0)
        assert bar.eta_seconds == pytest.approx(20.0)
        now[0] = 119.0
        bar.update(70)
        now[0] = 120.0
        bar.update(80)
    assert told == [
        "work: 60/100 (60%) rows, 2/s, ETA 0:20  fvu 0.5",
        "work: 80/100 (80%) rows, 2/s, ETA 0:10  fvu 0.5",
    ]


def test_the_end_is_told_unless_an_error_brought_it(told):
    with Progress("plan", None, "tokens") as bar:
        bar.update(5)
        bar.update(7)

    def fail() -> None:
        with Progress("harvest", None, "tokens") as bar:
            bar.update(5)
            bar.update(7)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [line.split(" tokens")[0] for line in told] == ["plan: 5", "plan: 7", "harvest: 5"]


def test_progress_counts_without_a_reporter():
    with Progress("work", 10, "rows", done=5) as bar:
        bar.advance(2)
    assert (bar.done, bar.total) == (7, 10)


def test_a_reporter_holds_for_every_thread_and_ends_with_its_block(told, capfd):
    with reporting(None):
        say("nobody hears it")
        with reporting():
            thread = threading.Thread(target=say, args=("on stderr",))
            thread.start()
            thread.join()
        say("nobody hears it")
    say("heard again")
    assert capfd.readouterr() == ("", "on stderr\n")
    assert told == ["heard again"]


def test_a_session_may_report_without_a_block(told, capfd):
    before = set_reporter(Lines())
    say("a line")
    assert isinstance(set_reporter(before), Lines)
    say("another")
    assert (capfd.readouterr().err, told) == ("a line\n", ["another"])
