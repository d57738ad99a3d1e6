"""Small chat templates with tools, in the style of published ones; and tools."""

import tokenizers

from jaxgen.data.tokenizer import Tokenizer

# Tools and results in tags; arguments as an object or as text.
HERMES = """{%- if tools %}<|im_start|>system
{{ messages[0].content if messages[0].role == 'system' }}
# Tools, answer with <tool_call>
{"name": <name>, "arguments": <arguments>}
</tool_call>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}
    {%- if message.role == "tool" %}
<|im_start|>user
<tool_response>{{ message.content }}</tool_response><|im_end|>
    {%- elif message.tool_calls %}
<|im_start|>assistant
{{ message.content }}
        {%- for tool_call in message.tool_calls %}
<tool_call>
{"name": "{{ tool_call.function.name }}", "arguments": {{ ARGUMENTS }}}
</tool_call>
        {%- endfor %}<|im_end|>
    {%- elif message.role != "system" %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
    {%- endif %}
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# Tools in the first question, one call at a time, `tool_calls` asked for by name alone.
LLAMA3 = """{{- bos_token }}
{%- if tools %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' }}
    {{- 'Respond in the format {"name": name, "parameters": values}.\\n\\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- messages[0]['content'] | trim + "<|eot_id|>" }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- elif message.role == "tool" %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {{- message.name + ": " + message.content + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

# Tools before the last question, calls as a list after a special token, ids of nine characters.
MISTRAL = """{{- bos_token }}
{%- set last = (messages | selectattr("role", "equalto", "user") | list)[-1] %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- if tools and message == last %}
            {{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " + message.content + "[/INST]" }}
    {%- elif message.tool_calls is defined %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {%- if call.id | length != 9 %}
                {{- raise_exception("Tool call IDs should be of 9 characters!") }}
            {%- endif %}
            {{- ', "id": "' + call.id + '"}' + ("" if loop.last else ", ") }}
        {%- endfor %}
        {{- "]" + eos_token }}
    {%- elif message.role == "tool" %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content + ', "call_id": "' }}
        {{- message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- " " + message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""

# Calls in a way of its own.
XML = HERMES.replace(
    '{"name": "{{ tool_call.function.name }}", "arguments": {{ ARGUMENTS }}}',
    "<function={{ tool_call.function.name }}>",
)

# No place for tools, nor for a system message.
PLAIN = """{% for message in messages %}{% if message.role not in ('user', 'assistant') or \
(message.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}\
{% endif %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"""

TEMPLATES = {
    "hermes": HERMES.replace("ARGUMENTS", "tool_call.function.arguments | tojson"),
    "hermes-text": HERMES.replace("ARGUMENTS", "'' + tool_call.function.arguments"),
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "xml": XML,
    "system": PLAIN.replace("('user', 'assistant') or", "('user', 'assistant', 'system') or 0 and"),
    "plain": PLAIN,
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Says what the weather is like.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "days": {"type": "integer", "minimum": 1, "maximum": 14},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TOOLS = [WEATHER, NOW]


SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|python_tag|>", "[TOOL_CALLS]", "[INST]"),
]


def tokenizer(name, *, swapped=False):
    """Bytes with the special tokens of all, and with tags that are ordinary tokens.

    Swapped: the tags are special, and what is usually special is no token.
    """
    model = tokenizers.Tokenizer.from_str(Tokenizer.from_bytes().json)
    tags = ["<tool_call>", "</tool_call>"]
    model.add_special_tokens(tags + SPECIAL[:2] if swapped else SPECIAL)
    model.add_tokens([] if swapped else tags)
    return Tokenizer(
        model, bos="<s>", eos="</s>", pad=None, begin=(), chat_template=TEMPLATES[name]
    )
