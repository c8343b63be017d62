"""Forecast of a harvest before it starts: bytes, objects, requests, hours and money.

Arithmetic on the plan (or on the config, before there is one) and one rate: that of the ledger's runs,
or of the subject on this machine, measured over a few batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from winnow.common.cores import cores_each
from winnow.common.figures import count_of, human_bytes, human_hours
from winnow.harvester.run.ledger import WRITE_SECONDS, read_ledger
from winnow.schemas.base import Contract
from winnow.schemas.config import Config, PricesSpec, section
from winnow.schemas.errors import ConfigError
from winnow.schemas.harvest import MOMENT_UNITS, SLICES, HarvestPlan, PlanSpec, row_bytes
from winnow.schemas.subject import HookSite
from winnow.store.format.labels import LABEL_BYTES, LABELS
from winnow.store.objects import ObjectStore
from winnow.store.objects.probe import probe_requests
from winnow.store.read.groups import reading_threads
from winnow.store.read.reader import receipts_present
from winnow.store.read.stream import stream_bytes
from winnow.store.records.parts import PART_UNITS

_UNITS_HELD = 2
"""Units in an actor at once: one in the LM, one being committed."""
_GROUP_UNITS, _BATCH_ROWS, _PREFETCH = 16, 2048, 8
"""Of a stream that says nothing else."""
_LIST_KEYS = 1000
"""Keys per page of a listing: what S3 returns for one request."""
MEASURE_BATCHES, MEASURE_SECONDS = 3, 5.0
"""Fewest batches and shortest time that the rate is measured over; both must be reached."""
_RECEIPT_BYTES = 4096
"""Size of a receipt per hook."""
_MOMENT_BYTES = 44
"""Size of the two moments of one dimension, as JSON, in the first receipts."""
_ARRAY_BYTES = 1400
"""Bytes of an array's zarr.json, and of its copy in the root's, about."""
_FIXED_OBJECTS = 5
"""plan.json, the root's zarr.json, token digests, manifest.json, ledger.json."""


class Requests(Contract):
    """Requests to the store."""

    puts: int
    gets: int
    lists: int


class Money(Contract):
    """Amounts at the config's prices."""

    currency: str
    storage: float
    """For `prices.months_kept` months."""
    requests: float
    actors: float | None
    """None if no rate is known."""
    total: float


class Forecast(Contract):
    """What is left to do at a root, and what it takes."""

    units: int
    """Of the whole dataset."""
    units_to_do: int
    tokens_to_do: int
    """Tokens that the LM has to run."""
    bytes: int
    """Size of the finished dataset: shards, tokens, receipts."""
    bytes_to_do: int
    """Size of the shards to be written."""
    free_bytes: int | None
    """Free space at a local root; None at a remote one."""
    objects: int
    """Objects of the finished dataset."""
    requests: Requests
    """Requests to come, planning included if there is no plan yet."""
    tokens_per_second: float | None
    rate_from: str | None
    """`ledger`: this root's earlier runs; `measured`: the LM alone, on this machine, times the actors."""
    hours: float | None
    actor_bytes: int | None
    """Host memory that one actor takes beside the LM and its pass: the rows of the unit that it makes and of
    the one that it commits, and of all hooks in a pass. None if widths are not known."""
    stream_bytes: int | None
    """Memory of a stream over all hooks, with default groups and the batches of `train` (or 2,048 rows)."""
    open_files: int
    """Objects that such a stream has open at once at most, whatever the number of hooks."""
    bytes_per_second: float | None
    """Write rate that storage must sustain for the LM not to wait."""
    money: Money | None
    """None if the config has no `prices`."""


