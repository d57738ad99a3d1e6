import io
import sys

import pytest

from jaxgen.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.smoke
def test_a_terminal_sees_how_far_it_is_and_a_file_nothing(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("reading it", 2_000_000) as show:
        show(500_000)
    text = terminal.getvalue()
    assert "reading it" in text
    assert "0.5/2.0 MB" in text
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress("reading it", 10) as show:
        show(5)
    assert sys.stderr.getvalue() == ""
