"""`winnow circuit`: which latents make the subject say what it says, as a graph that can be tested."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from winnow.cli.console import emit, guard, print_table
from winnow.common.figures import count_of
from winnow.common.reporter import say
from winnow.schemas.errors import ConfigError

if TYPE_CHECKING:
    from winnow.evaluator.circuits.graph import Graph

HELP = """Trace how a transcoder set's latents make the subject predict what comes after a prompt.

Writes an attribution graph (JSON that circuit-tracer's and Neuronpedia's pages read as well) and prints its
scores and strongest paths. Attention patterns and the norms' denominators are held as they are on this
prompt; what the set misses of an MLP's output is an error node. *replacement* is the share of influence that
starts at tokens, not at errors; *completeness* the share of what nodes receive that is explained.

A graph is a claim: --edit changes latents in the subject and shows the foretold beside the found change, and
--faithfulness does so for many latents, with a rank correlation. --text measures the set itself, and --root
does so on the held-out windows of the harvested dataset, whose beginnings are prompts for --faithfulness.
"""
EPILOG = (
    "Examples: `winnow circuit runs/clt --prompt 'The capital of France is'`; with `--out graph.json`, "
    "`winnow circuit runs/clt --graph graph.json --edit '3.1207@5=0' --edit '7.88@5*2'` takes one latent "
    "away and doubles another (LAYER.LATENT@POSITION, as the paths name them); "
    "`winnow circuit runs/clt --graph graph.json --faithfulness 200`; "
    "`winnow circuit runs/clt --text held-out.txt`; "
    "`winnow circuit runs/clt --root data/clt --faithfulness 400`"
)


def register(app: typer.Typer) -> None:
    """Add the command `circuit` to an app."""
    app.command("circuit", help=HELP, epilog=EPILOG)(command)


def command(
    set_uri: Annotated[str, typer.Argument(metavar="SET", help="Folder or URI with set.json.")],
    prompt: Annotated[
        str | None, typer.Option(help="Text to trace; the token after it is explained.")
    ] = None,
    graph: Annotated[
        Path | None, typer.Option(help="A graph that was traced before, in place of --prompt.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the graph. Default: one in SET/graphs, which `winnow explore SET` shows."
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            help="A token to explain, with its leading space; again for more. Default: the most probable."
        ),
    ] = None,
    max_features: Annotated[
        int, typer.Option(min=1, help="Most latents in the graph, the most influential by estimate.")
    ] = 2000,
    prune: Annotated[
        float, typer.Option(min=0, max=1, help="Share of influence that the written graph keeps nodes for.")
    ] = 0.8,
    prune_edges: Annotated[
        float, typer.Option(min=0, max=1, help="Share of influence that it keeps edges for.")
    ] = 0.98,
    edit: Annotated[
        list[str] | None,
        typer.Option(
            help="LAYER.LATENT@POSITION=VALUE or *FACTOR: change a latent in the subject; again for more."
        ),
    ] = None,
    faithfulness: Annotated[
        int | None,
        typer.Option(min=2, help="Take away and double so many latents, and compare; 200 say something."),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Held-out text: the set's FVU, L0, delta CE on it.")
    ] = None,
    root: Annotated[
        str | None,
        typer.Option(help="The harvested dataset, whose held-out windows take the place of --text."),
    ] = None,
    windows: Annotated[
        int, typer.Option(min=1, help="Windows of --text, of 128 tokens each, or of --root.")
    ] = 16,
    prompt_tokens: Annotated[
        int, typer.Option(min=2, help="Leading tokens of each window of --root that are a prompt.")
    ] = 32,
    top: Annotated[int, typer.Option(min=0, max=200, help="Number of paths shown.")] = 10,
    subject: Annotated[
        str | None, typer.Option(help="The subject, if not as the set's card names it.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file whose `subject` is used instead.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")] = False,
) -> None:
    """Trace, edit or measure; the help text is `HELP`."""
    with guard():
        _require_one_question(prompt, graph, text, root, edit, faithfulness)
        from winnow.common.config_file import load_config
        from winnow.evaluator.circuits import report
        from winnow.evaluator.circuits.editing import Edit
        from winnow.sae.sets import TranscoderSet
        from winnow.schemas.config import StorageSpec
        from winnow.schemas.subject import SubjectSpec

        # Before the subject is loaded and a prompt traced: a misspelt one is found at once.
        for each in edit or ():
            Edit.parse(each)
        settings = load_config(config, []) if config else None
        stated = settings.subject if settings else SubjectSpec(model=subject) if subject else None
        known = report.read_graph(graph) if graph is not None else None
        set_ = TranscoderSet.load(set_uri)
        model = report.subject_of(set_, stated)
        set_.to(model.device)
        result: dict[str, Any] = {}
        if text is not None:
            result["set"] = _figures_of(model, set_, _words(model, set_, text, windows))
        if root is not None:
            storage = settings.storage if settings else StorageSpec()
            held_out = report.held_out_windows(model, root, windows, storage)
            result["set"] = _figures_of(model, set_, held_out)
            if faithfulness and prompt is None and graph is None:
                prompts = held_out[:, :prompt_tokens]
                shares = (prune, prune_edges)
                graphs = report.trace_windows(model, set_, prompts, shares, max_features=max_features)
                result |= _faithful(model, set_, graphs, faithfulness)
        if prompt is not None:
            limits = {"max_features": max_features}
            name = out.stem[:200] if out else _name_of(prompt)
            whole = report.trace_prompt(model, set_, prompt, targets or [], slug=name, **limits)
            known = whole.prune(prune, prune_edges)
            say(_write(known, set_uri, name, out))
        if known is not None:
            result |= _asked(known, model, set_, edit, faithfulness, top)
        emit(result, as_json, lambda: show(result))


def _name_of(prompt: str) -> str:
    """The name of a prompt's graph: its first words, in characters that every storage accepts."""
    return re.sub("[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "graph"


def _write(graph: Graph, set_uri: str, name: str, out: Path | None) -> str:
    """Write a graph to `out`, or where the explorer of the set finds it; returns what to say of it."""
    from winnow.evaluator.circuits import report
    from winnow.explorer.site.graphs import GRAPHS
    from winnow.store.objects import open_store

    if out is not None:
        report.write_graph(graph, out)
        return f"wrote {out}; `winnow explore {set_uri} --graph {out}` shows it"
    key = f"{GRAPHS}/{name}.json"
    open_store(set_uri).put(key, graph.to_json())
    return f"wrote {set_uri.rstrip('/')}/{key}; `winnow explore {set_uri}` shows it"


def _require_one_question(
    prompt: str | None,
    graph: Path | None,
    text: Path | None,
    root: str | None,
    edit: list[str] | None,
    faithfulness: int | None,
) -> None:
    """ConfigError unless the options make sense together; before anything heavy is imported."""
    if prompt is not None and graph is not None:
        raise ConfigError("the prompt", expected="--prompt TEXT or --graph FILE, one of them", got="both")
    if text is not None and root is not None:
        raise ConfigError("the held-out text", expected="--text FILE or --root URI, one of them", got="both")
    if prompt is None and graph is None:
        if text is None and root is None:
            expected = "--prompt TEXT, --graph FILE, --text FILE or --root URI"
            raise ConfigError("what to do", expected=expected, got="none")
        if edit:
            raise ConfigError("--edit", expected="--prompt TEXT or --graph FILE with it")
        if faithfulness and root is None:
            raise ConfigError("--faithfulness", expected="--prompt TEXT, --graph FILE or --root URI with it")


def _asked(
    graph: Graph, model: Any, set_: Any, edits: list[str] | None, latents: int | None, top: int
) -> dict[str, Any]:
    from winnow.evaluator.circuits import report
    from winnow.evaluator.circuits.fitting import check_graph

    check_graph(model, set_, graph.origin)
    found: dict[str, Any] = {"graph": report.summary(graph, top)}
    if edits:
        found["edited"] = report.edit_graph(model, set_, graph, edits)
    if latents:
        found |= _faithful(model, set_, [graph], latents)
    return found


def _faithful(model: Any, set_: Any, graphs: list[Graph], latents: int) -> dict[str, Any]:
    from winnow.evaluator.circuits.faithful import faithfulness

    return {"faithfulness": [each.model_dump() for each in faithfulness(model, set_, graphs, latents)]}


def _words(model: Any, set_: Any, text: Path, windows: int) -> Any:
    from winnow.evaluator.circuits import report

    try:
        words = text.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {text}", expected="a text file in UTF-8", got=str(error)) from error
    return report.windows_of(model, set_, words, 128, windows)


def _figures_of(model: Any, set_: Any, windows: Any) -> list[dict[str, Any]]:
    from winnow.evaluator.circuits.quality import set_quality

    return [each.model_dump() for each in set_quality(model, set_, windows)]


def show(found: dict[str, Any]) -> None:
    """Print what was found as tables."""
    if "set" in found:
        _show_figures("the set on held-out text", found["set"])
    if "graph" in found:
        _show_graph(found["graph"])
    if "edited" in found:
        _show_edit(found["edited"])
    if "faithfulness" in found:
        _show_figures("foretold and found changes of the most probable logit", found["faithfulness"])


def _show_graph(graph: dict[str, Any]) -> None:
    said = ", ".join(f"{each['text']!r} {each['probability']:.3f}" for each in graph["logits"])
    # Pieces of text as literals: a leading space or a newline is part of them.
    lines = [
        [f"{path['share']:.2%}", "+" if path["positive"] else "-", " -> ".join(path["nodes"])]
        for path in graph["paths"]
    ]
    print_table(f"after {graph['prompt']!r}: {said}", lines, header=("share", "", "strongest paths"))
    say(
        f"{count_of(graph['features'], 'latent')}, {count_of(graph['errors'], 'error')}, "
        f"{count_of(graph['links'], 'edge')}; "
        f"replacement {graph['replacement']:.3f}, completeness {graph['completeness']:.3f}"
    )
    left = graph["left_out"]
    if left is not None:
        say(
            f"left out: {count_of(left['latents'], 'active latent')} not traced, "
            f"{count_of(left['nodes'], 'node')} and {count_of(left['links'], 'edge')} by pruning, "
            f"{left['probability']:.1%} of the probability"
        )


def _show_edit(edited: dict[str, Any]) -> None:
    lines = [
        [
            repr(each["text"]),
            *(f"{each[name]:+.4f}" for name in ("foretold", "held", "found")),
            f"{each['probability']:.3f} -> {each['probability_after']:.3f}",
        ]
        for each in edited["logits"]
    ]
    what = ", ".join(f"{each['edit']} (was {each['before']:.3f})" for each in edited["edits"])
    header = ("logit", "by the graph", "replacement model", "in the subject", "probability")
    print_table(f"change of the logits by {what}", lines, header=header)


def _show_figures(title: str, figures: list[dict[str, Any]]) -> None:
    lines = [[each["id"], _number(each["value"]), _interval(each), str(each["samples"])] for each in figures]
    print_table(title, lines, header=("figure", "value", "95 % interval", "samples"))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _interval(each: dict[str, Any]) -> str:
    return "-" if each["low"] is None else f"{each['low']:.4f} to {each['high']:.4f}"
