"""Tokenizers out of GGUF files, against the ones they were written from."""

import json
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import SENTENCES
from winnow.schemas.errors import ConfigError
from winnow.schemas.subject import SubjectSpec
from winnow.subject.gguf_tokenizer import RULES, gguf_tokenizer
from winnow.subject.pretrained import load_tokenizer, tokenizer_digest
from winnow.subject.tokenizer import TextTokenizer

TEXT = "In 1914, don't  DON'T\n\n  naïveCamelCase 12345½ \u65e5\u672c e\u0301 <|end|> a  1!?\r\n\t x"
NUMBERS = [f"{n:>8} {n * 37}\n" for n in range(200)]


def train(rule: str, control: tuple[str, ...] = ("<|end|>", "<|start|>")) -> Tokenizer:
    """A byte-level BPE of 500 entries, cut by a rule."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=RULES[rule].whole_words))
    tokenizer.normalizer = normalizers.NFC() if RULES[rule].nfc else normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(RULES[rule].cuts))
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(control), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*SENTENCES, *NUMBERS], trainer)
    return tokenizer


def write(path: Path, backend: Tokenizer, rule: str | None, model: str = "gpt2", **more: bool) -> None:
    """The vocabulary of `backend` as a GGUF without a model; its added tokens are control tokens."""
    facts = json.loads(backend.to_str())
    vocabulary = backend.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    control = {token["content"] for token in facts["added_tokens"]}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if rule:
        writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in control else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in facts["model"]["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    for name, value in more.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "qwen2", "llama-bpe", "tekken", "gpt-4o", "falcon"])
def test_tokens_are_those_of_the_original(tmp_path, rule):
    original = train(rule)
    write(tmp_path / "t.gguf", original, rule)
    rebuilt = gguf_tokenizer(tmp_path / "t.gguf")
    for text in [TEXT, *SENTENCES, *NUMBERS[:3]]:
        assert TextTokenizer(rebuilt).encode(text) == TextTokenizer(original).encode(text)
    assert (rebuilt.eos_token_id, rebuilt.bos_token_id) == (0, 1)
    assert len(rebuilt) == original.get_vocab_size()


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("gpt-2", "a|  | 12345|.|6| don|'t|!?|\n\n"),
        ("smollm", "a|   |1|2|3|4|5|.|6| don|'t|!?|\n\n"),
        ("qwen2", "a|  | |1|2|3|4|5|.|6| don|'t|!?\n\n"),
        ("llama-bpe", "a|  | |123|45|.|6| don|'t|!?\n\n"),
        ("tekken", "a|  | |1|2|3|4|5|.|6| don|'t|!?\n\n"),
        ("gpt-4o", "a|  | |123|45|.|6| don't|!?\n\n"),
        ("falcon", "a|  | |123|45|.|6| don|'|t|!?|\n\n"),
        ("deepseek-v3", "a|   |123|45|.|6| don|'t|!?\n\n"),
        ("deepseek-llm", "a|   |1|2|3|4|5|.|6| don|'|t|!?|\n|\n"),
        ("deepseek-coder", "a|   |1|2|3|4|5|.|6| don|'|t|!?|\n|\n"),
    ],
)
def test_a_rule_cuts_as_its_models_tokenizers_do(rule, pieces):
    text = "a   12345.6 don't!?\n\n"
    cut = pre_tokenizers.Sequence(list(RULES[rule].cuts)).pre_tokenize_str(text)
    assert "|".join(decoders.ByteLevel().decode([piece]) for piece, _ in cut) == pieces


def test_nfc_belongs_to_the_rule(tmp_path):
    write(tmp_path / "t.gguf", train("qwen2"), "qwen2")
    text = TextTokenizer(gguf_tokenizer(tmp_path / "t.gguf"))
    assert text.encode("e\u0301") == text.encode("é")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bailingmoe", "got 'bailingmoe'"),
        ("falcon-h1", "got 'falcon-h1'"),
        ("default", "got 'default'"),
        (None, "got nothing"),
    ],
)
def test_a_name_that_is_not_known_is_refused(tmp_path, name, said):
    write(tmp_path / "t.gguf", train("gpt-2"), name)
    with pytest.raises(ConfigError, match=rf"t\.gguf.*tokenizer\.ggml\.pre.*{said}.*tokenizer\.json"):
        gguf_tokenizer(tmp_path / "t.gguf")


@pytest.mark.parametrize(
    ("rule", "said", "bos"),
    [
        ("llama-bpe", {}, 1),
        ("llama-bpe", {"add_bos_token": False}, None),
        ("smollm", {}, None),
        ("smollm", {"add_bos_token": True}, 1),
    ],
)
def test_bos_is_added_where_the_file_or_its_rule_says_so(tmp_path, rule, said, bos):
    write(tmp_path / "t.gguf", train(rule), rule, **said)
    made = gguf_tokenizer(tmp_path / "t.gguf")
    assert TextTokenizer(made).bos == bos
    made.save_pretrained(tmp_path)
    assert TextTokenizer(load_tokenizer(tmp_path, SubjectSpec(model="m"))).bos == bos


def test_control_tokens_outside_the_byte_alphabet_keep_their_numbers(tmp_path):
    original = train("deepseek-v3", control=("<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"))
    write(tmp_path / "t.gguf", original, "deepseek-v3")
    made = gguf_tokenizer(tmp_path / "t.gguf")
    assert (made.eos_token, made.eos_token_id, made.bos_token_id) == ("<｜end▁of▁sentence｜>", 0, 1)
    assert len(made) == original.get_vocab_size()


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_puts_a_space_before_every_text(tmp_path, prefix):
    tokens = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "▁▁"]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 2, *[6] * 256, 1, 1, 1, 1])
    writer.add_token_scores([0.0] * 259 + [-9.0, -8.0, -1.0, -2.0])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    if not prefix:
        writer.add_add_space_prefix(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = gguf_tokenizer(tmp_path / "t.gguf")
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for tokenizer in (made, load_tokenizer(tmp_path, SubjectSpec(model="m"))):
        pieces = [tokenizer.tokenize(text) for text in ("a", " a", "a a", "  a")]
        if prefix:
            assert pieces == [["▁a"], ["▁", "▁a"], ["▁a", "▁a"], ["▁▁", "▁a"]]
        else:
            assert pieces == [["a"], ["▁a"], ["a", "▁a"], ["▁", "▁a"]]
        assert [
            tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) for text in ("a", " a")
        ] == [
            "a",
            " a",
        ]
        assert TextTokenizer(tokenizer).bos == 0


def test_tokens_of_phi_3s_chats_take_the_line_break_after_them(tmp_path):
    tokens = ["<s>", "<|endoftext|>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "phi3")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, "<|user|>", "<|end|>"])
    writer.add_token_types([3, 3, 2, *[6] * 256, 1, 1, 1, 3, 3])
    writer.add_token_scores([0.0] * 259 + [-9.0, -8.0, -1.0, 0.0, 0.0])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = gguf_tokenizer(tmp_path / "t.gguf")
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "phi3"}')
    for tokenizer in (made, load_tokenizer(tmp_path, SubjectSpec(model="m"))):
        ids = TextTokenizer(tokenizer, control="token").encode("<|user|>\na<|end|>\n<s>\n")
        assert tokenizer.convert_ids_to_tokens(ids) == ["<|user|>", "▁a", "<|end|>", "<s>", "▁", "<0x0A>"]
        assert TextTokenizer(tokenizer).bos == 0


@pytest.mark.parametrize(("said", "bos"), [(True, 1), (False, None)])
def test_gemma_4_begins_as_its_file_says(tmp_path, said, bos):
    tokens = ["<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a"]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "gemma4")
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[6] * 256, 1, 1, 1])
    writer.add_token_merges(["▁ a"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_unk_token_id(2)
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(said)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = gguf_tokenizer(tmp_path / "t.gguf")
    assert made.tokenize("a a") == ["a", "▁a"]
    assert TextTokenizer(made).bos == bos
    made.save_pretrained(tmp_path)
    assert TextTokenizer(Tokenizer.from_file(str(tmp_path / "tokenizer.json"))).bos == bos


@pytest.mark.parametrize("declared", ["GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_folder_is_cut_as_its_tokenizer_json_says(tmp_path, declared, architecture):
    original = train("smollm")
    PreTrainedTokenizerFast(tokenizer_object=original, eos_token="<|end|>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture}))
    facts = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**facts, "tokenizer_class": declared}))
    loaded = load_tokenizer(tmp_path, SubjectSpec(model="m"))
    assert TextTokenizer(loaded).encode(TEXT) == TextTokenizer(original).encode(TEXT)
    assert loaded.eos_token_id == 0


@pytest.mark.parametrize("declared", ["LlamaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize(
    ("said", "bos"), [({"add_bos_token": True}, 1), ({"add_bos_token": False}, None), ({}, None)]
)
def test_bos_is_added_where_only_a_folders_configuration_says_so(tmp_path, declared, said, bos):
    """DeepSeek's tokenizer.json adds none; transformers 5 drops the configuration's `add_bos_token`."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=train("deepseek-v3"), eos_token="<|end|>", bos_token="<|start|>"
    )
    made.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **said, "tokenizer_class": declared}))
    loaded = load_tokenizer(tmp_path, SubjectSpec(model="m"))
    assert TextTokenizer(loaded).bos == bos
    # Datasets that were planned without it keep their tokenizer.
    assert tokenizer_digest(loaded) == tokenizer_digest(made)
