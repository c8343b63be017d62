"""Make the fixtures that a later Winnow is held to: one of each kind of stored thing, by this tree's code.

    python -m tests.contract.make_golden tests/contract/golden/v0.1

`golden/v0.1` was made once, by 0.1.0, and is not made again: `test_v01` asks whether what 0.1.0 stored still
opens. A new folder is for a new version. Everything is made by real commands and functions, in a temporary
folder and by relative paths, on a host that calls itself HOST meanwhile.

::

    config.yaml     root, subject, corpus, plan and train by relative paths; the subject itself is not kept
    data/           harvested from a tiny subject and sealed: 4 units of 512 rows of 16, bfloat16
    data-int8/      synthetic: 2 units of 448 rows of 4, int8 and zstd
    run/            `winnow train` to the end, without the picture, and `winnow index` in run/features
    stopped/        the same run, stopped by SIGINT at step 40 of 72
    queue/          jobs of the trainer service: one waits, one is claimed, one is finished
    expected.json   what is read from all that, and a probe of the arithmetic of the CPU it was made on

The queue's configs name folders below PLACE, since a submitted config's paths are absolute; a test that
trains a job puts its own folder there.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from typer.testing import CliRunner

import winnow.trainer.run.loop as loop
from tests.support.pipeline import pipeline_config
from winnow.cli.main import app
from winnow.common.config_file import load_config
from winnow.explorer.index.table import FeatureTable
from winnow.explorer.site.exhibit import Exhibit
from winnow.harvester.run.driver import ensure_plan, harvest
from winnow.jobs.queue import Queue, job_facts
from winnow.sae.model import Sae
from winnow.schemas.config import Config
from winnow.schemas.service import JobBeat
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.store.testing import make_plan, write_dataset

HOOK, BATCH_ROWS = "resid_post.1", 64
INT8_HOOK = "mlp_out.0"
STOP_STEP = 40
HOST = "host"
PLACE = "/srv/winnow"
"""Where the queue's configs say that everything lies: no machine's own folder."""
CODED_ROWS = slice(100, 124)
LATENTS = (3, 41)
"""Latents whose rows of the index are recorded."""
TRAIN = {
    "hook": HOOK,
    "latents": 48,
    "k": 4,
    "batch_rows": BATCH_ROWS,
    "epochs": 3,
    "lr": 0.003,
    "dead_after_tokens": 200,  # so few that AuxK works before and after the stop
    "ema_beta": 0.9,
    "sample_rows": 512,
    "log_every_steps": 8,
    "device": "cpu",
    "threads": 1,  # another number of threads is another order of sums
}


def main(folder: Path) -> None:
    """Make the fixtures in a new folder.

    Raises:
        SystemExit: The folder is there already, or a file names this machine.
    """
    if folder.exists():
        sys.exit(f"{folder} is there already: fixtures of a version are made once")
    host = socket.gethostname()
    with tempfile.TemporaryDirectory() as scratch:
        with chdir(scratch), named_host():
            config = make_datasets()
            command("train", "config.yaml", "--set", "train.out=run")
            options = ("--top", "3", "--logits", "4", "--neighbours", "3")
            command("index", "run", "--config", "config.yaml", *options)
            with interrupted_at(STOP_STEP):
                command("train", "config.yaml", "--set", "train.out=stopped", code=130)
            make_queue(config)
            Path("run/loss.png").unlink()
            expected = json.dumps(facts(Path()), indent=1, sort_keys=True, ensure_ascii=False)
            Path("expected.json").write_text(expected + "\n", encoding="utf-8")
            refuse_traces(Path(), [f'"{host}"', scratch, tempfile.gettempdir(), str(Path.home())])
        shutil.copytree(scratch, folder, ignore=shutil.ignore_patterns("subject", "corpus.jsonl", ".tmp"))


def command(*arguments: str, code: int = 0) -> None:
    """Run a command of `winnow` in this process."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (arguments, result.output, result.exception)


