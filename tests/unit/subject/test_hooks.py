"""Hook names, and reading and replacing at them, on tiny models in memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from tests.support.tiny import ARCHITECTURES, OTHERS, tiny_config, tiny_model
from winnow.schemas.errors import ConfigError
from winnow.subject.hooks import resolve_hook
from winnow.subject.layout import LAYOUTS, Layout, find_layout
from winnow.subject.splice import next_token_loss, read_taps, replaced

LAYERS = 3
TOWER = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
LLAMA = Layout("llama", "model.layers", 30, (LAYOUTS["llama"].block,) * 30, tabled=True)
MODULES = frozenset(
    ["model", "model.embed_tokens", "model.layers", "model.norm", "lm_head"]
    + [f"model.layers.{n}" for n in range(30)]
    + [f"model.layers.{n}.{part}" for n in range(30) for part in ("self_attn", "mlp", "mlp.act_fn")]
)


def build(architecture: str, **extra):
    model = tiny_model(architecture, layers=LAYERS, **extra)
    layout = find_layout(model, model.config)
    return model, layout, frozenset(name for name, _ in model.named_modules() if name)


def ids(windows: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(0, 384, (windows, length), generator=torch.Generator().manual_seed(1))


def test_every_architecture_of_the_table_is_tested() -> None:
    assert set(LAYOUTS) == set(ARCHITECTURES)


every_block = pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        *((name, {}) for name in ARCHITECTURES),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("stablelm", {"use_parallel_residual": True}),
    ],
)


@every_block
@torch.no_grad()
def test_the_parts_of_a_block_add_up(architecture: str, extra: dict[str, bool]) -> None:
    """Each part is what reaches the residual stream, and the identity replacement changes no bit."""
    model, layout, modules = build(architecture, **extra)
    names = [f"{s}.{n}" for n in range(LAYERS) for s in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    taps = [resolve_hook(name, layout, modules) for name in names]
    tokens = ids()
    found = read_taps(model, taps, lambda: model(input_ids=tokens, use_cache=False), (2, 7))
    assert list(found) == names
    for layer in range(LAYERS):
        pre, attention, mlp, post = (found[name] for name in names[4 * layer : 4 * layer + 4])
        assert pre.shape == (2, 7, 32)
        torch.testing.assert_close(post, pre + attention + mlp, rtol=1e-5, atol=1e-5)
        assert min(part.abs().mean() for part in (attention, mlp)) > 0.01 * pre.abs().mean()
        if layer:
            assert torch.equal(pre, found[f"resid_post.{layer - 1}"])
    clean = model(input_ids=tokens, use_cache=False).logits
    with replaced(model, {tap: lambda rows: rows for tap in taps}, (2, 7)):
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, clean)


@every_block
@torch.no_grad()
def test_the_places_inside_a_block_fit_together(architecture: str, extra: dict[str, bool]) -> None:
    """Whatever is read is what the layout's own modules make of what is read before them."""
    model, layout, modules = build(architecture, **extra)
    sites = ("resid_pre", "attn_z", "attn_out", "resid_mid", "mlp_in", "mlp_out")
    taps = [resolve_hook(f"{site}.{n}", layout, modules) for n in range(LAYERS) for site in sites]
    tokens = ids()
    found = read_taps(model, taps, lambda: model(input_ids=tokens, use_cache=False), (2, 7))
    for layer in range(LAYERS):

        def run(part: str, rows: torch.Tensor, layer: int = layer) -> torch.Tensor:
            path = layout.path(layer, part)
            return rows if path is None else model.get_submodule(path)(rows)

        pre, z, attention, mid, given, mlp = (found[f"{site}.{layer}"] for site in sites)
        made = run("attention_post_norm", run("projection", z))
        torch.testing.assert_close(made, attention, rtol=1e-5, atol=1e-5)
        assert torch.equal(mid, pre if layout.parts[layer].parallel else pre + attention)
        torch.testing.assert_close(run("mlp_norm", mid), given, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(run("mlp_post_norm", run("mlp", given)), mlp, rtol=1e-5, atol=1e-5)
    clean = model(input_ids=tokens, use_cache=False).logits
    with replaced(model, {tap: lambda rows: rows for tap in taps}, (2, 7)):
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, clean)


