"""A server whose engine repeats the prompt, and OpenAI's client of whichever a file has."""

import pytest


@pytest.fixture(scope="module")
def server():
    from serving import running

    with running() as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    import openai

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found