def make_datasets() -> Config:
    """`config.yaml`, `data` and `data-int8`; gives the config."""
    plan = {"hooks": [HOOK], "context_length": 9}
    path = pipeline_config(Path(), units=3, plan=plan, storage={"single_writer": True}, train=TRAIN)
    config = load_config(path)
    store = open_store(config.root, config.storage)
    harvest(config, store, ensure_plan(config, store))  # in this process, without Ray
    small = make_plan(2, hooks={INT8_HOOK: 4}, context_length=8, dtype="int8", compress="zstd")
    write_dataset(open_store("data-int8"), small)
    return config


@contextmanager
def interrupted_at(step: int) -> Iterator[None]:
    """Send this process SIGINT at the end of a step of training."""
    original = loop.train_step

    def interrupting(run: Any, *batch: Any) -> Any:
        report = original(run, *batch)
        if run.counts.step == step:
            signal.raise_signal(signal.SIGINT)
        return report

    with mock.patch.object(loop, "train_step", interrupting):
        yield


def make_queue(config: Config) -> None:
    """Three jobs, as services elsewhere would have left them."""
    queue = Queue(open_store("queue"))
    changes = {"run": {}, "stopped": {}, "waiting": {"seed": 1, "epochs": 0.5}}
    names: list[str] = []
    for out, fields in changes.items():
        train = config.train.model_copy(update={"out": f"{PLACE}/{out}", **fields})
        name, new = queue.submit(config.model_copy(update={"root": f"{PLACE}/data", "train": train}))
        assert new
        names.append(name)
    jobs = {job.name: job for job in queue.jobs()}
    finished, claimed = jobs[names[0]], jobs[names[1]]
    for state, cause in (("failed", "the storage cannot be reached (exit code 1)"), ("finished", "")):
        attempt = queue.claim(finished, "first-service", "0123456789abcdef", 101)
        assert attempt is not None
        queue.beat(finished.name, attempt, JobBeat(service="first-service", beat=1, pids=(102,)))
        queue.end(finished.name, attempt, state, cause)
        finished.claims, finished.ends = attempt + 1, {*finished.ends, attempt}
    queue.conclude(finished)
    attempt = queue.claim(claimed, "second-service", "fedcba9876543210", 201)
    assert attempt == 0
    queue.beat(claimed.name, attempt, JobBeat(service="second-service", beat=7, pids=(202,)))


@contextmanager
def named_host() -> Iterator[None]:
    """Give this machine the name HOST, which receipts and a run's status write down."""
    uname = platform.uname()._replace(node=HOST)
    with (
        mock.patch.object(platform, "uname", return_value=uname),
        mock.patch.object(socket, "gethostname", return_value=HOST),
    ):
        yield


def refuse_traces(folder: Path, words: list[str]) -> None:
    """Exit where a file that is kept names this machine or its folders."""
    for path in folder.rglob("*"):
        kept = path.is_file() and path.parts[0] != "subject"
        found = [word for word in words if word.encode() in path.read_bytes()] if kept else []
        if found:
            sys.exit(f"{path} names {found[0]!r}")


# ---- what is recorded, and read again by the test -------------------------------------------------


