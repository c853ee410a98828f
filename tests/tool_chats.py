"""Conversations with tools, and chat templates of real families that read them: TRL's copies, and one after Mistral's."""

from pathlib import Path

from ivg.testing import byte_tokenizer

TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ARGUMENTS = '{"city": "Zürich", "days": [1, 2]}'
CALL = {"id": "callabcde", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
ASKED = [{"role": "user", "content": "How is the weather?"}]
CALLED = [*ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
ANSWERED = [*CALLED, {"role": "tool", "tool_call_id": "callabcde", "content": "sunny, 21 degrees"}]

_MISTRAL_BEGIN = (
    "{{- '<s>' }}{%- if tools %}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{%- for m in messages %}"
    "{%- if m.role == 'user' %}{{- '[INST] ' + m.content + '[/INST]' }}"
    "{%- elif m.tool_calls is defined and m.tool_calls %}"
)
_MISTRAL_END = (
    "{%- elif m.role == 'assistant' %}{{- ' ' + m.content + '</s>' }}"
    "{%- elif m.role == 'tool' %}"
    "{{- '[TOOL_RESULTS] {\"content\": ' + m.content | tojson + ', \"call_id\": \"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}"
    "{%- endif %}{%- endfor %}"
)
MISTRAL = (
    _MISTRAL_BEGIN + "{{- '[TOOL_CALLS] [' }}{%- for call in m.tool_calls %}"
    "{%- if call.id | length != 9 %}{{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{%- endif %}"
    "{%- set made = call.function | tojson %}{{- made[:-1] + ', \"id\": \"' + call.id + '\"}' }}"
    "{%- if not loop.last %}{{- ', ' }}{%- endif %}{%- endfor %}{{- ']</s>' }}" + _MISTRAL_END
)
"""After that of Mistral-7B-Instruct-v0.3."""
MISTRAL_NAMED = (
    _MISTRAL_BEGIN + "{%- for call in m.tool_calls %}"
    "{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}{%- endfor %}{{- '</s>' }}" + _MISTRAL_END
)
"""After that of Mistral's newer models."""
_MISTRALS = {"mistral": MISTRAL, "mistral_named": MISTRAL_NAMED}
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
"""Reads no tools."""


def template(name):
    """A template of TRL's, by its file name, or one of those above; a template is itself."""
    if "{" in name or name in _MISTRALS:
        return _MISTRALS.get(name, name)
    import trl

    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer(name):
    """A tokenizer of bytes with the template of :func:`template`."""
    out = byte_tokenizer()
    out.chat_template = template(name)
    return out
