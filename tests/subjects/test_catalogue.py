"""The catalogue of tiny subjects names what transformers has; its windows hold ordinary tokens only."""

from __future__ import annotations

import pytest

from tests.subjects.catalogue import (
    CLASSES,
    NOT_BUILT,
    OVERRIDES,
    SUBJECTS,
    TOKENS,
    VARIANTS,
    VOCABULARY,
    make_subject,
    tiny_config,
)
from tests.support.tiny import make_tokenizer


def test_every_name_is_one_that_transformers_has() -> None:
    named = {*OVERRIDES, *NOT_BUILT, *(model_type for model_type, _ in VARIANTS.values())}
    assert named <= set(CLASSES)
    assert len(SUBJECTS) == len(set(SUBJECTS)) == len(CLASSES) + len(VARIANTS)
    assert len(make_tokenizer(VOCABULARY)) > TOKENS.stop


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gemma3", "zamba2", "bert, is_decoder"])
def test_the_same_call_writes_the_same_folder(name: str, tmp_path) -> None:
    one, two = (make_subject(tmp_path / which, name) for which in ("one", "two"))
    for file in sorted(path.name for path in one.iterdir()):
        assert (one / file).read_bytes() == (two / file).read_bytes()
    assert (one / "model.safetensors").stat().st_size < 2**20
    ids = [value for key, value in tiny_config(name).to_dict().items() if key.endswith("_token_id")]
    assert not {value for value in ids if isinstance(value, int)} & set(TOKENS)