def facts(folder: Path) -> dict[str, Any]:
    """All that `expected.json` holds."""
    return {
        "winnow": metadata.version("winnow-sae"),
        "probe": probe(),
        "data": dataset_facts(folder / "data", HOOK),
        "data-int8": dataset_facts(folder / "data-int8", INT8_HOOK),
        "run": run_facts(folder / "run"),
        "codes": codes(folder / "run", folder / "data"),
        "index": index_facts(folder / "run"),
        "jobs": queue_facts(folder / "queue"),
    }


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def probe() -> dict[str, str]:
    """What decides the bits of a training step: torch, its instructions, and a small training without Winnow.

    Where all of it is equal, so are the bits of a run. Products alone are too weak a probe: with MKL held to
    AVX2 those of these sizes kept their bits, and a resumed run did not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        draw = np.random.default_rng(0)
        x, W_enc, W_dec, b = (
            torch.from_numpy(draw.standard_normal(shape).astype(np.float32))
            for shape in ((BATCH_ROWS, 16), (TRAIN["latents"], 16), (TRAIN["latents"], 16), (16,))
        )
        weights = [each.requires_grad_() for each in (W_enc, W_dec, b)]
        adam = torch.optim.Adam(weights, lr=0.003)
        for _ in range(30):
            adam.zero_grad()
            codes = (x - b) @ W_enc.T
            top = codes.topk(TRAIN["k"], dim=1)
            sparse = torch.zeros_like(codes).scatter(1, top.indices, top.values.relu())
            rows = W_dec / W_dec.norm(dim=1, keepdim=True)
            (sparse @ rows + b - x).square().sum(1).mean().backward()
            adam.step()
        digest = sha256(b"".join(each.detach().numpy().tobytes() for each in weights))
    finally:
        torch.set_num_threads(threads)
    return {
        "torch": torch.__version__.split("+")[0],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "training": digest,
    }


def dataset_facts(root: Path, hook: str) -> dict[str, Any]:
    """Identity and bytes of a dataset, and of the first batches of a stream of it."""
    dataset = ActivationStore.open(str(root))
    tokens = [dataset.unit_tokens(unit) for unit in range(dataset.plan.units)]
    with dataset.stream(hook, batch_rows=BATCH_ROWS, seed=3, steps=3) as stream:
        batches = [batch.rows[hook].numpy().tobytes() for batch in stream]
    return {
        "plan": dataset.plan.fingerprint,
        "dataset": dataset.manifest.dataset_sha256,
        "rows": dataset.rows,
        "rows_sha256": sha256(dataset.read_rows(hook, 0, dataset.rows).tobytes()),
        "weights_sha256": sha256(dataset.weights([hook], 0, dataset.rows).tobytes()),
        "tokens_sha256": sha256(np.stack(tokens).tobytes()),
        "batches_sha256": [sha256(batch) for batch in batches],
    }


def run_facts(run: Path) -> dict[str, Any]:
    """How a finished run ended."""
    summary = json.loads((run / "summary.json").read_bytes())
    chosen = ("steps", "tokens", "auxk_steps", "weights", "sae_sha256", "fvu", "l0")
    return {name: summary[name] for name in chosen}


def codes(run: Path, data: Path) -> dict[str, Any]:
    """Codes that the published SAE gives some rows."""
    rows = ActivationStore.open(str(data)).read_rows(HOOK, CODED_ROWS.start, CODED_ROWS.stop)
    with torch.no_grad():
        values, indices = Sae.load(str(run)).encode(torch.from_numpy(rows))
    return {"values": values.tolist(), "indices": indices.tolist()}


def index_facts(run: Path) -> dict[str, Any]:
    """Of some latents: a line for people, the first example, and a digest of all that is stored."""
    table = FeatureTable.open(str(run / "features"))
    exhibit = Exhibit("run", str(run), table)
    found: dict[str, Any] = {"rows": table.meta.rows, "windows": table.meta.windows}
    for latent in LATENTS:
        row = table.latent(latent)
        found[str(latent)] = {
            "brief": {name: exhibit.brief(latent)[name] for name in ("density", "fires_on", "promotes")},
            "largest": row["largest"],
            "first_example": row["examples"][0],
            "row_sha256": sha256(json.dumps(row, sort_keys=True).encode()),
        }
    return found


def queue_facts(root: Path) -> list[dict[str, Any]]:
    """The jobs of a queue and where they stand."""
    chosen = ("job", "state", "attempts", "failed_attempts", "outs")
    return [{name: fact[name] for name in chosen} for fact in job_facts(open_store(str(root)))]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
