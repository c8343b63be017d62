"""`winnow estimate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from winnow.cli.console import emit, guard, print_table
from winnow.schemas.errors import ConfigError
from winnow.schemas.layers import WRITES

if TYPE_CHECKING:
    from winnow.schemas.config import Config
    from winnow.schemas.harvest import Dtype
    from winnow.schemas.training import TrainSpec
    from winnow.store import ActivationStore

CARDS = "a100-40gb or a100-80gb or h100 or h200 or l4 or l40s or rtx-4090"
"""The keys of `winnow.trainer.plan.rates.GPUS`, whose module imports torch; a test compares them."""


def register(app: typer.Typer) -> None:
    """Add `estimate` to `app`."""
    app.command("estimate")(estimate_command)


def estimate_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file with a section `train`.")],
    gpu: Annotated[str, typer.Option(help=f"{CARDS}.")] = "h100",
    count: Annotated[
        int, typer.Option(help="Number of GPUs; `train.mesh` says how they share the work.", min=1)
    ] = 1,
    # A float, so that `40e9` can be given.
    tokens: Annotated[
        float,
        typer.Option(
            help="Rows of the whole run; default from the dataset and `train.epochs`.",
            min=0,
            show_default=False,
        ),
    ] = 0,
    d_model: Annotated[
        int, typer.Option(help="Width of the rows; default the dataset's.", min=0, show_default=False)
    ] = 0,
    price: Annotated[
        float,
        typer.Option(
            help="Price of one GPU per hour; default `prices.trainer_hour`.", min=0, show_default=False
        ),
    ] = 0,
    set: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Override a field; repeatable, the last of a field wins."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Estimate a run on some GPUs: memory, step time, tokens/s, hours, cost. Trains nothing.

    Memory and time are reckoned from a training step that is taken on paper: the trainer's own code at full
    size, on tensors without contents, needs no GPU. Rates come from the card's data sheet and from assumed,
    not measured, shares of it. A run that does not fit is refused, and the message says what would fit. With
    --tokens and --d-model no dataset is needed.

    Example: `winnow estimate configs/paper-16m.yaml --gpu h100 --count 16 --tokens 40e9 --d-model 768`
    """
    with guard():
        from winnow.common.config_file import load_config
        from winnow.schemas.config import section

        settings = load_config(config, set or [])
        spec = section(settings.train, "train")
        # After the config is read: a mistake in it is told at once.
        from winnow.trainer.plan.estimate import as_json, data_volume, estimate, table_rows

        size = _size(settings, spec, tokens, d_model)
        spec, rows, width = size.spec, size.rows, size.width
        prices = settings.prices
        hour = price or (prices.trainer_hour if prices else 0.0)
        found = estimate(
            spec,
            width,
            tokens=rows,
            gpu=gpu,
            count=count,
            price=hour or None,
            currency=prices.currency if prices else "USD",
            stored=size.stored,
            stream_bytes=size.stream_bytes,
        )
        # Later epochs read the same rows again: the data is that of one.
        hooks = spec.set.hooks if spec.set is not None else spec.read_hooks
        volume = size.volume or data_volume(rows / max(1.0, spec.epochs), width, hooks=len(hooks))
        emit(as_json(found, volume), json, lambda: print_table(f"{config}", table_rows(found, volume)))


class _Size(NamedTuple):
    """What a dataset, or the options in its place, say of a run."""

    spec: TrainSpec
    """With a set's layers resolved."""
    rows: float
    """Rows of the run."""
    width: int
    stored: Dtype
    stream_bytes: Callable[[int], int] | None = None
    """Data ranks -> bytes of their streams; None without a dataset."""
    volume: dict[str, float] | None = None
    """`bytes`, `shards` and `shard_bytes` of its training split; None without a dataset."""


def _size(settings: Config, spec: TrainSpec, tokens: float, d_model: int) -> _Size:
    from winnow.store.format.layout import PLAN_KEY
    from winnow.store.objects import open_store
    from winnow.store.read.joined import JoinedStore, open_roots
    from winnow.store.read.stream import memory_bytes
    from winnow.trainer.run.start import plan_order, resolve_recipe

    # The options and the formulas know one width, that of one hook.
    if spec.with_hooks:
        raise ConfigError("the estimate", expected="an SAE, a transcoder or a set", got="a crosscoder")
    # An estimate mostly comes before the harvest, when there is no dataset to open.
    if tokens and d_model:
        if spec.set is not None and spec.set.layers == "all":
            raise ConfigError(
                "train.set.layers",
                expected="[first, last] for an estimate without a dataset",
                got="all",
                fix="Add `--set train.set.layers=[0,11]` for a subject of 12 layers",
            )
        planned = settings.plan.dtype if settings.plan is not None else "bfloat16"
        return _Size(spec, tokens, d_model, planned)
    for root in (spec.roots or {"": settings.root}).values():
        if open_store(root, settings.storage).size(PLAN_KEY) is None:
            raise ConfigError(
                "the estimate without a dataset",
                expected="the rows of the run and their width: --tokens N --d-model D",
                got=f"no {PLAN_KEY} at {root}",
                fix="Give both, or run `winnow plan` first",
            )
    dataset = open_roots(settings.root, spec.roots, settings.storage)
    if spec.set is not None and spec.set.layers == "all":
        layers = [int(hook.partition(".")[2]) for hook in dataset.hooks if hook.startswith(f"{WRITES}.")]
        spec = spec.model_copy(update={"set": spec.set.of(1 + max(layers, default=0))})
    width = d_model or dataset.d_model(spec.hook)
    if spec.target_hook is not None and not d_model and dataset.d_model(spec.target_hook) != width:
        raise ConfigError(
            "the estimate of a transcoder",
            expected=f"a target as wide as {spec.hook}, {width}",
            got=f"{spec.target_hook}, {dataset.d_model(spec.target_hook)}",
        )
    part = dataset.part_of(spec.hook)[0] if isinstance(dataset, JoinedStore) else dataset
    if tokens or d_model:
        # Another run than the dataset's, which says nothing of its data.
        return _Size(spec, tokens or _steps(spec, dataset) * spec.batch_rows, width, part.plan.spec.dtype)
    order, hooks, plan = plan_order(spec, dataset), spec.stream_hooks, dataset.plan
    units, unit_bytes = len(plan.split_units("train")), sum(plan.shard_bytes(hook) for hook in hooks)
    shards = units * len(hooks)
    return _Size(
        spec,
        resolve_recipe(spec, dataset, order).steps * spec.batch_rows,
        width,
        part.plan.spec.dtype,
        # As training will say it: rows reach a GPU as they are stored.
        lambda data: data * memory_bytes(plan, order, hooks, data, "packed"),
        {"bytes": units * unit_bytes, "shards": shards, "shard_bytes": unit_bytes / len(hooks)},
    )


def _steps(spec: TrainSpec, dataset: ActivationStore) -> int:
    from winnow.trainer.run.start import plan_order, resolve_recipe

    return resolve_recipe(spec, dataset, plan_order(spec, dataset)).steps
