"""Family `judge`: a language model explains latents in words, and is quizzed on what the words predict.

*Explanation*: the model reads a latent's top training windows, in which its active tokens are marked, and
says in a sentence what they have in common (or the sentences come from a file). *Detection*: from the
sentence alone it says which of some held-out snippets contain an activation; half of them do. *Fuzzing*: it
reads snippets that all contain one, with tokens marked, and says which markings are right; half mark as many
other tokens. Scores are balanced accuracies, 0.5 for guessing, means over latents (Paulo et al. 2024, arXiv
2410.13928).

Text is sent to the endpoint that the config names and nowhere else; without `judge` nothing is sent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from winnow.common.reporter import Progress
from winnow.evaluator.activations import Activations, gather
from winnow.evaluator.bootstrap import mean_figure
from winnow.evaluator.judge.endpoint import Endpoint
from winnow.evaluator.judge.snippets import ActivePlaces, Snippets, wrong_marks
from winnow.evaluator.n2g.family import choose, observed, train_units, unit_windows
from winnow.evaluator.setting import Measured, Setting
from winnow.schemas.errors import ConfigError
from winnow.schemas.evaluation import JudgeSpec

_MAX_SENTENCE = 400
"""Characters of an explanation that are kept: a sentence was asked for, and whatever follows is not one."""
_EXPLAIN = (
    "You study one feature of a language model. You are shown snippets of text; the tokens on which the "
    "feature is active are between « and ». Say in one short sentence what they have in common: the words, "
    "the meaning or the position that activates the feature. Answer with the sentence alone."
)
_DETECT = (
    "You are told what activates a feature of a language model, and shown numbered snippets of text. For "
    "each, decide whether the feature is active somewhere in it. Answer with a JSON list alone, 1 for active "
    "and 0 for not, one number a snippet."
)
_FUZZ = (
    "You are told what activates a feature of a language model, and shown numbered snippets of text in which "
    "tokens are marked between « and ». For each, decide whether the marked tokens are those that activate "
    "the feature. Answer with a JSON list alone, 1 for right and 0 for wrong, one number a snippet."
)


def read_answers(text: str, count: int) -> list[bool] | None:
    """Find the last JSON list of `count` zeros and ones in a reply; None if there is none."""
    # The last: models that think aloud write lists on the way to their answer.
    for part in reversed(re.findall(r"\[[^\[\]]*\]", text)):
        try:
            found: Any = json.loads(part)
        except ValueError:
            continue
        if len(found) == count and all(type(each) in (int, bool) and each in (0, 1) for each in found):
            return [bool(each) for each in found]
    return None


def balanced_accuracy(answers: Sequence[bool], truth: Sequence[bool]) -> float:
    """Average the shares of positives and of negatives that were told right; there must be both."""
    said, true = np.array(answers), np.array(truth)
    return float((said[true].mean() + (~said[~true]).mean()) / 2)


def quiz(endpoint: Endpoint, system: str, sentence: str, asked: Sequence[tuple[str, bool]]) -> float | None:
    """Ask the model about some snippets.

    Args:
        endpoint: The model.
        system: The question.
        sentence: The explanation.
        asked: Snippets with the right answers.

    Returns:
        The balanced accuracy of its answers; None if all right answers are the same or none can be parsed.
    """
    truth = [right for _, right in asked]
    if len(set(truth)) < 2:
        return None
    listed = "\n".join(f"{number}. {line}" for number, (line, _) in enumerate(asked, start=1))
    # Once more if the answer cannot be parsed, and not for ever: the answer costs money.
    for _ in range(2):
        reply = endpoint.ask(system, f"What activates it: {sentence}\n\n{listed}")
        answers = read_answers(reply, len(asked))
        if answers is not None:
            return balanced_accuracy(answers, truth)
    return None


def read_explanations(path: str, latents: int) -> dict[int, str]:
    """Read latent -> sentence from a file of JSON lines `{"latent": 3, "text": "..."}`.

    Raises:
        ConfigError: It is not such a file.
    """
    found: dict[int, str] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("judge.explanations", expected="a readable file", got=path) from error
    for number, line in enumerate(lines, start=1):
        try:
            entry = cast("dict[str, Any]", json.loads(line))
            latent, text = int(entry["latent"]), str(entry["text"])
            if not 0 <= latent < latents or not text.strip():
                raise ValueError
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{path}, line {number}",
                expected=f'{{"latent": 0 to {latents - 1}, "text": "..."}}',
                got=line[:80],
            ) from error
        found[latent] = text.strip()[:_MAX_SENTENCE]
    return found


class Judged:
    """The material of the questions: chosen latents, the places at which they are active, snippets.

    Args:
        setting: What is measured; its spec has a judge.
        endpoint: The model.
        given: Explanations by latent; if there are any, only these latents are judged.
    """

    def __init__(self, setting: Setting, endpoint: Endpoint, given: dict[int, str]) -> None:
        judge, plan, total = _judge_of(setting), setting.dataset.plan, setting.sae.latents
        self._endpoint, self._given, self._seed = endpoint, given, setting.spec.seed
        context, words = plan.spec.context_length, dict[int, str]()
        if (bos := setting.window.bos_token) is not None:
            words[bos] = ""  # precedes a window's text and is no part of it

        # Cached, because the same tokens occur in many snippets.
        def word(token: int) -> str:
            if token not in words:
                words[token] = cast(Any, setting.subject.tokenizer).decode([token])
            return words[token]

        def held_out_activations(places: ActivePlaces) -> Activations:
            stream = (places.add(codes) for codes in setting.held_out_codes())
            return gather(
                stream, total, top=0, positives=judge.examples, context=context, seed=setting.spec.seed
            )

        self.latents = np.array(sorted(given), np.int64)
        if not given:
            # Explained on training windows, judged on held-out ones, so that a sentence that merely repeats
            # the examples does not score.
            units = train_units(setting)
            stream = observed(setting.codes(units), "judge search", len(units) * plan.rows_per_unit)
            self._found = gather(stream, total, top=judge.examples, positives=0, context=context)
            self.latents = choose(self._found, judge.latents, judge.examples, self._seed, "judge.examples")
            windows = unit_windows(setting, units)
            self._training = ActivePlaces(self.latents, windows, context, total)
            # A second pass: which latents to follow is known only after the first, and following all of them
            # would hold every activation in memory.
            for codes in setting.codes(units):
                self._training.add(codes)
            self._first = windows.start
            self._seen = Snippets(setting.tokens(windows), judge.tokens, word)
        # Held-out windows in one pass: `ActivePlaces` takes note of the codes while `gather` draws from them.
        self._testing = ActivePlaces(self.latents, setting.windows, context, total)
        self._held_out = held_out_activations(self._testing)
        self._unseen = Snippets(setting.tokens(setting.windows), judge.tokens, word)

    def explanation(self, slot: int, latent: int) -> str:
        """Return the sentence about a latent: the given one, or the model's."""
        if latent in self._given:
            return self._given[latent]
        fires = self._training.of(slot)
        shown = [
            self._seen.around(fires, window - self._first, position)
            for _, window, position in self._found.top.of(latent)
        ]
        listed = "\n".join(f"{i}. {each.text(each.fires)}" for i, each in enumerate(shown, start=1))
        return " ".join(self._endpoint.ask(_EXPLAIN, listed).split())[:_MAX_SENTENCE]

    def scored(self, slot: int, latent: int) -> dict[str, Any]:
        """Judge one latent: its sentence, `detection` and `fuzzing` (None: nothing to ask, or no answer)."""
        # Seeded by the latent, so that the draws do not depend on which thread comes first.
        draw = np.random.default_rng([self._seed, latent])
        sentence, fires = self.explanation(slot, latent), self._testing.of(slot)
        places = self._held_out.positives.of(latent)
        positive = [self._unseen.around(fires, window, position) for _, window, position in places]
        silent = self._unseen.silent(fires, len(positive), draw)
        asked = [(each.text(), True) for each in positive] + [(each.text(), False) for each in silent]
        # Shuffled: a model that answers by position must not score.
        detection = [asked[i] for i in draw.permutation(len(asked))]
        fuzzing = list[tuple[str, bool]]()
        for each, place in zip(positive, draw.permutation(len(positive)), strict=True):
            # A random half gets wrong marks; where a snippet has too few other tokens, the right ones remain.
            wrong = wrong_marks(each, draw) if place % 2 else None
            fuzzing.append((each.text(wrong or each.fires), wrong is None))
        return {
            "latent": latent,
            "text": sentence,
            "positives": len(positive),
            "detection": quiz(self._endpoint, _DETECT, sentence, detection),
            "fuzzing": quiz(self._endpoint, _FUZZ, sentence, fuzzing),
        }


