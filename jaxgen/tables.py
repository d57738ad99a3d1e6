"""Results as aligned columns of text."""

from collections.abc import Iterable, Sequence


def columns(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns lines in which a column is as wide as its widest text; numbers stand to the right."""
    aligned = []
    for name, *texts in zip(header, *rows, strict=True):
        width = max(map(len, [name, *texts]))
        is_number = all(text[:1].isdigit() or text == "-" for text in texts)
        aligned.append([f"{text:{'>' if is_number else '<'}{width}}" for text in [name, *texts]])
    return "\n".join("  ".join(line).rstrip() for line in zip(*aligned, strict=True))