def forecast(
    config: Config,
    store: ObjectStore,
    plan: HarvestPlan | None,
    *,
    measure: Callable[[], tuple[tuple[HookSite, ...], float | None]] | None = None,
) -> Forecast:
    """Count what the harvest of `config` on `store` has left to do.

    Args:
        config: With `plan` and `harvest`; with `prices` for amounts of money.
        store: The root; nothing is written.
        plan: The plan found there; without one, `plan.train_units` must be given.
        measure: Returns the hooks' widths and tokens/s of one actor, or None for a rate that is not known;
            called only if the ledger has no rate or there is no plan. None leaves hours out.

    Raises:
        ConfigError: Neither a plan nor a number of units.
    """
    spec = plan.spec if plan else section(config.plan, "plan")
    if plan is None and (spec.train_units is None or measure is None):
        raise ConfigError(
            "the forecast does not know how many units there will be",
            expected="a plan at the root, or plan.train_units",
            got="neither",
            fix="Run `winnow plan` first (it reads the corpus once), or set plan.train_units",
        )
    units = plan.units if plan else spec.validation_units + (spec.train_units or 0)
    done = len(receipts_present(store, plan)) if plan else 0
    # The ledger's rate first: it includes commits, failures and the actors there really were.
    rate = read_ledger(store).tokens_per_second if plan else None
    rate_from = "ledger" if rate else None
    sites = plan.sites if plan else ()
    if rate is None and measure is not None:
        sites, alone = measure()
        if alone is not None:
            rate, rate_from = alone * config.harvest.actors, "measured"
    shard = sum(_shard_bytes(spec, site) for site in sites)
    unit_tokens = spec.windows_per_unit * spec.context_length
    to_do = units - done
    seconds = to_do * unit_tokens / rate if rate else None
    probe = probe_requests(store)
    requests = _requests(spec, units, to_do, probe, planned=plan is not None, seconds=seconds or 0.0)
    # Plans of earlier versions have none.
    labelled = plan is None or plan.labels is not None
    whole = _dataset_bytes(spec, units, sites) + (_label_bytes(spec, units) if labelled else 0)
    hours = seconds / 3600 if seconds is not None else None
    return Forecast(
        units=units,
        units_to_do=to_do,
        tokens_to_do=to_do * unit_tokens,
        bytes=whole,
        bytes_to_do=to_do * shard,
        free_bytes=store.free_bytes(),
        objects=_objects(spec, units) + (_label_objects(units) if labelled else 0),
        requests=requests,
        tokens_per_second=rate,
        rate_from=rate_from,
        hours=hours,
        actor_bytes=_actor_bytes(config, spec, sites) if sites else None,
        stream_bytes=_stream_bytes(config, spec, units - spec.validation_units, sites) if sites else None,
        open_files=reading_threads(store, _PREFETCH),
        bytes_per_second=to_do * shard / seconds if seconds else None,
        money=_money(config.prices, config.harvest.actors, whole, requests, hours),
    )


