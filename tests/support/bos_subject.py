"""A tiny Llama whose tokenizer puts BOS before a text, as most Llamas' do, and a harvest of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.support.pipeline import pipeline_config
from tests.support.tiny import EOS, make_subject, make_tokenizer
from winnow.common.config_file import load_config
from winnow.harvester.run.driver import ensure_plan, harvest
from winnow.schemas.config import Config
from winnow.store.objects import open_store

BOS = "<s>"


def make_bos_subject(folder: Path) -> Path:
    """`make_subject` with a tokenizer whose post-processor adds BOS."""
    make_subject(folder, "llama", layers=3, width=16)
    backend = make_tokenizer(383).backend_tokenizer
    backend.add_special_tokens([BOS])
    number = backend.token_to_id(BOS)
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, number)])
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS).save_pretrained(folder)
    return folder


def bos_config(folder: Path, **plan: Any) -> Config:
    """Plan and harvest windows that begin with BOS in this process (no Ray); `plan` overrides its fields."""
    folder.mkdir(parents=True, exist_ok=True)
    make_bos_subject(folder / "subject")
    sections = {"plan": {"bos": "window", **plan}, "storage": {"single_writer": True}}
    config = load_config(pipeline_config(folder, units=1, **sections))
    store = open_store(config.root, config.storage)
    harvest(config, store, ensure_plan(config, store))
    return config
