"""`winnow plan`: corpus to token windows to `plan.json` and the chunks of tokens and labels.

One pass over the text; memory does not grow with it. Three stages overlap: reading (a thread), tokenising
(threads that wait for the tokenizer's own), packing and spilling (the caller). The store is probed first;
nothing is written to it before the whole corpus has been read and found valid.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from datetime import UTC, datetime
from functools import partial
from importlib import metadata
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from winnow.common.reporter import say
from winnow.harvester.plan.chat import chat_templates
from winnow.harvester.plan.digests import MakeUnit
from winnow.harvester.plan.parent import Parent
from winnow.harvester.plan.sources import find_files
from winnow.harvester.plan.tokenise import DocumentTokenizer
from winnow.harvester.plan.windows import CorpusWindows, PlanProgress, ProgressCallback
from winnow.schemas.config import Config, section
from winnow.schemas.corpus import CorpusSpec
from winnow.schemas.errors import DISTRIBUTION, ConfigError, PlanMismatch, StoreError
from winnow.schemas.harvest import BEFORE, CorpusFacts, Execution, HarvestPlan, PlanSpec, check_shard_size
from winnow.schemas.labels import PlannedLabels
from winnow.schemas.subject import HookSite, SubjectIdentity, SubjectSpec, parse_hook
from winnow.store.format.labels import LABEL_BYTES, label_keys
from winnow.store.format.layout import LABELS_GROUP, PLAN_KEY, TOKENS_ARRAY, tokens_key
from winnow.store.objects import ObjectStore
from winnow.store.read.reader import load_plan
from winnow.store.write.writer import create_dataset, differing_fields, put_label, put_tokens

if TYPE_CHECKING:
    from winnow.subject.load import Subject

log = logging.getLogger("winnow.harvester")

PUT_UNITS = 8
"""Units that are made and stored at the same time."""
PUT_THREADS = 32
"""Chunks of theirs that are stored at the same time: each waits for the disk or for a reply."""
OTHER_TOKENIZER = (
    "Its tokens were made by another tokenizer (the one that an earlier version rebuilt from a GGUF file "
    "split text differently): stored rows can be streamed and trained on, but no tokens can be added; plan "
    "at another root"
)


class PlanSubject(Protocol):
    """What the planner needs of a subject, for objects that are not a `Subject`."""

    identity: SubjectIdentity
    tokenizer: Any
    """A fast tokenizer of transformers, or one of `tokenizers`."""

    def sites(self, hooks: Sequence[str], /) -> tuple[HookSite, ...]:
        """Resolve hooks; ConfigError for an unknown one."""
        ...


def make_plan(
    config: Config,
    store: ObjectStore,
    *,
    subject: Subject | PlanSubject | None = None,
    progress: ProgressCallback | None = None,
) -> HarvestPlan:
    """Read and tokenise the corpus, and store the plan and every token chunk.

    At a root with the same plan, it adds the chunks that are missing.

    Args:
        config: With the sections `subject`, `plan` and, unless `plan.tokens_from` is given, `corpus`.
        store: The dataset's root.
        subject: The subject model, if the caller has loaded it already.
        progress: Called at most about once per second, from this thread.

    Returns:
        The plan as stored.

    Raises:
        ConfigError: Anything wrong with config or corpus; nothing has been written.
        PlanMismatch: The root holds another plan; the differing fields are named.
        StoreError: The disk is too small, or the store fails.
        IntegrityError: A token chunk at the root differs from the plan's.
    """
    parent = Parent.of(config)
    if parent is not None:
        return _plan_on(parent, config, store, subject or _outline(config), progress)
    _, corpus, spec = _sections(config)
    files = find_files(corpus, allow_http=config.storage.allow_http)
    subject = subject or _outline(config)
    identity, sites = subject.identity, tuple(subject.sites(spec.hooks))
    _check_context(spec, identity)
    _check_shards(spec, sites)
    stored = _stored_plan(store)
    if stored is not None:
        refuse_other(stored, config, store, identity, sites)
        identity = stored.subject  # the same except for the location of its files
    templates = chat_templates(corpus, subject.tokenizer, identity.model)
    tokenizer = DocumentTokenizer(subject.tokenizer, identity, spec, stored, templates, _has_roles(corpus))
    _warn_of_bos(spec, tokenizer, identity)
    # Before hours of reading, and before any put.
    store.probe(single_writer=config.storage.single_writer)
    folder = config.harvest.temp_dir or tempfile.gettempdir()
    shown = PlanProgress(progress, files)
    with CorpusWindows(corpus, tokenizer.spec, tokenizer, files, folder, shown) as run:
        run.read()
        digests = run.digests()
        # A plan of an earlier version keeps its identity: its tokens stay without labels.
        labels = None if stored is not None and stored.labels is None else digests.planned_labels()
        plan = _plan_of(config, corpus, identity, sites, tokenizer, run.facts(), digests.tokens, labels)
        # plan.json first, then the chunks: a planner killed in between leaves a root whose identity is known,
        # and the next one fills the gaps.
        missing = missing_tokens(plan, store)
        _check_room(plan, store, len(missing))
        plan = create_dataset(store, plan, digests.tokens, digests.labels)
        wanted = set(missing)
        # Windows come in keyed order from the spill, so units before a missing one are read and passed over;
        # those after the last one are not read.
        units = enumerate(islice(run.makers(), max(missing, default=-1) + 1))
        puts = (partial(_put_unit, make, store, plan, unit) for unit, make in units if unit in wanted)
        _put(puts, lambda done: shown.put(run.tokens, done, len(missing)))
    return plan


def _plan_on(
    parent: Parent,
    config: Config,
    store: ObjectStore,
    subject: Subject | PlanSubject,
    progress: ProgressCallback | None,
) -> HarvestPlan:
    """Plan on another dataset's windows; see `make_plan`."""
    assert config.plan is not None, "without it there is no parent"
    identity, sites = subject.identity, tuple(subject.sites(config.plan.hooks))
    spec = parent.spec_of(config)
    _check_context(spec, identity)
    _check_shards(spec, sites)
    parent.require_whole()
    parent.require_vocabulary(identity, subject.tokenizer)
    stored = _stored_plan(store)
    if stored is not None:
        parent.require_same(stored, store)
        refuse_other(stored, config, store, identity, sites)
        identity = stored.subject
    plan = parent.plan.model_copy(
        update={
            "subject": identity,
            "spec": spec,
            "sites": sites,
            "bos_token_id": _unless(parent.plan.bos_token, identity.bos_token_id),
            "join_token_id": _unless(parent.plan.join_token, identity.eos_token_id),
            "execution": _execution(config, parent.plan.fingerprint),
        }
    )
    # A copy is not validated, and keeps the parent's cached fingerprint.
    plan = HarvestPlan.model_validate(plan.model_dump(mode="json"))
    store.probe(single_writer=config.storage.single_writer)
    missing = missing_tokens(plan, store)
    _check_room(plan, store, len(missing))
    plan = create_dataset(store, plan, *parent.digests())
    tokens, shown = plan.windows * plan.spec.context_length, PlanProgress(progress, [])
    _put(
        (partial(_put_unit, partial(parent.unit, unit), store, plan, unit) for unit in missing),
        lambda done: shown.put(tokens, done, len(missing)),
    )
    return plan