def measure_rate(config: Config) -> tuple[tuple[HookSite, ...], float]:
    """The hooks' widths and one actor's tokens/s: the truncated LM over batches of arbitrary tokens."""
    import torch

    # Here, not above: it brings torch.
    from winnow.subject.engine import reader_of
    from winnow.subject.load import Subject

    spec, harvest = section(config.plan, "plan"), config.harvest
    # With an actor's threads, since the rate of one is then multiplied by the number of actors.
    before = torch.get_num_threads()
    torch.set_num_threads(harvest.threads_per_actor or cores_each(harvest.actors))
    try:
        subject = Subject.load(section(config.subject, "subject"), until=spec.hooks)
        sites, reader = subject.sites(spec.hooks), reader_of(subject, subject.spec.engine, spec.hooks)
        vocabulary = subject.identity.vocabulary
        windows = 8 if harvest.batch_windows == "auto" else harvest.batch_windows
        shape = (windows, spec.context_length)
        # Arbitrary tokens: a forecast must not wait for the corpus to be read.
        tokens = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))

        # Two documents a window: attention inside documents takes a mask, and so other kernels.
        T = spec.context_length
        split = torch.cat([torch.arange(T // 2), torch.arange(T - T // 2)]).expand(windows, -1)
        positions = split if spec.attend == "document" else None

        def run() -> None:
            for values in reader.activations(tokens, spec.hooks, positions=positions).values():
                values[-1, -1, -1].item()  # waits for a GPU

        # Not timed: the first pass pays for more than itself.
        run()
        batches, start = 0, time.perf_counter()
        while batches < MEASURE_BATCHES or time.perf_counter() - start < MEASURE_SECONDS:
            run()
            batches += 1
        return sites, batches * tokens.numel() / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)


def table_rows(found: Forecast) -> list[tuple[str, str]]:
    """The forecast as lines of a table."""
    requests = found.requests
    kinds = ((requests.puts, "put"), (requests.gets, "get"), (requests.lists, "list"))
    lines = [
        ("units to do", f"{found.units_to_do:,} of {found.units:,}"),
        ("tokens to run", f"{found.tokens_to_do:,}"),
        ("to write", human_bytes(found.bytes_to_do)),
        ("dataset when finished", f"{human_bytes(found.bytes)} in {count_of(found.objects, 'object')}"),
        ("requests", ", ".join(count_of(count, noun) for count, noun in kinds)),
    ]
    if found.actor_bytes is not None and found.stream_bytes is not None:
        lines += [
            ("an actor's memory beside the LM", human_bytes(found.actor_bytes)),
            (
                "a stream of all hooks",
                f"{human_bytes(found.stream_bytes)}, {count_of(found.open_files, 'object')} open",
            ),
        ]
    if found.free_bytes is not None:
        lines.append(("free at the root", human_bytes(found.free_bytes)))
    if found.tokens_per_second and found.hours is not None:
        source = "earlier runs" if found.rate_from == "ledger" else "the LM here, alone, x actors"
        lines += [
            ("rate", f"{found.tokens_per_second:,.0f} tokens/s ({source})"),
            ("time", human_hours(found.hours)),
            ("storage must take", f"{human_bytes(found.bytes_per_second or 0)}/s"),
        ]
    if found.money:
        money, unit = found.money, found.money.currency
        lines += [
            ("storage", f"{money.storage:,.2f} {unit}"),
            ("requests cost", f"{money.requests:,.2f} {unit}"),
        ]
        if money.actors is not None:
            lines.append(("actors", f"{money.actors:,.2f} {unit}"))
        lines.append(("all together", f"{money.total:,.2f} {unit}"))
    return lines


def summary_line(found: Forecast) -> str:
    """The forecast as one line, reported before the work."""
    parts = [
        f"{human_bytes(found.bytes)} in {count_of(found.objects, 'object')} when finished",
        f"{count_of(found.requests.puts, 'put')} and {count_of(found.requests.gets, 'get')} to go",
    ]
    if found.hours is not None:
        parts.append(f"{human_hours(found.hours)} at the rate so far")
    if found.money:
        parts.append(f"{found.money.total:,.2f} {found.money.currency}")
    return "forecast: " + ", ".join(parts)


def _shard_bytes(spec: PlanSpec, site: HookSite) -> int:
    # Rows, the crc32c of each slice, and the shard's index: offset and length of each slice, 8 bytes each,
    # and a crc32c of its own.
    rows_ = spec.windows_per_unit * (spec.context_length - spec.drop_leading)
    return rows_ * row_bytes(spec.dtype, site.d_model) + SLICES * 4 + SLICES * 16 + 4


def _actor_bytes(config: Config, spec: PlanSpec, sites: tuple[HookSite, ...]) -> int:
    rows_ = spec.windows_per_unit * (spec.context_length - spec.drop_leading)
    unit = rows_ * sum(row_bytes(spec.dtype, site.d_model) for site in sites)
    windows = 8 if config.harvest.batch_windows == "auto" else config.harvest.batch_windows
    # As the LM gives them, at most four bytes a value, and as they are stored, of two passes on a GPU.
    tokens = min(windows, spec.windows_per_unit) * spec.context_length
    return _UNITS_HELD * unit + tokens * sum(
        4 * s.d_model + 2 * row_bytes(spec.dtype, s.d_model) for s in sites
    )


def _stream_bytes(config: Config, spec: PlanSpec, units: int, sites: tuple[HookSite, ...]) -> int:
    rows_ = spec.windows_per_unit * (spec.context_length - spec.drop_leading)
    group = min(_GROUP_UNITS, max(1, units))
    batch = config.train.batch_rows if config.train else _BATCH_ROWS
    return stream_bytes(
        group * rows_,
        sum(row_bytes(spec.dtype, site.d_model) for site in sites),
        groups=math.ceil(units / group),
        batch_bytes=4 * batch * sum(site.d_model for site in sites),
    )


def _dataset_bytes(spec: PlanSpec, units: int, sites: tuple[HookSite, ...]) -> int:
    shards = sum(_shard_bytes(spec, site) for site in sites)
    # Tokens are uint32, and their chunk ends with a crc32c of four bytes.
    tokens = spec.windows_per_unit * spec.context_length * 4 + 4
    whole = units * (shards + tokens + _RECEIPT_BYTES * len(sites))
    whole += _ARRAY_BYTES * (3 + len(spec.hooks))
    return whole + min(units, MOMENT_UNITS) * _MOMENT_BYTES * sum(site.d_model for site in sites)


def _objects(spec: PlanSpec, units: int) -> int:
    arrays = 3 + len(spec.hooks)  # a zarr.json each: tokens, token digests, activations, hooks
    # Per unit: a shard per hook, the token chunk, the receipt.
    return _FIXED_OBJECTS + arrays + math.ceil(units / PART_UNITS) + units * (len(spec.hooks) + 2)


def _label_objects(units: int) -> int:
    # A zarr.json of each label, of their group and of their digests; the digests; a chunk of each per unit.
    return len(LABELS) + 3 + units * len(LABELS)


def _label_bytes(spec: PlanSpec, units: int) -> int:
    # Each chunk ends with a crc32c of four bytes.
    chunks = units * (spec.windows_per_unit * spec.context_length * LABEL_BYTES + 4 * len(LABELS))
    return chunks + _ARRAY_BYTES * (len(LABELS) + 2)


def _requests(
    spec: PlanSpec, units: int, to_do: int, probe: tuple[int, int], *, planned: bool, seconds: float
) -> Requests:
    if to_do == 0:
        return Requests(puts=0, gets=0, lists=0)
    ledger = 2 + int(seconds / WRITE_SECONDS)  # each entry is read before it is written
    # Successful first attempts only: what retries and repairs add cannot be foreseen.
    puts = probe[0] + to_do * (len(spec.hooks) + 1) + math.ceil(units / PART_UNITS) + 1 + ledger
    gets = probe[1] + 3 + 2 * to_do + units + ledger  # tokens and their digests, then every receipt
    lists = 3 * math.ceil(units / _LIST_KEYS)  # tokens, receipts, receipts again to seal
    if not planned:
        puts += 3 + 3 + len(spec.hooks) + units  # plan, root, digests; arrays; tokens
        puts += _label_objects(units)
        lists += 1
    return Requests(puts=puts, gets=gets, lists=lists)


def _money(
    prices: PricesSpec | None, actors: int, whole: int, requests: Requests, hours: float | None
) -> Money | None:
    if prices is None:
        return None
    storage = whole / 2**30 * prices.gib_month * prices.months_kept
    # Object stores price listings like puts.
    asked = (
        requests.puts + requests.lists
    ) / 1000 * prices.puts_1000 + requests.gets / 1000 * prices.gets_1000
    work = hours * actors * prices.actor_hour if hours is not None else None
    return Money(
        currency=prices.currency,
        storage=storage,
        requests=asked,
        actors=work,
        total=storage + asked + (work or 0.0),
    )