@every_block
@torch.no_grad()
def test_the_attention_and_the_ends_are_where_the_layout_says(
    architecture: str, extra: dict[str, bool]
) -> None:
    """Attention reads the norm of `resid_pre`; final norm and unembedding make logits of the last stream."""
    model, layout, modules = build(architecture, **extra)
    assert model.get_submodule(layout.embedding) is model.get_input_embeddings()
    module = model.get_submodule(layout.path(1, "attention"))
    read: list[torch.Tensor] = []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    taps = [resolve_hook(name, layout, modules) for name in ("resid_pre.1", "attn_out.1", "resid_post.2")]
    logits: list[torch.Tensor] = []

    def run() -> None:
        logits.append(model(input_ids=ids(), use_cache=False).logits)

    pre, _, last = read_taps(model, taps, run, (2, 7), stop=False).values()
    handle.remove()
    norm = layout.path(1, "attention_norm")
    torch.testing.assert_close(read[0], pre if norm is None else model.get_submodule(norm)(pre))
    made = model.get_submodule(layout.unembedding)(model.get_submodule(layout.final_norm)(last))
    cap = getattr(model.config, "final_logit_softcapping", None)
    torch.testing.assert_close(made if cap is None else cap * (made / cap).tanh(), logits[0])


@every_block
@torch.no_grad()
def test_a_replaced_middle_is_the_stream_and_a_replaced_mlp_in_is_not(
    architecture: str, extra: dict[str, bool]
) -> None:
    model, layout, modules = build(architecture, **extra)
    names = ("resid_pre.1", "attn_out.1", "resid_mid.1", "mlp_in.1", "mlp_out.1", "resid_post.1")
    tap = {name: resolve_hook(name, layout, modules) for name in names}
    tokens, kept = ids(), []

    def moved(rows: torch.Tensor) -> torch.Tensor:
        kept.append(rows)
        return rows.flip(-1) * 0.5

    def run(place: str, *read: str) -> list[torch.Tensor]:
        with replaced(model, {tap[place]: moved}, (2, 7)):
            taps = [tap[name] for name in read]
            return list(read_taps(model, taps, lambda: model(input_ids=tokens), (2, 7), stop=False).values())

    clean = read_taps(model, list(tap.values()), lambda: model(input_ids=tokens), (2, 7))
    mlp, post = run("resid_mid.1", "mlp_out.1", "resid_post.1")
    assert torch.equal(kept[0].view_as(clean["resid_mid.1"]), clean["resid_mid.1"]), "rows that it may keep"
    middle = moved(clean["resid_mid.1"])
    if not layout.parts[1].parallel:  # in parallel attention reads it too
        torch.testing.assert_close(post, middle + mlp, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mlp, clean["mlp_out.1"])
    attention, mlp, post = run("mlp_in.1", "attn_out.1", "mlp_out.1", "resid_post.1")
    assert torch.equal(attention, clean["attn_out.1"])
    assert not torch.allclose(mlp, clean["mlp_out.1"])
    torch.testing.assert_close(post, clean["resid_pre.1"] + attention + mlp, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_stream_and_the_input_of_an_mlp_without_a_norm_are_replaced_apart() -> None:
    """OLMo 2's MLP is given the stream's own tensor: in either order both replacements take place."""
    model, layout, modules = build("olmo2")
    middle, given, mlp = (resolve_hook(f"{s}.1", layout, modules) for s in ("resid_mid", "mlp_in", "mlp_out"))
    post = resolve_hook("resid_post.1", layout, modules)
    for order in ((middle, given), (given, middle)):
        fns = {middle: torch.zeros_like, given: torch.ones_like}
        with replaced(model, {tap: fns[tap] for tap in order}, (2, 7)):
            found = read_taps(model, [mlp, post], lambda: model(input_ids=ids()), (2, 7), stop=False)
        assert torch.equal(found["resid_post.1"], found["mlp_out.1"])
        assert found["mlp_out.1"].abs().sum() > 0


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "gemma2", "olmo2"])
@torch.no_grad()
def test_replacing_an_addend_by_zero_removes_it_from_the_stream(architecture: str) -> None:
    model, layout, modules = build(architecture)
    tap = resolve_hook("attn_out.1", layout, modules)
    after = [resolve_hook(name, layout, modules) for name in ("resid_pre.1", "mlp_out.1", "resid_post.1")]
    with replaced(model, {tap: torch.zeros_like}, (2, 7)):
        found = read_taps(model, after, lambda: model(input_ids=ids()), (2, 7), stop=False)
    torch.testing.assert_close(found["resid_post.1"], found["resid_pre.1"] + found["mlp_out.1"])


