"""SAEs of one chat harvest: trained on the assistant's tokens alone beside all, both measured on the former.

    python -m benchmarks.chat_rows --config configs/chat.yaml --folder runs/chat-rows --json OUT [--seeds 3]

Both take the same number of steps from the same harvest, which the config names and which must be there
(`winnow harvest configs/chat.yaml`). Held-out FVU and delta CE are of the assistant's tokens; for both, FVU
of all tokens stands beside. A killed run resumes by the same command.

- `assistant_over_all_fvu`: the ratio of the two FVUs on the assistant's held-out tokens, per seed.
- `assistant_less_all_delta_ce`: the difference of the two delta CEs there, in nats per token, per seed. Not
  their ratio, since either may be about 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.report import write_report
from winnow.common.config_file import load_config
from winnow.common.reporter import reporting
from winnow.evaluator.report import evaluate
from winnow.schemas.config import Config
from winnow.schemas.evaluation import EvaluateSpec, Family
from winnow.schemas.readings import RowsSpec
from winnow.schemas.training import TrainSpec
from winnow.store import ActivationStore
from winnow.trainer.run.loop import train
from winnow.trainer.run.start import plan_order

FIGURES = ("fvu_raw", "delta_ce", "l0")


def measure(config: Config, folder: Path, seeds: int, windows: int) -> dict[str, Any]:
    """Train and measure every SAE; figures by seed."""
    assert config.train is not None
    own = config.train
    dataset = ActivationStore.open(config.root, config.storage)
    steps = int(own.epochs * plan_order(own, dataset).steps_per_epoch)
    found: dict[str, list[dict[str, float]]] = {"assistant": [], "all": []}
    for seed in range(seeds):
        for name, rows in (("assistant", own.rows), ("all", RowsSpec())):
            spec = own.model_copy(update={"rows": rows, "seed": seed, "out": str(folder / f"{name}-{seed}")})
            # as many steps as the other one takes
            spec = spec.model_copy(update={"epochs": steps / plan_order(spec, dataset).steps_per_epoch})
            found[name].append(figures(config, spec, own.rows, windows))
    pairs = list(zip(found["assistant"], found["all"], strict=True))
    compared = {
        "assistant_over_all_fvu": [one["fvu_raw"] / other["fvu_raw"] for one, other in pairs],
        "assistant_less_all_delta_ce": [one["delta_ce"] - other["delta_ce"] for one, other in pairs],
    }
    return {**compared, **found, "means": _means(found), "steps": steps, "rows": own.rows.words}


def figures(config: Config, spec: TrainSpec, rows: RowsSpec, windows: int) -> dict[str, float]:
    """Train an SAE unless that is done; its figures on the chosen held-out rows, and FVU on all of them."""
    config = config.model_copy(update={"train": spec})
    summary = train(config)
    found: dict[str, float] = {"dead_share": summary["dead_share"]}
    families: tuple[Family, ...] = ("reconstruction", "downstream")
    for which in (rows, RowsSpec()):
        # FVU alone of all rows: delta CE of them is not compared, and takes a minute
        metrics = families if which is rows else families[:1]
        asked = EvaluateSpec(metrics=metrics, windows=windows, rows=which)
        measured = evaluate(spec.out, config.model_copy(update={"evaluate": asked}))
        for name in FIGURES if which is rows else ("fvu_raw",):
            figure = measured.figure(name)
            assert figure is not None
            assert figure.value is not None
            found[name if which is rows else f"{name}_of_all"] = figure.value
    return found


def _means(found: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: statistics.mean(one[key] for one in each) for key in each[0]}
        for name, each in found.items()
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/chat.yaml"))
    parser.add_argument("--folder", type=Path, default=Path("runs/chat-rows"))
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=128, help="held-out windows that figures are of")
    parser.add_argument("--set", action="append", default=[], help="override a field of the config")
    options = parser.parse_args()
    with reporting():
        config = load_config(options.config, options.set)
        result = measure(config, options.folder, options.seeds, options.windows)
    print(json.dumps(write_report("chat_rows", result, options.json), indent=1))


if __name__ == "__main__":
    main()
