"""The values that `winnow init` proposes, and the text that it writes them in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from winnow.cli.draft import DEFAULT_TOKENS, Model, config_text, draft, quoted
from winnow.common.config_file import parse_config
from winnow.common.yaml_text import parse_yaml
from winnow.harvester.plan.survey import Survey
from winnow.schemas.corpus import CorpusSpec, SourceSpec

SMALL = Model("models/small", layers=12, width=768, context_limit=1024)


def survey(tokens: int | None, median: int = 300) -> Survey:
    corpus = CorpusSpec(sources=(SourceSpec(uri="texts/*.txt"),))
    return Survey(corpus, 3, tokens and 4 * tokens, tokens, median, tokens and tokens // median, False)


@given(st.text(min_size=1))
def test_any_name_is_read_back_as_it_is(name):
    assert parse_yaml(f"key: {quoted(name)} # comment\n", "test")[0] == {"key": name}


@pytest.mark.parametrize(
    "name", ["true", "None", ".5", "1", "*.txt", "a: b", "a #b", "é", "~", "'x'", "😀.txt", "a\x00b"]
)
def test_names_that_yaml_would_take_for_something_else_are_quoted(name):
    assert parse_yaml(f"key: {quoted(name)} # comment\n", "test")[0] == {"key": name}


@pytest.mark.parametrize("name", ["package://llm/m.gguf", "texts/*.txt", "org/name-2b", "s3://b/x-*.parquet"])
def test_usual_names_stand_bare(name):
    assert quoted(name) == name


@pytest.mark.parametrize("tokens", [200_000, 3_000_000, 10**10, None])
@pytest.mark.parametrize("width", [16, 768, 8192])
def test_every_draft_is_a_valid_config_within_its_budget(tokens, width):
    found = draft(SMALL.__class__("m", 32, width, 4096), survey(tokens), None, None)
    config = parse_config(config_text(found, "data/x", "runs/x"), "test")
    assert config.plan is not None
    assert config.train is not None
    assert config.plan.hooks == (config.train.hook,) == ("resid_post.15",)
    units = found.units + found.validation_units
    taken = units * config.plan.windows_per_unit * config.plan.context_length
    assert taken <= min(tokens or DEFAULT_TOKENS, DEFAULT_TOKENS)
    # The whole corpus is left to the plan; a part of it is a number.
    assert (config.plan.train_units is None) == (
        tokens is not None and tokens <= DEFAULT_TOKENS
    ) or tokens is None
    assert config.train.k <= config.train.latents


def test_a_model_with_a_short_context_gets_windows_that_fit():
    found = draft(Model("m", 2, 64, 64), survey(3_000_000), None, None)
    assert found.context_length == 64
    assert found.hook == "resid_post.0"


def test_little_text_gets_short_windows():
    lengths = [draft(SMALL, survey(tokens, median=2000), None, None).context_length
               for tokens in (100_000, 400_000, 10**7)]  # fmt: skip
    assert lengths == [128, 256, 512]