@torch.no_grad()
def test_rows_reach_the_replacement_window_by_window() -> None:
    model, layout, modules = build("gpt2")
    tap = resolve_hook("resid_pre.2", layout, modules)
    tokens, seen = ids(3, 5), []
    rows = read_taps(model, [tap], lambda: model(input_ids=tokens), (3, 5))["resid_pre.2"].reshape(15, 32)

    def shift(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        return x.double() + 1.0  # another dtype is cast back

    with replaced(model, {tap: shift}, (3, 5)):
        moved = read_taps(model, [tap], lambda: model(input_ids=tokens), (3, 5), stop=False)["resid_pre.2"]
    assert torch.equal(seen[0], rows)
    assert moved.dtype == torch.float32
    assert not model.get_submodule("transformer.h.2")._forward_pre_hooks, "hooks must be taken off again"


def test_reading_stops_at_the_last_tap_and_takes_the_hooks_off() -> None:
    model, layout, modules = build("llama")
    ran: list[str] = []
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    taps = [resolve_hook(hook, layout, modules) for hook in ("attn_out.1", "resid_post.0")]
    hooks_before = sum(len(module._forward_hooks) for module in model.modules())
    with torch.no_grad():
        read_taps(model, taps, lambda: model(input_ids=ids()), (2, 7))
    assert "model.layers.1.self_attn" in ran
    assert not {name for name in ran if name.startswith(("model.layers.2", "model.layers.1.mlp"))}
    assert "model.norm" not in ran
    assert "lm_head" not in ran
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks_before


def test_a_replacement_of_another_shape_is_an_error() -> None:
    model, layout, modules = build("llama")
    tap = resolve_hook("mlp_out.0", layout, modules)
    with pytest.raises(ValueError, match=r"replacement at mlp_out.0 must return \(14, 32\), got \(14, 31\)"):
        with replaced(model, {tap: lambda rows: rows[:, :-1]}, (2, 7)):
            model(input_ids=ids())


def test_modules_that_give_no_activation_are_refused() -> None:
    model, layout, modules = build("llama")

    def pass_(hook: str) -> None:
        tap = resolve_hook(hook, layout, modules)
        read_taps(model, [tap], lambda: model(input_ids=ids()), (2, 7), stop=False)

    with pytest.raises(ConfigError, match="does not run in a forward pass"):
        pass_("model.layers")
    with pytest.raises(ConfigError, match=r"expected a float tensor \[2, 7, D\]"):
        pass_("model.rotary_emb")
    with pytest.raises(ConfigError, match="not a tensor"):
        pass_("model")


def test_a_module_that_runs_twice_is_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = nn.Tanh()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.act(x))

    model, x = Twice(), torch.ones(1, 2, 3)
    tap = resolve_hook("act", Layout("twice", "blocks", 1, (None,)), {"act"})
    with pytest.raises(ConfigError, match="runs more than once"):
        read_taps(model, [tap], lambda: model(x), (1, 2), stop=False)
    with pytest.raises(ConfigError, match="runs more than once"), replaced(model, {tap: torch.neg}, (1, 2)):
        model(x)


def test_names_resolve_to_modules() -> None:
    pre, post = (resolve_hook(f"resid_{side}.9", LLAMA, MODULES) for side in ("pre", "post"))
    assert (pre.path, pre.reads_input, pre.layer) == ("model.layers.9", True, 9)
    assert (post.path, post.reads_input, post.layer) == ("model.layers.9", False, 9)
    assert resolve_hook("attn_out.0", LLAMA, MODULES).path == "model.layers.0.self_attn"
    mid, given = (resolve_hook(f"{site}.9", LLAMA, MODULES) for site in ("resid_mid", "mlp_in"))
    assert (mid.path, mid.reads_input) == ("model.layers.9.post_attention_layernorm", True)
    assert (given.path, given.reads_input, given.layer, given.named) == ("model.layers.9.mlp", True, 9, True)
    path = resolve_hook("model.layers.3.mlp.act_fn", LLAMA, MODULES)
    assert (path.path, path.layer, path.named) == ("model.layers.3.mlp.act_fn", 3, False)
    assert resolve_hook("lm_head", LLAMA, MODULES).layer is None


