"""Of every character of a rendered conversation, the message is the one that a hand reckoning says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.chat_templates import BOS, CHATML, CONTROL, EOS, MISTRAL, QWEN3, SHAPES, Message, Pieces
from winnow.harvester.plan.rendering import ChatTemplate, Rendered, TemplateRefusal, Unproved

TOKENS = {"bos_token": BOS, "eos_token": EOS}
WORDS = ["hi", "a b", " ", "\n", "\n\n", "user", "assistant", "{}", '"q"', "é", *CONTROL]
texts = st.lists(st.sampled_from(WORDS), max_size=5).map("".join)
plain = st.lists(st.sampled_from(["hi", "a b", "yes", "user"]), min_size=1, max_size=3).map(" ".join)


@st.composite
def conversations(draw: st.DrawFn, name: str) -> list[Message]:
    """Turns of user and assistant after a system's text or none; contents may repeat each other."""
    messages: list[Message] = []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(plain if name in ("gemma", "mistral") else texts)})
    for turn in range(draw(st.integers(1, 6))):
        role = ("user", "assistant")[turn % 2]
        content = draw(texts)
        if role == "assistant" and name == "qwen3" and draw(st.booleans()):
            content = f"<think>\n{draw(plain)}\n</think>\n\n{draw(plain)}"
        messages.append({"role": role, "content": content})
        if role == "assistant" and name == "tools" and draw(st.booleans()):
            call = {"name": draw(plain), "arguments": {"city": draw(plain)}}
            messages[-1]["tool_calls"] = [{"type": "function", "function": call}]
            messages.append({"role": "tool", "content": draw(texts)})
    if name == "mistral" and messages[0]["role"] == "system" and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages


def agree(made: Rendered, pieces: Pieces) -> None:
    assert made.text == "".join(text for text, _, _ in pieces)
    owner = [number for text, number, _ in pieces for _ in text]
    written = [own for text, _, own in pieces for _ in text]
    assert made.owner.tolist() == owner
    found = [own if own is None else got for own, got in zip(written, made.written.tolist(), strict=True)]
    assert found == written


@pytest.mark.parametrize("name", SHAPES)
def test_every_character_has_its_message(name: str) -> None:
    source, reckon = SHAPES[name]
    template = ChatTemplate(source, TOKENS)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(conversations(name))
    def check(messages: list[Message]) -> None:
        agree(template.render(messages), reckon(messages))

    check()


def said(*contents: str, system: str | None = None) -> list[Message]:
    first = [{"role": "system", "content": system}] if system is not None else []
    return [*first, *({"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents))]


def test_earlier_reasoning_is_dropped_and_the_last_is_kept() -> None:
    messages = said("hi", "<think>\nold\n</think>\n\none", "more", "<think>\nnew\n</think>\n\ntwo")
    made = ChatTemplate(QWEN3, TOKENS).render(messages)
    assert "old" not in made.text
    agree(made, SHAPES["qwen3"][1](messages))
    own = "".join(np.array(list(made.text))[made.written & (made.owner == 3)])
    assert "new" in own
    assert own.endswith("two")


def test_tools_are_the_templates_text() -> None:
    source, _ = SHAPES["tools"]
    made = ChatTemplate(source, TOKENS).render(said("hi", "yes"), [{"name": "weather"}])
    at = made.text.index("weather")
    assert not made.written[at : at + 7].any()


def test_a_template_that_raises_is_told() -> None:
    with pytest.raises(TemplateRefusal, match="roles must alternate"):
        ChatTemplate(MISTRAL, TOKENS).render([{"role": "assistant", "content": "x"}])
    with pytest.raises(TemplateRefusal, match="unknown tag"):
        ChatTemplate("{% nothing %}", TOKENS).render(said("x"))


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content | upper | replace('A', 'b') | length }}{% endfor %}",
        "{% for m in messages %}{{ m.content[2:] }}{% endfor %}",
        "{% for m in messages %}{% if m.content | length > 3 %}long{% endif %}{{ m.content }}{% endfor %}",
    ],
)
def test_what_cannot_be_proved_is_refused(source: str) -> None:
    with pytest.raises(Unproved):
        ChatTemplate(source, TOKENS).render(said("abc", "de"))
    with pytest.raises(Unproved):
        ChatTemplate(CHATML, TOKENS).render(said(chr(0xF0001)))


def test_the_date_is_always_the_same() -> None:
    source = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert ChatTemplate(source, TOKENS).text(said("x")) == "26 Jul 2024x"
    with pytest.raises(TemplateRefusal, match="no fixed date for the format %H"):
        ChatTemplate(source.replace("%d %b %Y", "%H"), TOKENS).text(said("x"))


def test_spans_are_those_of_generation_marks() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    messages = said("hi", "hi", "", "<|im_end|> hi\n", system=" hi ")
    texts, spans = render_jinja_template([messages], chat_template=source, return_assistant_tokens_mask=True)
    made = ChatTemplate(source, TOKENS).render(messages)
    assert made.text == texts[0]
    of_assistant = np.isin(made.owner, [n for n, m in enumerate(messages) if m["role"] == "assistant"])
    masked = np.zeros(len(made.text), bool)
    for start, stop in np.array(spans[0]).tolist():
        masked[start:stop] = True
    assert not (masked & ~of_assistant).any()
    # The mask has the end of the turn besides the message's own text, and no header.
    assert not (made.written & of_assistant & ~masked).any()
    assert set("".join(np.array(list(made.text))[masked & ~made.written])) <= set("<|im_end|>")