def measure(setting: Setting) -> Measured:
    """Explain latents from training windows, and quiz the explanations on held-out ones.

    Raises:
        ConfigError: No judge is configured, it refuses, or no latent is active often enough.
        EndpointError: The judge does not answer.
    """
    judge = _judge_of(setting)
    endpoint = Endpoint(judge, setting.judge_key)
    given = read_explanations(judge.explanations, setting.sae.latents) if judge.explanations else {}
    judged = Judged(setting, endpoint, given)
    facts = list[dict[str, Any]]()
    # Threads, because they only wait for the endpoint: `parallel` requests are in flight at a time.
    with (
        ThreadPoolExecutor(judge.parallel) as pool,
        Progress("judge", len(judged.latents), "latents") as bar,
    ):
        waiting = [pool.submit(judged.scored, slot, int(n)) for slot, n in enumerate(judged.latents)]
        try:
            for each in waiting:
                facts.append(each.result())
                bar.advance(1)
        # One refusal or Ctrl-C must not send the questions that are still waiting: each costs money.
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    figures = [
        mean_figure(id, _scores(facts, name), seed=setting.spec.seed, unit="latents")
        for id, name in (("judge_detection", "detection"), ("judge_fuzzing", "fuzzing"))
    ]
    unread = sum(fact["detection"] is None for fact in facts)
    source = f"from {judge.explanations}" if judge.explanations else "its own"
    note = (
        f"{judge.model} at {judge.endpoint}, explanations {source}: {endpoint.requests} answers, "
        f"{endpoint.tokens:,} tokens; {unread} of {len(facts)} latents without a detection score (never "
        "active on the held-out windows, or no answer that can be read)"
    )
    return Measured(figures, {"latents": facts}, (note,))


def _scores(facts: list[dict[str, Any]], name: str) -> NDArray[np.float64]:
    return np.array([fact[name] for fact in facts if fact[name] is not None], np.float64)


def _judge_of(setting: Setting) -> JudgeSpec:
    if setting.spec.judge is None:
        raise ConfigError(
            "metric judge",
            expected="evaluate.judge with the endpoint and the model to ask",
            got="none",
            fix="Add it to the config, or leave the metric out",
        )
    return setting.spec.judge
