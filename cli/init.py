"""`winnow init`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnow.cli.console import emit, guard, print_table
from winnow.cli.harvest import AsJson
from winnow.common.reporter import say

if TYPE_CHECKING:
    from winnow.cli.draft import Draft, Model
    from winnow.harvester.plan.survey import Survey
    from winnow.harvester.run.forecast import Forecast
    from winnow.schemas.config import Config
    from winnow.schemas.corpus import SourceSpec
    from winnow.subject.load import Subject

# Of documents this long a corpus should hold many: one is held out whole.
_LONG_TOKENS, _FEW_DOCUMENTS, _CUT_CHARS = 2000, 1000, 8000


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("init")(init_command)


def init_command(
    model: Annotated[
        str,
        typer.Option(metavar="MODEL", help="Hub id, local folder, .gguf file or package://DIST/FILE.gguf."),
    ],
    corpus: Annotated[
        list[str],
        typer.Option(
            metavar="FILES",
            help="Text, JSON lines or Parquet: a path, a pattern or an fsspec URI; may be repeated.",
        ),
    ],
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILES", help="More files, such as the rest of an unquoted *.txt."),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The config that is written; must not exist.")
    ] = Path("config.yaml"),
    column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Column with text, messages or token ids; default found by itself."
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Conversations: Jinja file of the chat template; default the model's."
        ),
    ] = None,
    hook: Annotated[
        str | None, typer.Option(metavar="HOOK", help="Default the residual stream after the middle layer.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens to harvest; default the corpus, at most 50 million of it."),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure/--no-measure", help="Run the model for some seconds, so that hours can be forecast."
        ),
    ] = True,
    json: AsJson = False,
) -> None:
    """Write a commented config for a model and a corpus, after looking at both.

    Reads the model's config and tokenizer, and a sample of the corpus: format, column, tokens per document.
    Chooses hook, context, units, latents and k from them, prints what the harvest will take, and writes FILE,
    which `winnow harvest FILE` and `winnow train FILE` run as it is. Results go to `data/NAME` and
    `runs/NAME`, by FILE's name.

    Example: `winnow init --model HuggingFaceTB/SmolLM2-135M --corpus 'texts/*.txt' --out mine.yaml`
    """
    with guard():
        from winnow.schemas.errors import ConfigError

        if out.exists():
            raise ConfigError(
                f"{out} exists", expected="a file that does not", got="one", fix="Name another with --out"
            )
        if not out.parent.is_dir():
            raise ConfigError("--out", expected="a file in a folder that exists", got=out)
        from winnow.cli.draft import config_text, draft
        from winnow.common.config_file import parse_config
        from winnow.harvester.plan.survey import describe_sources

        # First: a wrong path is found before a model is fetched.
        sources = describe_sources([*corpus, *(more or ())], column, template)
        subject = _outline(model)
        facts = _model(subject, model)
        if hook is not None:
            subject.sites([hook])
        found = draft(facts, _survey(sources, subject), hook, tokens)
        text = config_text(found, f"data/{out.stem}", f"runs/{out.stem}")
        config = parse_config(text, f"the config for {out}")
        forecast = _forecast(config, found, measure)
        # Last, and not over a file that came to be meanwhile: until here nothing has been written.
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
        shown: dict[str, Any] = {
            "config": str(out),
            "forecast": forecast.model_dump(mode="json"),
            "corpus_tokens": found.survey.tokens,
            "median_tokens": found.survey.median_tokens,
        }
        emit(shown, json, lambda: _show(found, forecast, out))


def _outline(model: str) -> Subject:
    import torch

    from winnow.schemas.base import validate
    from winnow.schemas.subject import SubjectSpec
    from winnow.subject.load import Subject

    spec = validate(SubjectSpec, {"model": model}, origin="--model")
    return Subject.outline(spec, gpu=torch.cuda.is_available())


def _model(subject: Subject, name: str) -> Model:
    from winnow.cli.draft import Model

    layers, limit = subject.identity.layers, subject.identity.context_limit
    (site,) = subject.sites([f"resid_post.{(layers - 1) // 2}"])
    return Model(name, layers, site.d_model, limit)


def _survey(sources: tuple[SourceSpec, ...], subject: Subject) -> Survey:
    from winnow.harvester.plan.survey import survey
    from winnow.schemas.corpus import CorpusSpec

    corpus = CorpusSpec(sources=sources)
    found = survey(corpus, subject)
    few = found.documents is not None and found.documents < _FEW_DOCUMENTS
    # Conversations and token ids are never cut.
    if few and found.median_tokens > _LONG_TOKENS and any(s.format == "auto" for s in corpus.sources):
        found = survey(corpus.model_copy(update={"max_document_chars": _CUT_CHARS}), subject)
    return found


def _forecast(config: Config, found: Draft, measure: bool) -> Forecast:
    from winnow.harvester.run import forecast as forecasts
    from winnow.schemas.config import section
    from winnow.schemas.subject import HookSite
    from winnow.store.objects import open_store

    # A forecast without a plan wants the number of units, which the config may leave to the plan.
    spec = section(config.plan, "plan").model_copy(update={"train_units": found.units})
    config = config.model_copy(update={"plan": spec})
    width = (HookSite(name=found.hook, d_model=found.model.width),)

    def rate() -> tuple[tuple[HookSite, ...], float | None]:
        if not measure:
            return width, None
        say("running the model for some seconds, to measure the harvest; --no-measure leaves it out")
        return forecasts.measure_rate(config)

    return forecasts.forecast(config, open_store(config.root, config.storage), None, measure=rate)


def _show(found: Draft, forecast: Forecast, out: Path) -> None:
    from winnow.common.figures import count_of, human_bytes
    from winnow.harvester.run.forecast import table_rows

    survey = found.survey
    print_table(
        f"{found.model.name} over {count_of(survey.files, 'file')} → {out}",
        [
            ("model", f"{count_of(found.model.layers, 'layer')} of width {found.model.width:,}"),
            ("corpus", f"{survey.tokens:,} tokens" if survey.tokens is not None else "of unknown size"),
            ("median document", f"{survey.median_tokens:,} tokens"),
            ("hook", found.hook),
            ("windows", f"of {found.context_length} tokens"),
            ("training rows", f"{found.rows:,} x {count_of(found.epochs, 'epoch')}"),
            ("latents, k", f"{found.latents:,}, {found.k}"),
            *table_rows(forecast),
        ],
    )
    if forecast.free_bytes is not None and forecast.bytes > forecast.free_bytes:
        say(
            f"the disk has {human_bytes(forecast.free_bytes)} for a dataset of "
            f"{human_bytes(forecast.bytes)}: harvest fewer tokens (--tokens), or to another root"
        )
    path = shlex.quote(str(out))
    say(f"wrote {out}; next: winnow harvest {path} && winnow train {path}")
