"""Latents in a notebook or script: what fires on a text, what a latent fires on, ablation, steering.

::

    from winnow import Latents

    latents = Latents.open("runs/quickstart", "configs/quickstart.yaml")
    latents.read("In the beginning God created the heaven")   # the strongest latents of every token
    latents.show(12)                                          # a card: examples, tokens it promotes
    latents.ablate("In the beginning God created", 12)        # what becomes likelier and less likely
    latents.steer("Now is the winter of", {12: 2.0})          # text without and with it

What the methods return shows itself: as a table in a notebook, as plain text elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from winnow.common.config_file import load_config
from winnow.explorer.index.make import make_index
from winnow.explorer.place import Place, default_index
from winnow.explorer.site.card import Card
from winnow.explorer.site.desk import Desk, open_desk
from winnow.explorer.site.exhibit import Exhibit
from winnow.explorer.site.export import visible
from winnow.explorer.site.monitor import MAX_TOKENS
from winnow.explorer.site.reading import Ablation, Reading, ablate, read_tokens, tokenise
from winnow.sae.model import Sae
from winnow.schemas.config import Config, StorageSpec
from winnow.schemas.errors import ConfigError
from winnow.schemas.features import FeatureIndex, IndexSpec
from winnow.subject.generate import Steer
from winnow.subject.load import Subject

Settings = Config | str | PathLike[str]
"""A config, or the path of its file."""


class Brief(NamedTuple):
    """A latent in one line."""

    latent: int
    density: float
    """Share of rows on which it fires."""
    largest: float
    """Largest activation, in units of the normalised space."""
    fires_on: tuple[str, ...]
    """Tokens with the largest shares of its activation."""
    promotes: tuple[str, ...]
    """Tokens whose logits its direction raises most, by the direct path."""
    explanation: str | None
    """From the evaluation, if there is one."""


class Shown:
    """A small table that shows itself in a notebook and prints as text.

    Attributes:
        header: Names of the columns.
        rows: Cells as text.
    """

    def __init__(self, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        self.header = list(header)
        self.rows = [[str(cell) for cell in row] for row in rows]

    def __repr__(self) -> str:
        lines = [self.header, *self.rows]
        widths = [max(len(line[at]) for line in lines) for at in range(len(self.header))]
        cells = (zip(line, widths, strict=True) for line in lines)
        return "\n".join("  ".join(text.ljust(width) for text, width in line).rstrip() for line in cells)

    def _repr_html_(self) -> str:
        def line(tag: str, cells: Sequence[str]) -> str:
            cells = [f'<{tag} style="text-align:left">{escape(cell)}</{tag}>' for cell in cells]
            return f"<tr>{''.join(cells)}</tr>"

        body = "".join(line("td", row) for row in self.rows)
        return f"<table><thead>{line('th', self.header)}</thead><tbody>{body}</tbody></table>"


class Read(Shown):
    """A text as the SAE reads it: a line per token, with its strongest latents.

    Attributes:
        tokens: Texts of the tokens, BOS included.
        reading: The codes [T, S] themselves.
    """

    def __init__(self, exhibit: Exhibit, reading: Reading, top: int) -> None:
        self.tokens, self.reading = exhibit.words(reading.ids), reading
        rows = [
            [quoted([token]), "; ".join(f"{latent} ({value:.2f})" for latent, value in self.top(at, top))]
            for at, token in enumerate(self.tokens)
        ]
        super().__init__(("token", "strongest latents (activation)"), rows)

    def top(self, position: int, count: int = 3) -> list[tuple[int, float]]:
        """The strongest latents (number, activation) at a token, the strongest first."""
        values, indices = self.reading.values[position], self.reading.indices[position]
        best = values.topk(min(count, len(values)))
        pairs = zip(indices[best.indices].tolist(), best.values.tolist(), strict=True)
        return [(latent, value) for latent, value in pairs if value > 0]

    def strongest(self, count: int = 10) -> list[int]:
        """The latents with the largest sums of activations over the text."""
        totals: dict[int, float] = {}
        flat = (self.reading.indices.flatten().tolist(), self.reading.values.flatten().tolist())
        for latent, value in zip(*flat, strict=True):
            totals[latent] = totals.get(latent, 0.0) + value
        order = sorted(totals, key=lambda latent: (-totals[latent], latent))
        return [latent for latent in order[:count] if totals[latent] > 0]


class Ablated(Shown):
    """A text without one latent: a line per token at which the predictions change.

    Attributes:
        effect: The changes at every token.
    """

    def __init__(self, exhibit: Exhibit, ids: Sequence[int], effect: Ablation) -> None:
        self.effect = effect
        rows = [
            [
                quoted(exhibit.words([ids[at]])),
                f"{effect.activation[at]:.2f}",
                f"{effect.kl[at]:.4f}",
                _votes(exhibit, effect.down[at]),
                _votes(exhibit, effect.up[at]),
            ]
            for at in range(len(ids))
            if effect.down[at] or effect.up[at]
        ] or [["the latent does not fire on this text", "", "", "", ""]]
        super().__init__(("after", "removed", "KL, nats", "less likely", "likelier"), rows)


class Steered(Shown):
    """A prompt continued without and with a steer, by the same random numbers."""

    def __init__(self, clean: str, steered: str) -> None:
        self.clean, self.steered = clean, steered
        super().__init__(("", "text"), [("clean", repr(clean)), ("steered", repr(steered))])


class Latents:
    """A published SAE with its index and its subject; open one with `Latents.open`.

    Attributes:
        exhibit: The index and the SAE, as the explorer's server holds them.
    """

    def __init__(self, exhibit: Exhibit, desk: Desk) -> None:
        self.exhibit = exhibit
        self._desk = desk

    @classmethod
    def open(
        cls, sae: str | PathLike[str], config: Settings | None = None, *, at: str | None = None
    ) -> Latents:
        """Open the latents of an SAE that is indexed (`winnow index`, or `winnow.index`).

        Args:
            sae: Folder or URI of the SAE.
            config: Says how the subject is loaded and storage reached; None takes both as the index says.
            at: Folder or URI of its index; None is the folder `features` beside the SAE.

        Raises:
            ConfigError: It is not indexed, or it is a transcoder set (name one of its layers).
        """
        uri = str(sae)
        desk = open_desk([uri], [at] if at else None, _place(config), seats=1)
        if len(desk.exhibits) != 1 or not desk.subjects:
            raise ConfigError(
                f"{uri} is a set of several layers",
                expected="one SAE",
                got=f"{len(desk.exhibits)} layers",
                fix=f"Name one of them, such as {desk.exhibits[0].uri if desk.exhibits else uri}",
            )
        return cls(desk.exhibits[0], desk)

    def __len__(self) -> int:
        return int(self.exhibit.table.meta.latents)

    def __repr__(self) -> str:
        meta = self.exhibit.table.meta
        hooks = ", ".join(part.hook for part in meta.parts) or meta.hook
        return f"{len(self):,} latents of {self.exhibit.uri}, {hooks} of {meta.subject.model}"

    @property
    def subject(self) -> Subject:
        """The language model, loaded when it is first needed.

        Raises:
            ConfigError: It is a crosscoder of several.
        """
        return self._desk.model()

    @property
    def sae(self) -> Sae:
        """The SAE, on the subject's device."""
        return self.exhibit.sae(next(iter(self._desk.subjects.values())).device)

    # ---- from the index ----------------------------------------------------------------------------

    def brief(self, latent: int) -> Brief:
        """One latent in a line.

        Raises:
            ConfigError: No such latent.
        """
        found = self.exhibit.brief(self._checked(latent))
        return Brief(
            latent,
            found["density"],
            found["largest"],
            tuple(found["fires_on"]),
            tuple(found["promotes"]),
            found["explanation"],
        )

    def find(self, query: str, count: int = 10) -> list[Brief]:
        """Latents with a text in the tokens they fire on or promote, or in an explanation of them.

        Upper and lower case and the spaces around it do not count. First come latents that fire on the text
        itself, then those that fire on tokens with it, then the others; of equals those first of whose
        activation more is on one token.
        """
        wanted = query.strip().lower()
        found = self.exhibit.find(query.strip(), 0.0, 1.0)
        rows = self.exhibit.page(found, "token_share", True, 0, len(found))["rows"]

        def place(row: dict[str, Any]) -> tuple[int, int]:
            words = [word.strip().lower() for word in row["fires_on"]]
            parts = [at for at, word in enumerate(words) if wanted in word]
            return words.index(wanted) if wanted in words else len(words), min(parts, default=len(words))

        # Stable: among equals the order of the page stays.
        return [self.brief(row["latent"]) for row in sorted(rows, key=place)[:count]]

    def sample(self, count: int = 10, seed: int = 0) -> list[Brief]:
        """Latents that fire, drawn at random."""
        alive = np.flatnonzero(self.exhibit.table.column("fires"))
        drawn = np.random.default_rng(seed).permutation(alive)[:count]
        return [self.brief(int(latent)) for latent in np.sort(drawn)]

    def table(self, latents: Sequence[int | Brief]) -> Shown:
        """Latents as a table: how often and on what they fire, what they promote."""
        briefs = [each if isinstance(each, Brief) else self.brief(each) for each in latents]
        return Shown(
            ("latent", "of tokens", "fires on", "promotes"),
            [
                (one.latent, f"{one.density:.2%}", quoted(one.fires_on), quoted(one.promotes))
                for one in briefs
            ],
        )

    def show(self, latent: int, examples: int = 6) -> Card:
        """A latent's card: how often it fires, on which texts, what it promotes and suppresses.

        Shows itself in a notebook; `Card.html` is the fragment to put into another page.

        Args:
            latent: Its number.
            examples: Largest number of texts, the strongest first.

        Raises:
            ConfigError: No such latent.
        """
        return Card.of(self.exhibit, self._checked(latent), examples)

    # ---- through the subject -----------------------------------------------------------------------

    def read(self, text: str, top: int = 3) -> Read:
        """Which latents fire on a text of at most 512 tokens.

        Args:
            text: Begins as a window of the dataset does.
            top: Latents listed per token.

        Raises:
            ConfigError: The text is empty or too long.
        """
        return Read(self.exhibit, self._reading(text), top)

    def ablate(self, text: str, latent: int, *, part: str = "") -> Ablated:
        """How the predictions on a text change if a latent is set to 0; the SAE's error is kept.

        Args:
            text: As for `read`.
            latent: Which latent.
            part: Of a crosscoder: the part whose direction is removed, from the activations of that part's
                subject. All subjects are loaded, since codes need the rows of all parts.

        Raises:
            ConfigError: No such latent, the text is empty or too long, or a crosscoder's part is not named.
        """
        place = self.exhibit.place("an ablation", part)
        self._checked(latent)
        reading = self._reading(text)
        subject, drop = self._desk.model(place.subject), self.exhibit.table.meta.drop_leading
        effect = ablate(subject, self.sae, reading, latent, drop_leading=drop, part=place.part)
        return Ablated(self.exhibit, reading.ids, effect)

    def steer(
        self,
        prompt: str,
        strengths: Mapping[int, float],
        *,
        tokens: int = 40,
        temperature: float = 1.0,
        seed: int = 0,
        op: Literal["clamp", "add"] = "clamp",
        part: str = "",
    ) -> Steered:
        """Continue a prompt without and with latents held at a strength, or with a strength added.

        Args:
            prompt: Begins as a window of the dataset does.
            strengths: Latent -> its activation at every token, in multiples of its largest in the dataset;
                0 ablates it. With `op="add"` it is added to the activation.
            tokens: Most tokens that are generated.
            temperature: Divides the logits; 0 takes the likeliest token.
            seed: Of the draws, the same for both texts.
            op: `clamp` or `add`; a crosscoder takes `add` only, since its codes need the rows of all parts.
            part: Of a crosscoder: the part whose direction is added, in that part's subject, which alone is
                loaded.

        Raises:
            ConfigError: No such latent, a prompt of unsuitable length, a number out of range, or a crosscoder
                without its part or with another `op` than `add`.
        """
        place = self.exhibit.place("steering", part)
        drop = self.exhibit.table.meta.drop_leading
        steers = [
            Steer(self.sae, each, op, strength * self.brief(each).largest, skip=drop, part=place.part)
            for each, strength in strengths.items()
        ]
        subject = self._desk.model(place.subject)
        ids = tokenise(subject, prompt, MAX_TOKENS, self.exhibit.window)

        def text(of: dict[str, list[Steer]]) -> str:
            run = subject.generate(ids, steer=of, max_new_tokens=tokens, temperature=temperature, seed=seed)
            return "".join(token.text for token in run)

        return Steered(text({}), text({place.hook: steers}))

    def _reading(self, text: str) -> Reading:
        meta = self.exhibit.table.meta
        subjects = self._desk.readers(self.exhibit)
        ids = tokenise(next(iter(subjects.values())), text, MAX_TOKENS, self.exhibit.window)
        return read_tokens(
            subjects, self.sae, ids, drop_leading=meta.drop_leading, sink_multiple=meta.sink_multiple
        )

    def _checked(self, latent: int) -> int:
        if not 0 <= latent < len(self):
            raise ConfigError("latent", expected=f"0 to {len(self) - 1}", got=latent)
        return latent


def index(sae: str | PathLike[str], config: Settings, spec: IndexSpec | None = None) -> FeatureIndex:
    """Index an SAE's latents, as `winnow index` does: what each fires on and promotes; resumes.

    Args:
        sae: Folder or URI of the SAE; the index becomes its folder `features`.
        config: Names the dataset (`root`), the subject and the storage.
        spec: What the index holds; None takes the defaults.

    Raises:
        SaeMismatch: The dataset lacks the SAE's hook, or is of another subject.
    """
    uri = str(sae)
    return make_index(uri, _place(config), default_index(uri), None, spec or IndexSpec())


def quoted(words: Sequence[str]) -> str:
    """Texts of tokens in one line, each in quotation marks so that spaces are seen."""
    return " ".join(f"“{visible(word)}”" for word in words)


def _votes(exhibit: Exhibit, pairs: Sequence[tuple[int, float]]) -> str:
    return " ".join(f"{quoted(exhibit.words([token]))} {change:+.3f}" for token, change in pairs[:3])


def _place(config: Settings | None) -> Place:
    if config is None:
        return Place(None, None, StorageSpec())
    settings = config if isinstance(config, Config) else load_config(Path(config))
    return Place.in_config(settings)