def _unless(token: int | None, own: int | None) -> int | None:
    """A special token's id as a plan stores it: only if it differs from the subject's own."""
    # So that plans made before these fields existed keep their fingerprint.
    return None if token == own else token


def _execution(config: Config, parent: str | None = None) -> Execution:
    """Outside the fingerprint: how the plan was made, not what it says."""
    return Execution(
        batch_windows=config.harvest.batch_windows,
        threads_per_actor=config.harvest.threads_per_actor,
        code_version=_version(),
        tokens_from=parent,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _has_roles(corpus: CorpusSpec) -> bool:
    return any(source.roles is not None for source in corpus.sources)


def _warn_of_bos(spec: PlanSpec, tokenizer: DocumentTokenizer, identity: SubjectIdentity) -> None:
    if spec.bos == "none" and tokenizer.added_bos is not None:
        log.warning(
            "plan: bos is none, though the tokenizer of %s puts a BOS before every text (token %d): the "
            "model may do far worse without; plan.bos: auto adds it",
            identity.model,
            tokenizer.added_bos,
        )
    elif tokenizer.bos is not None and tokenizer.added > 1:
        log.warning(
            "plan: the tokenizer of %s puts %d tokens before every text, and windows begin with the first of "
            "them alone (token %d): with plan.bos: none they begin with text",
            identity.model,
            tokenizer.added,
            tokenizer.bos,
        )


def _plan_of(
    config: Config,
    corpus: CorpusSpec,
    identity: SubjectIdentity,
    sites: tuple[HookSite, ...],
    tokenizer: DocumentTokenizer,
    facts: CorpusFacts,
    digests: NDArray[np.uint8],
    labels: PlannedLabels | None,
) -> HarvestPlan:
    """The plan of a corpus that has been read; `digests` [units, 32] are those of its units' tokens."""
    return HarvestPlan(
        subject=identity,
        corpus=corpus,
        corpus_facts=facts,
        spec=tokenizer.spec,
        sites=sites,
        units=len(digests),
        tokens_sha256=hashlib.sha256(digests.tobytes()).hexdigest(),
        labels=labels,
        bos_token_id=_unless(tokenizer.bos, identity.bos_token_id),
        join_token_id=_unless(tokenizer.join, identity.eos_token_id),
        execution=_execution(config),
    )


def read_corpus(config: Config, folder: str, plan: HarvestPlan) -> CorpusWindows | Parent:
    """The config's corpus as planned in `plan`, or the dataset of `plan.tokens_from`; not read yet.

    Raises:
        PlanMismatch: The subject's tokenizer is not the one that produced the plan's tokens.
    """
    parent = Parent.of(config)
    if parent is not None:
        return parent
    _, corpus, spec = _sections(config)
    files = find_files(corpus, allow_http=config.storage.allow_http)
    subject = _outline(config)
    if subject.identity.tokenizer_sha256 != plan.subject.tokenizer_sha256:
        raise PlanMismatch(
            "the plan's tokens cannot be recomputed",
            expected=f"the tokenizer with sha256 {plan.subject.tokenizer_sha256}",
            got=subject.identity.tokenizer_sha256,
            fix=OTHER_TOKENIZER,
        )
    templates = chat_templates(corpus, subject.tokenizer, subject.identity.model)
    tokenizer = DocumentTokenizer(
        subject.tokenizer, subject.identity, spec, plan, templates, _has_roles(corpus)
    )
    return CorpusWindows(corpus, tokenizer.spec, tokenizer, files, folder, PlanProgress(None, files))


def find_plan(
    config: Config, store: ObjectStore, *, subject: Subject | PlanSubject | None = None
) -> HarvestPlan | None:
    """The root's plan, if it is complete, checked against the config without reading the corpus.

    Sections that the config leaves out are not compared. Without `subject`, what the config itself says of
    the subject is compared (its files, and dtype, attention and commit if they are given explicitly).

    Returns:
        The plan; None if there is none, or token chunks are missing (`make_plan` adds them).

    Raises:
        PlanMismatch: The plan at the root differs; the fields are named.
    """
    plan = _stored_plan(store)
    if plan is None:
        return None
    parent = Parent.of(config)
    if parent is not None:
        parent.require_same(plan, store)
    identity = subject.identity if subject else None
    same = config.plan is not None and config.plan.hooks == plan.spec.hooks
    sites = tuple(subject.sites(plan.spec.hooks)) if subject and same else None
    refuse_other(plan, config, store, identity, sites)
    return None if missing_tokens(plan, store) else plan


def missing_tokens(plan: HarvestPlan, store: ObjectStore) -> list[int]:
    """Units of which a chunk of tokens or labels is not in the store, ascending."""
    # One listing of each, a page per 1,000 keys, instead of a request per unit.
    have = {key for key, _ in store.list(TOKENS_ARRAY)}
    if plan.labels is not None:
        have |= {key for key, _ in store.list(LABELS_GROUP)}
    return [
        unit
        for unit in range(plan.units)
        if not have.issuperset((tokens_key(unit), *label_keys(plan, unit).values()))
    ]


def _plan_differences(
    plan: HarvestPlan,
    config: Config,
    identity: SubjectIdentity | None = None,
    sites: tuple[HookSite, ...] | None = None,
) -> list[str]:
    """The fields in which `plan` is not what `config` asks for: `field: stored X, asked for Y` for each.

    The subject is identified by the digests of its weights and tokenizer; the location of its files is
    provenance.
    """
    stored: dict[str, Any] = plan.model_dump(mode="json")
    stored["subject"]["engine"] = plan.subject.engine  # left out where it is transformers
    wanted = dict(stored)
    if config.plan is not None:
        # `auto` accepts whatever is stored: what it means may have changed since the plan was made.
        spec = config.plan.settled(plan.spec.model_dump(include=set(BEFORE)))
        if config.plan.tokens_from is not None:
            spec = config.plan.on_windows_of(plan.spec)
        wanted["spec"] = plan.model_copy(update={"spec": spec}).model_dump(mode="json")["spec"]
    if config.corpus is not None:
        wanted["corpus"] = config.corpus.model_dump(mode="json")
    if identity is not None:
        found = {**identity.model_dump(mode="json"), "engine": identity.engine}
        wanted["subject"] = {**found, **_moved(plan.subject, identity)}
    elif config.subject is not None:
        moved = _moved(plan.subject, config.subject)
        wanted["subject"] = {**stored["subject"], **_stated(config.subject), **moved}
    if sites is not None:
        wanted["sites"] = [site.model_dump(mode="json") for site in sites]
    return differing_fields(stored, wanted)


def _moved(planned: SubjectIdentity, found: SubjectIdentity | SubjectSpec) -> dict[str, Any]:
    """The planned location of the subject's files, if the same files are elsewhere now; otherwise empty."""
    if found.model == planned.model:
        return {}
    if isinstance(found, SubjectSpec):
        # Here, not above: it imports transformers, which only a subject with another name needs.
        from winnow.subject.weights import has_planned_files

        same = has_planned_files(found, planned)
    else:
        digests = found.weights_sha256, found.tokenizer_sha256
        same = digests == (planned.weights_sha256, planned.tokenizer_sha256)
    return {"model": planned.model, "revision": planned.revision} if same else {}


def _stated(spec: SubjectSpec) -> dict[str, Any]:
    """The fields of an identity that the spec alone decides."""
    stated: dict[str, Any] = {"model": spec.model, "engine": spec.engine}
    if spec.attention != "auto":
        stated["attention"] = spec.attention
    if spec.dtype != "auto":
        stated["dtype"] = spec.dtype
    # A commit; a branch or tag may name another one by now, and the digests tell.
    if spec.revision is not None and len(spec.revision) == 40:
        stated["revision"] = spec.revision
    return stated


def refuse_other(
    plan: HarvestPlan,
    config: Config,
    store: ObjectStore,
    identity: SubjectIdentity | None = None,
    sites: tuple[HookSite, ...] | None = None,
) -> None:
    """Check that `plan` is what `config` asks for.

    Raises:
        PlanMismatch: It is not; the differing fields are named.
    """
    if plan.derived is not None:
        raise PlanMismatch(
            f"{store.uri} holds a dataset that was derived from another",
            got=plan.derived.words,
            fix="Name another root; `winnow derive` completes and remakes it",
        )
    lines = _plan_differences(plan, config, identity, sites)
    if lines:
        fix = "Name another root, or restore these fields in the config"
        if any(line.startswith("subject.tokenizer_sha256") for line in lines):
            fix = OTHER_TOKENIZER
        # what is at the new place is not read to find out: it may be all of a crawl
        elif all(line.startswith("corpus.sources") for line in lines) and not missing_tokens(plan, store):
            fix += (
                "; if the files have only moved, leave them out (--set corpus=null): the plan has their text"
            )
        raise PlanMismatch(f"{store.uri} already holds another plan", got="; ".join(lines[:12]), fix=fix)
    if config.subject is not None and config.subject.model != plan.subject.model:
        say(
            f"{config.subject.model} holds the weights and the tokenizer that were planned as "
            f"{plan.subject.model}"
        )


def _stored_plan(store: ObjectStore) -> HarvestPlan | None:
    return load_plan(store) if store.size(PLAN_KEY) is not None else None


def _sections(config: Config) -> tuple[SubjectSpec, CorpusSpec, PlanSpec]:
    return section(config.subject, "subject"), section(config.corpus, "corpus"), section(config.plan, "plan")


def _outline(config: Config) -> Subject:
    """The subject for planning, without its weights, which need neither memory nor a GPU then."""
    # Here, not above: it imports torch, which a caller with a subject of another kind does without.
    from winnow.subject.devices import device_of
    from winnow.subject.divided import check_divisible
    from winnow.subject.engine import check_engine
    from winnow.subject.load import Subject

    spec, plan = section(config.subject, "subject"), section(config.plan, "plan")
    check_engine(spec.engine, plan)
    # What `dtype: auto` means depends on where the actors will run. On a cluster this machine's own devices
    # say nothing about that, so only the config is asked.
    if config.harvest.ray_address is None:
        gpu = device_of(spec).type == "cuda" and config.harvest.gpus_per_actor != 0
    else:
        gpus = config.harvest.gpus_per_actor
        gpu = spec.device.startswith("cuda") or spec.device_map is not None or bool(gpus)
    found = Subject.outline(spec, gpu=gpu)
    check_divisible(spec, plan, found.model)
    # The width at a module path, and whether documents are kept apart, are known only from forward passes; on
    # the CPU if the GPUs are on other machines.
    if plan.attend == "document" or not all(parse_hook(hook) for hook in plan.hooks):
        dtype = found.identity.dtype
        elsewhere = {"device": "cpu", "device_map": None} if config.harvest.ray_address else {}
        found = Subject.load(spec.model_copy(update={"dtype": dtype, **elsewhere}), until=plan.hooks)
        if plan.attend == "document":
            found.require_documents_apart(plan.context_length)
    if config.harvest.ray_address and spec.dtype == "auto":
        say(f"plan: the subject runs in {found.identity.dtype}; subject.dtype fixes it")
    return found


def _check_context(spec: PlanSpec, identity: SubjectIdentity) -> None:
    if identity.context_limit is not None and spec.context_length > identity.context_limit:
        raise ConfigError(
            "plan.context_length is longer than the subject allows",
            expected=f"at most {identity.context_limit}",
            got=spec.context_length,
            fix="Lower plan.context_length",
        )


def _check_shards(spec: PlanSpec, sites: tuple[HookSite, ...]) -> None:
    for site in sites:
        try:
            check_shard_size(spec, site)
        except ValueError as error:
            raise ConfigError(str(error)) from None


def _check_room(plan: HarvestPlan, store: ObjectStore, units: int) -> None:
    per_token = 4 + (LABEL_BYTES if plan.labels is not None else 0)
    needed, free = (
        units * plan.spec.windows_per_unit * plan.spec.context_length * per_token,
        store.free_bytes(),
    )
    if free is not None and needed > free:
        raise StoreError(
            f"disk too small for the tokens at {store.uri}",
            expected=f"{needed / 1e9:.2f} GB free",
            got=f"{free / 1e9:.2f} GB",
            fix="Free some space, choose another root, or lower plan.train_units",
        )


def _version() -> str:
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _put(puts: Iterable[Callable[[Executor], None]], report: Callable[[int], None]) -> None:
    """Store units, several in parallel; each gets the threads for chunks, and `report` how many are done."""
    # Twice as many as are stored are in memory at once: reading the spill stays ahead, and memory bounded.
    done = 0
    running: set[Future[None]] = set()
    units = ThreadPoolExecutor(PUT_UNITS, "winnow-put-units")
    chunks = ThreadPoolExecutor(PUT_THREADS, "winnow-put-chunks")
    try:
        for put in puts:
            running.add(units.submit(put, chunks))
            while len(running) >= 2 * PUT_UNITS:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                done += _settle(finished)
                report(done)
        done += _settle(wait(running).done)
        report(done)
    finally:
        # In this order: a unit that is being stored waits for its chunks.
        units.shutdown(cancel_futures=True)
        chunks.shutdown()


def _put_unit(make: MakeUnit, store: ObjectStore, plan: HarvestPlan, unit: int, chunks: Executor) -> None:
    planned = make()
    # At the same time: a local store syncs file and folder of each chunk, and a file system commits what
    # waits for it together.
    puts = [
        chunks.submit(put_label, store, plan, unit, name, planned.labels[name])
        for name in label_keys(plan, unit)
    ]
    puts.append(chunks.submit(put_tokens, store, plan, unit, planned.tokens))
    _settle(wait(puts).done)


def _settle(finished: Collection[Future[None]]) -> int:
    for future in finished:
        future.result()
    return len(finished)
