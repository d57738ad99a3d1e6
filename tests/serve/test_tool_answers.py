"""Calls of tools over HTTP: whole and streaming, forced and not, and their results in messages."""

import json

import openai
import pytest

GREEDY = {"model": "echo", "temperature": 0}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


def tool(name):
    return {"type": "function", "function": {"name": name, "parameters": PARAMETERS}}


TOOLS = [tool("weather"), tool("time")]
# The engine repeats it.
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
CALLS = f"{CALL}\n{CALL.replace('weather', 'time')}"


def ask(client, content, **more):
    messages = [{"role": "user", "content": content}]
    asked = {"messages": messages, "tools": TOOLS, **GREEDY, **more}
    return client.chat.completions.create(**asked)


def streamed(client, content, **more):
    """The same as one choice, put together from its chunks."""
    chunks = [chunk.choices[0] for chunk in ask(client, content, stream=True, **more)]
    text, calls = "", []
    for chunk in chunks:
        text += chunk.delta.content or ""
        for call in chunk.delta.tool_calls or []:
            if call.id:
                assert (call.type, call.index) == ("function", len(calls))
                calls.append([call.function.name, call.function.arguments])
            else:
                assert call.function.name is None
                calls[call.index][1] += call.function.arguments
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    return text, calls, chunks[-1].finish_reason, chunks


def test_calls_are_read_out_of_an_answer(client):
    choice = ask(client, f"Well.\n{CALLS}").choices[0]
    assert choice.finish_reason == "tool_calls"
    calls = choice.message.tool_calls
    assert [call.function.name for call in calls] == ["weather", "time"]
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Rome"}] * 2
    assert len({call.id for call in calls}) == 2
    assert "Well." in choice.message.content
    assert CALL not in choice.message.content
    text, pairs, reason, chunks = streamed(client, f"Well.\n{CALLS}")
    assert (text, reason) == (choice.message.content, "tool_calls")
    assert pairs == [[call.function.name, call.function.arguments] for call in calls]
    # They come as they are made, not at the end.
    assert sum(bool(chunk.delta.tool_calls) for chunk in chunks) > 4


def test_of_parallel_calls_one_can_be_had(client):
    choice = ask(client, CALLS, parallel_tool_calls=False).choices[0]
    assert (len(choice.message.tool_calls), choice.finish_reason) == (1, "tool_calls")
    _, calls, reason, _ = streamed(client, CALLS, parallel_tool_calls=False)
    assert (len(calls), reason) == (1, "tool_calls")


def test_a_strict_function_gets_what_it_takes(client):
    """Where the model, left to itself, would say otherwise."""
    wrong = CALL.replace("Rome", "Graz")
    assert "Graz" in ask(client, wrong).choices[0].message.tool_calls[0].function.arguments
    strict = tool("weather")
    strict["function"]["strict"] = True
    made = ask(client, wrong, tools=[strict]).choices[0].message.tool_calls
    assert json.loads(made[0].function.arguments)["city"] in ("Oslo", "Rome")


def test_no_tools_no_calls(client):
    for more in ({"tool_choice": "none"}, {"tools": []}, {"tools": [tool("other")]}):
        choice = ask(client, CALL, **more).choices[0]
        assert choice.finish_reason == "stop"
        assert choice.message.tool_calls is None
        assert CALL in choice.message.content
    # The prompt tells of them unless none can be called.
    assert '"weather"' in ask(client, "x").choices[0].message.content
    assert '"weather"' not in ask(client, "x", tool_choice="none").choices[0].message.content


def test_a_call_that_is_cut_off_ends_for_its_length(client):
    size = ask(client, "x").usage.prompt_tokens + len(
        '<tool_call>\n{"name": "weather", "arguments": {'
    )
    content = CALL.ljust(len(CALL))
    made = ask(client, content, max_tokens=size).choices[0]
    assert made.finish_reason == "length"