@pytest.mark.parametrize(
    ("hook", "words"),
    [
        ("resid_pst.3", "Near ones: resid_post.3"),
        ("resid_post.03", "Near ones: resid_post."),
        (
            "resid_post",
            "resid_pre|resid_post|attn_out|mlp_out|resid_mid|mlp_in|attn_z|router with a layer from 0 to 29",
        ),
        ("blocks.3.hook_resid_post", "This is TransformerLens' name of resid_post.3"),
        ("blocks.3.mlp.hook_in", "This is TransformerLens' name of mlp_in.3"),
        ("resid_post.-1", "is not a place in this llama subject"),
        ("model.layers.3.mpl", "Near ones: model.layers.3.mlp"),
        ("", "is not a place"),
        ("resid_post.30", "layer out of range: expected 0 to 29 (llama with 30 layers), got 30"),
        ("model.layers.31.mlp", "layer out of range: expected 0 to 29"),
    ],
)
def test_a_wrong_name_is_explained(hook: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_hook(hook, LLAMA, MODULES)
    assert words in str(caught.value)
    assert repr(hook) in str(caught.value)


def test_the_parts_of_an_unknown_architecture_are_guessed_by_name() -> None:
    model = tiny_model("llama", layers=LAYERS)
    setattr(model.config, "model_type", "novel")  # noqa: B010
    layout = find_layout(model, model.config)
    modules = frozenset(name for name, _ in model.named_modules())
    assert resolve_hook("resid_post.1", layout, modules).path == "model.layers.1"
    assert (layout.parts, layout.tabled) == ((LAYOUTS["llama"].block,) * LAYERS, False)
    assert resolve_hook("attn_out.1", layout, modules).path == "model.layers.1.self_attn"
    assert layout.final_norm == "model.norm"
    assert (layout.embedding, layout.unembedding) == ("model.embed_tokens", "lm_head")
    model.config.num_hidden_layers = 7
    with pytest.raises(ConfigError, match="blocks cannot be told"):
        find_layout(model, model.config)


def test_parts_of_other_names_are_not_guessed() -> None:
    layout = Layout("novel", "model.layers", 2, (None, None))
    with pytest.raises(ConfigError, match=r"attn output is not known.*block 1 is model.layers.1"):
        resolve_hook("attn_out.1", layout, ())
    for site in ("resid_mid", "mlp_in"):
        with pytest.raises(ConfigError, match=r"where 'novel' has the norm of its MLP is not known"):
            resolve_hook(f"{site}.1", layout, ())


@torch.no_grad()
def test_several_residual_streams_are_refused_and_what_can_be_read_is_named() -> None:
    """DeepSeek V4 keeps four streams: flattened, its residual stream of 32 numbers looked 128 wide."""
    model = tiny_model("deepseek_v4", layers=2, **OTHERS["deepseek_v4"])
    layout, modules = find_layout(model, model.config), {name for name, _ in model.named_modules()}
    for hook in ("resid_pre.1", "resid_post.1"):
        with pytest.raises(ConfigError, match=r"'deepseek_v4' has 4 residual streams, not one") as caught:
            resolve_hook(hook, layout, modules)
    assert "such as model.layers.1.self_attn or model.layers.1.mlp" in str(caught.value)
    tokens = ids()
    paths = [resolve_hook(f"model.layers.1.{part}", layout, modules) for part in ("self_attn", "mlp")]
    found = read_taps(model, paths, lambda: model(input_ids=tokens), (2, 7))
    assert [values.shape for values in found.values()] == [(2, 7, 32)] * 2
    unknowing = replace(layout, streams=1)  # where no config field says it, the tensors do
    with pytest.raises(
        ConfigError, match=r"more than one row for each token: expected one .*got \[2, 7, 4, 32\]"
    ):
        read_taps(
            model, [resolve_hook("resid_post.1", unknowing, modules)], lambda: model(input_ids=tokens), (2, 7)
        )


@torch.no_grad()
def test_the_text_part_of_a_larger_model_is_found_by_its_family() -> None:
    """Gemma 3 with its vision tower keeps its blocks elsewhere, and LLaVA's tower has as many of its own."""
    text = tiny_config("gemma3_text", layers=LAYERS)
    gemma = tiny_model("gemma3", text_config=text.to_dict(), vision_config=TOWER, mm_tokens_per_image=4)
    layout = find_layout(gemma, gemma.config.get_text_config())
    assert (layout.architecture, layout.blocks) == ("gemma3_text", "model.language_model.layers")
    modules, tokens = {name for name, _ in gemma.named_modules()}, ids()
    names = ["resid_pre.1", "attn_out.1", "mlp_out.1", "resid_post.1"]
    taps = [resolve_hook(name, layout, modules) for name in names]
    pre, attention, mlp, post = read_taps(gemma, taps, lambda: gemma(input_ids=tokens), (2, 7)).values()
    torch.testing.assert_close(post, pre + attention + mlp, rtol=1e-5, atol=1e-5)

    text = tiny_config("llama", layers=LAYERS)
    llava = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=SiglipVisionConfig(**TOWER))
    )
    layout = find_layout(llava, llava.config.get_text_config())
    assert layout == Layout(
        "llama",
        "model.language_model.layers",
        LAYERS,
        (LAYOUTS["llama"].block,) * LAYERS,
        tabled=True,
        embedding="model.language_model.embed_tokens",
        final_norm="model.language_model.norm",
        unembedding="lm_head",
    )


def test_next_token_loss_is_cross_entropy_in_nats() -> None:
    logits, tokens = torch.randn(3, 6, 11, generator=torch.Generator().manual_seed(0)), ids(3, 6) % 11
    dense = -logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    loss = next_token_loss(logits, tokens)
    assert loss.shape == (3, 5)
    torch.testing.assert_close(loss, dense)
    assert next_token_loss(logits.bfloat16(), tokens).dtype == torch.float32
