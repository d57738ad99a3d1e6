"""What the server publishes about itself, tried out by schemathesis."""

import collections

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

SETTINGS = hypothesis.settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


# What no schema can say.
SENSE = (
    "stream_options is for stream=true",
    "is more than model.max_seq_len",
    "best_of=1 is less than n",
    "max_tokens differs from max_completion_tokens",
    "answers that may wait here",
    "is more than max_tokens=",
    "logprobs of an echo are not supported",
    "top_logprobs is for logprobs=true",
    "logit_bias has token",
    "cannot both be had",
    "leave one out",
    # Grammars, schemas and tools.
    "response_format: ",
    "structured_outputs.",
    "tool_choice names",
    "needs tools",
    "the second one named",
    "the parameters of ",
    "arguments that are no object in JSON",
)


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_operation_answers_as_published(server, mode):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    seen = collections.defaultdict(set)
    with requests.Session() as session:
        for operation in schema.get_all_operations():
            operation = operation.ok()
            if mode is GenerationMode.NEGATIVE and operation.method != "post":
                continue  # Nothing can be said wrongly.

            @SETTINGS
            @hypothesis.given(operation.as_strategy(generation_mode=mode))
            def try_it(case):
                answer = case.call(session=session)
                makes_no_sense = answer.status_code == 400 and any(s in answer.text for s in SENSE)
                case.validate_response(
                    answer, excluded_checks=[positive_data_acceptance] if makes_no_sense else []
                )
                seen[case.operation.label].add(answer.status_code)

            try_it()
    posts = {label: codes for label, codes in seen.items() if label.startswith("POST")}
    assert len(posts) == 4
    for codes in posts.values():
        assert (200 in codes) is (mode is GenerationMode.POSITIVE)
    if mode is GenerationMode.POSITIVE:
        assert len(seen) == 9


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_answers_as_published(server, path):
    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path]["POST"]
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    body = {"stream": True, **(chat if "chat" in path else {"prompt": "hello"})}
    answer = operation.Case(body=body, media_type="application/json").call_and_validate()
    assert answer.headers["content-type"][0].startswith("text/event-stream")
