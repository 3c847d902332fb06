"""Write a Modelfile for Ollama: the file of weights, a chat template in Go, prompt, and stop texts.

Ollama knows no Jinja. So the chat format is found out by what it makes of four marks, and written
as a Go template around the question template: whoever asks Ollama a bare question asks as the model
was adapted to be asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from nslora.types import SLOT, Prompt

# characters of private use: no chat format writes them
SYSTEM, USER, REPLY = "\ue000", "\ue001", "\ue002"
# what a Modelfile or a template would read as its own: a quotation's end, an action, what Ollama drops
UNSAFE = re.compile(r'"""|\{\{|\}\}')
SYSTEM_FIELD, USER_FIELD, REPLY_FIELD = "{{ .System }}", "{{ .Prompt }}", "{{ .Response }}"


def modelfile(
    file: str, tokenizer: Any, prompt: Prompt, ends: Sequence[str], longest: int, plain: bool
) -> str:
    """Return a Modelfile.

    Args:
        file: name of the GGUF file beside it.
        tokenizer: has the chat template. plain: it is the one of base models without a chat format.
        ends: texts that end a reply. longest: tokens of a reply.
    """
    lines = [f"FROM ./{file}", f"TEMPLATE {quoted(template(tokenizer, prompt, plain))}"]
    if prompt.system and is_safe(prompt.system):
        lines.append(f"SYSTEM {quoted(prompt.system)}")
    lines += ["PARAMETER temperature 0", f"PARAMETER num_predict {longest}"]
    lines += [f"PARAMETER stop {quoted(end)}" for end in ends]
    return "\n".join([*lines, ""])


def template(tokenizer: Any, prompt: Prompt, plain: bool) -> str:
    """Return the chat format as a Go template of `.System`, `.Prompt` and `.Response`.

    A question comes in the question template. A system prompt that no Modelfile can hold is in it, too.
    """
    told, asked = _parts(tokenizer, [SYSTEM, USER]), _parts(tokenizer, [USER])
    opened = f"{literal(told[0])}{SYSTEM_FIELD}{literal(told[1])}"
    default = literal(asked[0])
    if prompt.system and not is_safe(prompt.system):
        default = f"{literal(told[0])}{literal(prompt.system)}{literal(told[1])}"
    before, _, after = prompt.question.partition(SLOT)
    question = f"{literal(before)}{USER_FIELD}{literal(after)}"
    # what follows the reply is of use only where another turn does
    closing = "\n\n" if plain else _parts(tokenizer, [SYSTEM, USER, REPLY])[-1]
    head = f"{{{{ if .System }}}}{opened}{{{{ else }}}}{default}{{{{ end }}}}"
    return f"{head}{question}{literal(told[-1])}{REPLY_FIELD}{literal(closing)}"


def _parts(tokenizer: Any, marks: Sequence[str]) -> list[str]:
    """Return the texts that a chat format writes before, between and after messages."""
    roles = {SYSTEM: "system", USER: "user", REPLY: "assistant"}
    messages = [{"role": roles[mark], "content": mark} for mark in marks]
    options = {"tokenize": False, "add_generation_prompt": marks[-1] != REPLY}
    text = tokenizer.apply_chat_template(messages, **options)
    start = tokenizer.bos_token or ""
    # a server writes it by itself where the tokenizer does
    if start and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id:
        text = text.removeprefix(start)
    return re.split("|".join(marks), text)


def is_safe(text: str) -> bool:
    """Tell whether a text can stand in a Modelfile and in a template as it is."""
    return UNSAFE.search(text) is None and text.replace("\n", "").replace("\t", "").isprintable()


def literal(text: str) -> str:
    """Return a text as a part of a Go template."""
    return text if is_safe(text) else f"{{{{ {go_string(text)} }}}}"


def go_string(text: str) -> str:
    """Return a text as a string of Go."""
    escaped = json.dumps(text, ensure_ascii=False)[1:-1]
    # a brace would not end an action in Go's eyes, but it would in a reader's
    escaped = escaped.replace("{{", "{\\u007b").replace("}}", "}\\u007d")
    letters = [c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped]
    return f'"{"".join(letters)}"'


def quoted(text: str) -> str:
    """Return a text as the argument of an instruction."""
    return f'"""{text}"""'
