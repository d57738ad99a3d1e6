"""What the server publishes about itself, tried out by schemathesis."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis import GenerationMode
from serving import running

SETTINGS = hypothesis.settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def server():
    with running() as found:
        yield found


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_every_operation_answers_as_published(server, mode):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tried = set()
    for operation in schema.get_all_operations():
        operation = operation.ok()
        if mode is GenerationMode.NEGATIVE and operation.method != "post":
            continue  # Nothing can be said wrongly.

        @SETTINGS
        @hypothesis.given(operation.as_strategy(generation_mode=mode))
        def try_it(case):
            response = case.call(session=session)
            tried.add((case.operation.label, response.status_code))
            case.validate_response(response)

        import requests

        with requests.Session() as session:
            try_it()
    print(sorted(tried))
    assert 0
