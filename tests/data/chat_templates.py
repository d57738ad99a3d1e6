"""Small chat templates in the style of published ones, and a tokenizer of bytes that has them."""

import tokenizers

from jaxgen.data.chat import Conversation, encode_chats
from jaxgen.data.tokenizer import Tokenizer

SMOLLM2 = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

# Whitespace control, a date, headers, a trim, the begin of text once.
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' \
+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Tools, a namespace, a system message by default, calls in JSON, results joined in one turn.
QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. \
You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or \
(message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# Another name for the assistant; no system message.
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}\
{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\
{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}\
{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '
' + message['content'] | trim + '<end_of_turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model
'}}{% endif %}"""

# No header before an answer, and a token of its own after it.
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}\
{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}\
{{ ' ' + message['content'] + eos_token }}{% else %}\
{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"""

# The Llama 3 style with what counts marked, where the loop is left early.
MARKED = """{{ bos_token }}{% for message in messages %}
{%- if loop.index > 9 %}{% break %}{% endif -%}
<|start_header_id|>{{ message['role'] }}<|end_header_id|>

{% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] }}<|eot_id|>{% endgeneration %}
{% else %}
{{ message['content'] }}<|eot_id|>
{%- endif %}
{% endfor %}"""

TEMPLATES = {
    "smollm2": SMOLLM2,
    "llama3": LLAMA3,
    "qwen2.5": QWEN25,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "marked": MARKED,
}
TURNS = [
    {"role": "user", "content": " What is 2+2? <b> é漢😀 "},
    {"role": "assistant", "content": "It is\n4."},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "6"},
]
SYSTEM = {"role": "system", "content": "Be 'brief'.\n"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a<b": "é"}}}]
CALLS = [
    {"role": "user", "content": "2+2?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add", "arguments": {"x": 2, "é": [1.5, None]}}}],
    },
    {"role": "tool", "content": "4"},
    {"role": "tool", "content": "four"},
    {"role": "assistant", "content": "It is 4."},
]
CONVERSATIONS = {
    "smollm2": [(TURNS, None), ([SYSTEM, *TURNS], None)],
    "llama3": [(TURNS, None), ([SYSTEM, *TURNS], None)],
    "qwen2.5": [(TURNS, None), ([SYSTEM, *CALLS], TOOLS), (CALLS, TOOLS)],
    "gemma": [(TURNS, None)],
    "mistral": [(TURNS, None)],
    "marked": [([SYSTEM, *TURNS], None)],
}
SPECIAL = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
]


def model():
    """A tokenizers model of bytes, with the special tokens of all templates."""
    found = tokenizers.Tokenizer.from_str(Tokenizer.from_bytes().json)
    found.add_special_tokens(SPECIAL)
    return found


def tokenizer(name):
    """A tokenizer with one of the templates."""
    return Tokenizer(
        model(), bos="<s>", eos="</s>", pad=None, begin=(), chat_template=TEMPLATES.get(name, name)
    )


def encode_chat(tokenizer, messages, *, tools=None):
    """The ids of a conversation, and which of them count."""
    ((_, ids, counted),) = encode_chats(tokenizer, [Conversation(messages, tools)])
    return ids, counted