@pytest.mark.parametrize(
    ("content", "stop", "reason", "arguments"),
    [
        (CALL.replace("Rome", "Graz"), '"Graz', "stop", ['{"city": ']),
        (CALLS, '"Rome", "x', "tool_calls", ['{"city": "Rome"}'] * 2),
        (f"{CALLS} end", " end", "tool_calls", ['{"city": "Rome"}'] * 2),
        (
            f"{CALL}\n{CALL.replace('Rome', 'Graz')}",
            "Graz",
            "stop",
            ['{"city": "Rome"}', '{"city": "'],
        ),
        (CALL.replace('"Rome"}', '"Rome"]'), None, "stop", ['{"city": "Rome"']),
        ("no call", None, "stop", []),
    ],
)
def test_a_call_that_is_not_whole_is_no_reason_to_call(client, content, stop, reason, arguments):
    """A client reads the arguments as JSON where that is what the reason says."""
    choice = ask(client, f"go {content}", stop=stop).choices[0]
    calls = choice.message.tool_calls or []
    assert [call.function.arguments for call in calls] == arguments
    assert choice.finish_reason == reason
    _, calls, told, _ = streamed(client, f"go {content}", stop=stop)
    assert (told, [each for _, each in calls]) == (reason, arguments)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "time"}}])
def test_a_call_can_be_forced(client, choice):
    """Whatever the model would say: here, to repeat the prompt."""
    made = ask(client, "hi", tool_choice=choice, parallel_tool_calls=False).choices[0]
    (call,) = made.message.tool_calls
    assert call.function.name in (["weather", "time"] if choice == "required" else ["time"])
    assert json.loads(call.function.arguments)["city"] in ("Oslo", "Rome")
    assert (made.message.content, made.finish_reason) == (None, "tool_calls")
    text, calls, reason, _ = streamed(client, "hi", tool_choice=choice, parallel_tool_calls=False)
    assert (text, reason) == ("", "tool_calls")
    assert calls == [[call.function.name, call.function.arguments]]


def test_what_was_called_and_what_came_of_it_are_told_to_the_model(client, server):
    answered = ask(client, f"go {CALL}").choices[0].message
    # As the client library sends it back.
    back = answered.model_dump()
    result = {"role": "tool", "tool_call_id": answered.tool_calls[0].id, "content": "12 degrees"}
    user = {"role": "user", "content": "go"}
    told = server.post("/tokenize", {"messages": [user, back, result], "tools": TOOLS}).json()
    text = bytes(token for token in told["tokens"] if token < 256).decode()
    assert '{"name": "weather", "arguments": {"city": "Rome"}}' in text
    assert "<tool_response>\n12 degrees\n</tool_response>" in text
    assert "\nuser: <tool_response>" in text
    made = client.chat.completions.create(messages=[user, back, result], tools=TOOLS, **GREEDY)
    assert "12 degrees" in made.choices[0].message.content
    # Without tools these messages read the same.
    made = client.chat.completions.create(messages=[user, back, result], **GREEDY)
    assert "12 degrees" in made.choices[0].message.content


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": NaN', "[" * 99999, '{"a": ' * 9999, ""])
def test_arguments_that_are_no_object_are_refused(client, text):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": text}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    if not text:  # What models that call without arguments may have said.
        client.chat.completions.create(messages=messages, max_tokens=5, **GREEDY)
        return
    with pytest.raises(openai.BadRequestError, match="a call of weather"):
        client.chat.completions.create(messages=messages, **GREEDY)


def test_tokens_of_calls_have_log_probabilities_too(client):
    made = ask(client, f"go {CALL}", logprobs=True)
    content = made.choices[0].logprobs.content
    assert len(content) == made.usage.completion_tokens
    spelled = b"".join(bytes(token.bytes) for token in content).decode()
    assert CALL in spelled
    *_, chunks = streamed(client, f"go {CALL}", logprobs=True)
    told = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content]
    assert told == content
