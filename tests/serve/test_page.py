"""The chat page as a person uses it, in headless Chromium where there is one."""

import struct
import zlib

import pytest
from browser import CHROMIUM, Page
from serving import running, wait_for

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")


@pytest.fixture(scope="module")
def server():
    with running(keys=["secret"], step_s=0.01) as found:
        yield found


@pytest.fixture
def page(server, tmp_path):
    found = Page(server.url, tmp_path)
    yield found
    found.close()


def say(page, text):
    page.run("at('text').focus()")
    page.type(text)
    page.press_enter()


def texts(kind):
    return f"[...document.querySelectorAll('.{kind}')].map((line) => line.textContent)"


def mean_colour(picture):
    """Of a PNG of 8 bits a channel: the mean of its first row, which is background."""
    width, _, depth, kind = struct.unpack(">IIBB", picture[16:26])
    assert depth == 8
    data, at = b"", 8
    while at < len(picture):
        (size,) = struct.unpack(">I", picture[at : at + 4])
        if picture[at + 4 : at + 8] == b"IDAT":
            data += picture[at + 8 : at + 8 + size]
        at += size + 12
    channels = {2: 3, 6: 4}[kind]
    row = zlib.decompress(data)[1 : 1 + channels]  # Its first pixel; whatever the filter, as it is.
    assert width == 900
    return sum(row[:3]) / 3


def test_a_conversation_with_a_key_streaming_stop_and_colours(page, server):
    page.wait(f"{texts('error')}.length == 1")
    assert "no API key" in page.run(texts("error"))[0]
    page.run("at('key').focus()")
    page.type("secret")
    page.run("at('text').focus()")
    page.wait("document.title === 'echo'")
    assert page.run(texts("error")) == []

    page.run("at('temperature').value = 0")
    say(page, "<b>héllo</b>")
    page.wait(f"{texts('note')}.length == 1")
    # Text, not HTML.
    assert page.run(texts("assistant")) == ["user: <b>héllo</b>\nassistant: "]
    assert "tokens, first after" in page.run(texts("note"))[0]

    # The conversation goes on with what was said; it appears bit by bit, until it is stopped.
    say(page, "x" * 1500)
    page.wait(f"{texts('assistant')}.length == 2 && {texts('assistant')}[1].length > 100")
    so_far = page.run(texts("assistant"))[1]
    assert so_far.startswith("user: <b>héllo</b>\nassistant: user: ")
    page.run("at('stop').click()")
    page.wait(f"{texts('note')}.at(-1) === 'stopped'")
    assert len(page.run(texts("assistant"))[1]) < 1500
    wait_for(lambda: server.engine.idle)
    assert server.metric('jaxgen_requests_total{model_name="echo",reason="cancelled"}') == 1

    assert mean_colour(page.picture()) > 250
    page.run("at('scheme').value = 'dark'; at('scheme').dispatchEvent(new Event('change'))")
    assert mean_colour(page.picture()) < 50
    page.run("at('clear').click()")
    assert page.run("at('log').childElementCount") == 0


def test_what_the_server_refuses_is_shown(page):
    page.run("at('key').value = 'secret'; at('temperature').value = 9")
    say(page, "hello")
    page.wait(f"{texts('error')}.at(-1)?.includes('temperature=9: expected a number from 0 to 2')")
    page.run("at('temperature').value = 0")
    say(page, "again")
    page.wait(f"{texts('assistant')}.length == 1")
    # What got no answer is part of what is asked now.
    page.wait(f"{texts('assistant')}[0] === 'user: hello\\n\\nagain\\nassistant: '")


def test_it_loads_nothing_from_elsewhere(server):
    answer = server.http.get("/")
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert "http://" not in answer.text.replace(server.url, "")
    assert "https://" not in answer.text
