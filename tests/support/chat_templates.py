"""Chat templates in the shapes that are in use, and what each gives, reckoned without a template engine.

A reckoning is a list of (text, number of its message, whether it is its own text; None if either will do).
"""

from collections.abc import Callable
from typing import Any

Message = dict[str, Any]
Pieces = list[tuple[str, int, bool | None]]
BOS, EOS = "<s>", "</s>"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chatml(messages: list[Message]) -> Pieces:
    pieces: Pieces = []
    for number, message in enumerate(messages):
        pieces += [
            (f"<|im_start|>{message['role']}\n", number, False),
            (message["content"], number, True),
            ("<|im_end|>\n", number, False),
        ]
    return pieces


LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{% set body = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{{ body }}{% endfor %}"
)


def llama3(messages: list[Message]) -> Pieces:
    pieces: Pieces = [(BOS, 0, False)]
    for number, message in enumerate(messages):
        pieces += [
            (f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", number, False),
            (message["content"].strip(), number, True),
            ("<|eot_id|>", number, False),
        ]
    return pieces


GEMMA = (
    "{{ bos_token }}{%- if messages[0].role == 'system' -%}{%- set first = messages[0].content + '\n\n' -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}"
    "{%- endif -%}{%- for message in rest -%}"
    "{%- set role = 'model' if message.role == 'assistant' else message.role -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{{ message.content | trim }}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}"
)


def gemma(messages: list[Message]) -> Pieces:
    pieces: Pieces = [(BOS, 0, False)]
    system = messages[0]["role"] == "system"
    for number, message in enumerate(messages):
        if number == 0 and system:
            continue
        moved = system and number == 1
        role = "model" if message["role"] == "assistant" else message["role"]
        pieces.append((f"<start_of_turn>{role}\n", 0 if moved else number, False))
        if moved:
            pieces += [(messages[0]["content"], 0, True), ("\n\n", 1, False)]
        pieces += [(message["content"].strip(), number, True), ("<end_of_turn>\n", number, False)]
    return pieces


MISTRAL = (
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}"
    "{%- set rest = messages[1:] -%}{%- else -%}{%- set rest = messages -%}{%- endif -%}{{ bos_token }}"
    "{%- for message in rest -%}{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate') }}{%- endif -%}{%- if message.role == 'user' -%}"
    "{{ '[INST] ' }}{%- if loop.last and system is defined -%}{{ system + '\n\n' }}{%- endif -%}"
    "{{ message.content + ' [/INST]' }}{%- else -%}{{ ' ' + message.content | trim + eos_token }}"
    "{%- endif -%}{%- endfor -%}"
)


def mistral(messages: list[Message]) -> Pieces:
    """The system's text is in the last message, if that is the user's."""
    system = messages[0]["role"] == "system"
    pieces: Pieces = [(BOS, 1 if system and len(messages) > 2 else 0, False)]
    for number, message in enumerate(messages):
        if message["role"] == "user":
            moved = system and number == len(messages) - 1
            pieces.append(("[INST] ", 0 if moved else number, False))
            if moved:
                pieces += [(messages[0]["content"], 0, True), ("\n\n", number, False)]
            pieces += [(message["content"], number, True), (" [/INST]", number, False)]
        elif message["role"] == "assistant":
            pieces += [(" ", number, False), (message["content"].strip(), number, True), (EOS, number, False)]
    return pieces


QWEN3 = (
    "{%- set ns = namespace(last=0) -%}{%- for message in messages -%}{%- if message.role == 'user' -%}"
    "{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}{%- for message in messages -%}"
    "{%- set content = message.content -%}{%- set reasoning = '' -%}"
    "{%- if message.role == 'assistant' and '</think>' in content -%}"
    "{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.role == 'assistant' and loop.index0 > ns.last -%}"
    "{{ '<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' }}{%- endif -%}"
    "{{ content + '<|im_end|>\n' }}{%- endfor -%}"
)


def qwen3(messages: list[Message]) -> Pieces:
    """Reasoning is written after the last message of the user only."""
    pieces: Pieces = []
    last = max((n for n, message in enumerate(messages) if message["role"] == "user"), default=0)
    for number, message in enumerate(messages):
        reasoning, _, answer = message["content"].rpartition("</think>")
        assistant = message["role"] == "assistant"
        if not assistant or not _:
            reasoning, answer = "", message["content"]
        pieces.append((f"<|im_start|>{message['role']}\n", number, False))
        if assistant and number > last:
            inside = reasoning.split("<think>")[-1].strip("\n")
            pieces += [("<think>\n", number, None), (inside, number, True), ("\n</think>\n\n", number, None)]
        pieces += [(answer.lstrip("\n") if _ and assistant else answer, number, True)]
        pieces.append(("<|im_end|>\n", number, False))
    return pieces


TOOLS = (
    "{%- if tools -%}{{ '<|im_start|>system\n# Tools\n' }}{%- for tool in tools -%}{{ tool | tojson + '\n' }}"
    "{%- endfor -%}{{ '<|im_end|>\n' }}{%- endif -%}{%- for message in messages -%}"
    "{%- if message.role == 'tool' -%}"
    "{{ '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' }}"
    "{%- else -%}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    '{%- for call in message.tool_calls or [] -%}{{ \'\n<tool_call>\n{"name": "\' + call.function.name + '
    "'\", \"arguments\": ' }}{{ call.function.arguments | tojson }}{{ '}\n</tool_call>' }}{%- endfor -%}"
    "{{ '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
)


def tools(messages: list[Message]) -> Pieces:
    """Calls have one argument each, `city`."""
    pieces: Pieces = []
    for number, message in enumerate(messages):
        if message["role"] == "tool":
            pieces += [
                ("<|im_start|>user\n<tool_response>\n", number, False),
                (message["content"], number, True),
                ("\n</tool_response><|im_end|>\n", number, False),
            ]
            continue
        pieces += [(f"<|im_start|>{message['role']}\n", number, False), (message["content"], number, True)]
        for call in message.get("tool_calls", ()):
            pieces += [
                ('\n<tool_call>\n{"name": "', number, False),
                (call["function"]["name"], number, True),
                ('", "arguments": {"city": "', number, False),
                (call["function"]["arguments"]["city"], number, True),
                ('"}}\n</tool_call>', number, False),
            ]
        pieces.append(("<|im_end|>\n", number, False))
    return pieces


SHAPES: dict[str, tuple[str, Callable[[list[Message]], Pieces]]] = {
    "chatml": (CHATML, chatml),
    "llama3": (LLAMA3, llama3),
    "gemma": (GEMMA, gemma),
    "mistral": (MISTRAL, mistral),
    "qwen3": (QWEN3, qwen3),
    "tools": (TOOLS, tools),
}
CONTROL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
           "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]", BOS, EOS)  # fmt: skip
"""The special tokens of all templates."""
