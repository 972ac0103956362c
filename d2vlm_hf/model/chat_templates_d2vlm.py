# Copyright 2026 The d2vlm_hf Authors
# SPDX-License-Identifier: Apache-2.0
"""Chat templates of the text-model families, with `<video>` where the frames go.

Turns are written as the original was trained with them. None writes a beginning-of-text token: the tokenizer does, if
its text model wants one.
"""

_TEMPLATE = """
{%- macro body(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'video' -%}{{- '<video>\\n' -}}{%- endif -%}
{%- if part['type'] == 'text' -%}{{- part['text'] -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro header(role) -%}{{- HEADER -}}{%- endmacro -%}
SYSTEM
{%- for message in messages -%}
{{- header(message['role']) + body(message['content']) + FOOTER -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- header('assistant') -}}{%- endif -%}
"""
_SYSTEM = "{%- if messages[0]['role'] != 'system' -%}{{- header('system') + TEXT + FOOTER -}}{%- endif -%}"


def _template(header: str, footer: str, system: str | None) -> str:
    """A template from its pieces: `header` is a Jinja expression of `role`, `footer` and `system` are plain text."""
    system_turn = "" if system is None else _SYSTEM.replace("TEXT", repr(system))
    template = _TEMPLATE.replace("SYSTEM", system_turn).replace("HEADER", header).replace("FOOTER", repr(footer))
    return template.strip()


CHAT_TEMPLATES = {
    "phi3": _template(r"'<|' + role + '|>\n'", "<|end|>\n", "You are a helpful AI assistant."),
    "qwen2": _template(r"'<|im_start|>' + role + '\n'", "<|im_end|>\n", "You are a helpful assistant."),
    "llama3": _template(
        r"'<|start_header_id|>' + role + '<|end_header_id|>\n'", "<|eot_id|>\n", "You are a helpful AI assistant"
    ),
    "gemma2": _template(
        r"'<start_of_turn>' + ('model' if role == 'assistant' else role) + '\n'", "<end_of_turn>\n", None
    ),
}
"""Templates by family of the text model."""


__all__ = ["CHAT_TEMPLATES"]
