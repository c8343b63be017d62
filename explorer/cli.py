"""`winnow index`, `winnow explore` and `winnow export-features`."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from explorer.index import Indexer, open_index_store
from explorer.subjects import LazySubject
from schemas.base import validate
from schemas.config import StorageSpec
from schemas.errors import ConfigError
from schemas.features import FeatureIndex, IndexSpec
from schemas.subject import SubjectSpec
from store import ActivationStore
from store.console import Progress, emit, guard, load_config, print_table
from trainer.sae import Sae

SaeUri = Annotated[str, typer.Argument(metavar="SAE", help="Folder or URI of a published SAE")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE", help="YAML file with `root` and, if wanted, `subject` and `storage`"
    ),
]
Root = Annotated[
    str | None, typer.Option("--root", metavar="ROOT", help="The dataset, a folder or URI; over the config's")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout")]


class Place(NamedTuple):
    """Where the dataset and the subject are, as the options say."""

    root: str | None
    subject: SubjectSpec | None
    storage: StorageSpec

    @classmethod
    def of(cls, config: Path | None, root: str | None) -> Place:
        """Read the config, if there is one."""
        if config is None:
            return cls(root, None, StorageSpec())
        settings = load_config(config, [f"root={root}"] if root else [])
        return cls(settings.root, settings.subject, settings.storage)


def register(app: typer.Typer) -> None:
    """Add the explorer's commands to `app`."""
    app.command("index")(index_command)


def default_index(sae: str) -> str:
    """Where the index of an SAE lies unless somebody says otherwise."""
    return sae.rstrip("/") + "/features"


def index_command(
    sae: SaeUri,
    config: ConfigFile = None,
    root: Root = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Where the index goes; default SAE/features")
    ] = None,
    scratch: Annotated[
        str | None,
        typer.Option(
            "--scratch", metavar="DIR", help="Local folder for codes while it is made; default OUT/scratch"
        ),
    ] = None,
    units: Annotated[
        int | None, typer.Option(help="Read this many units of the dataset; default all")
    ] = None,
    top: Annotated[int, typer.Option(help="Best windows kept a latent")] = 16,
    logits: Annotated[
        int, typer.Option(help="Promoted and suppressed tokens kept a latent; 0 does without the subject")
    ] = 12,
    neighbours: Annotated[
        int, typer.Option(help="Nearest latents kept, by cosine and by co-activation")
    ] = 12,
    as_json: AsJson = False,
) -> None:
    """Index an SAE's latents: best windows, random windows, histograms, logits, neighbours.

    Encodes the dataset's stored activations once; the subject model is loaded for its unembedding only.
    Memory stays flat however many latents or rows there are. Interrupt it whenever you like: the same
    command goes on where it stopped, and a finished index is only shown again.

    Example: `winnow index runs/quickstart --config configs/quickstart.yaml`
    """
    with guard():
        spec = validate(
            IndexSpec,
            {"units": units, "top": top, "logits": logits, "neighbours": neighbours},
            origin="the options",
        )
        place = Place.of(config, root)
        meta = build_index(sae, place, out or default_index(sae), scratch, spec)
        emit(meta.model_dump(mode="json"), as_json, lambda: _show(meta, out or default_index(sae)))


def build_index(sae_uri: str, place: Place, out: str, scratch: str | None, spec: IndexSpec) -> FeatureIndex:
    """What `winnow index` does, with progress on stderr."""
    if place.root is None:
        raise ConfigError("the dataset", expected="--root ROOT or --config FILE", got="neither")
    dataset = ActivationStore.open(place.root, place.storage)
    subject = LazySubject(place.subject, dataset.plan.subject)
    sae = Sae.load(sae_uri, device=subject.device, storage=place.storage)
    store, folder = open_index_store(out, scratch, place.storage)
    indexer = Indexer(
        dataset,
        place.root,
        sae,
        store,
        folder,
        spec,
        subject.whole() if spec.logits else None,
        subject.tokenizer,
    )
    with ExitStack() as stack:
        bars: dict[str, Progress] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in bars:
                stack.pop_all().close()
                bars[step] = stack.enter_context(Progress(f"index, {step}", total, step))
            bars[step].update(done)

        return indexer.run(progress)


def _show(meta: FeatureIndex, out: str) -> None:
    print_table(
        f"index of {meta.hook} → {out}",
        [
            ("latents", f"{meta.latents:,}"),
            ("windows read", f"{meta.windows:,}"),
            ("rows read", f"{meta.rows:,}"),
            ("made", meta.created),
        ],
    )
