"""Chat templates in the styles of public models, and conversations."""

from __future__ import annotations

START, STOP, BOS, EOS = "<|im_start|>", "<|im_end|>", "<s>", "</s>"

#: ChatML, as SmolLM2 and Qwen use it
CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant<|im_end|>
' }}{% endif %}{{ '<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

#: headers, a BOS token, trimmed contents and block statements on their own lines, as Llama 3 has them
LLAMA = """{{- bos_token }}
{%- set ns = namespace(found=false) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% set ns.found = true %}{% endif %}
    {{- '[' ~ message['role'] ~ ']\\n\\n' ~ message['content'] | trim ~ eos_token }}
    {%- if loop.index > 50 %}{% break %}{% endif %}
{%- endfor %}
{%- if not ns.found %}{{ '(none)' }}{% endif %}
{%- if tools is not none %}{{ tools | tojson }}{% endif %}
{%- if add_generation_prompt %}
    {{- '[assistant]\\n\\n' }}
{%- endif %}
"""

#: roles that alternate, a system text inside the first question, and `raise_exception`, as Mistral has them
MISTRAL = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + ((system + '\\n\\n') if system is defined and loop.first else '') + message['content'] + ' [/INST]' }}
    {%- else %}
        {% generation %}{{- ' ' + message['content'] + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}"""

TEMPLATES = {"chatml": CHATML, "llama": LLAMA, "mistral": MISTRAL}


def message(role: str, content: str) -> dict[str, str]:
    """Return a message."""
    return {"role": role, "content": content}


QUESTION = message("user", "Where is the Eiffel Tower?")
CONVERSATIONS = [
    [QUESTION],
    [message("system", "Be brief."), QUESTION],
    [
        message("user", " Hi \n"),
        message("assistant", "São Paulo 🗼"),
        message("user", "<b>{{ 1 }} {% if %}</b>"),
    ],
    [message("system", ""), QUESTION, message("assistant", "In Paris. "), message("user", "Why?")],
]

#: roles in plain text without a BOS token, and turns that end with the EOS token
PLAIN_ROLES = """{% for message in messages %}{{ message.role ~ ':
' ~ message.content ~ eos_token ~ '
' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:
' }}{% endif %}"""
