"""What stands beside a tokenizer.json: tokenizer_config.json and the chat template."""

import json
from collections.abc import Mapping
from typing import Any

from jaxgen.data import sources
from jaxgen.errors import UserError

TEMPLATE = "chat_template.jinja"


def read_config(url: str) -> dict[str, Any]:
    """Returns a JSON file's object; an empty one if there is no file.

    Raises:
        UserError: it is something else.
    """
    if not sources.exists(url):
        return {}
    try:
        found = json.loads(sources.read_bytes(url))
    except ValueError as error:
        raise UserError(f"{url} is not JSON ({error}); correct or remove it") from None
    if not isinstance(found, dict):
        raise UserError(f"{url} holds a {type(found).__name__}, no object; correct or remove it")
    return found


def read_template(folder: str, config: Mapping[str, Any]) -> str | None:
    """Returns the default chat template, from wherever in the folder it is.

    Raises:
        UserError: it is no text.
    """
    if sources.exists(url := f"{folder}/{TEMPLATE}"):
        try:
            return sources.read_bytes(url).decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{url} is not UTF-8 ({error}); correct or remove it") from None
    found = config.get("chat_template")
    if found is None:
        found = read_config(f"{folder}/chat_template.json").get("chat_template")
    try:
        if isinstance(found, list):
            found = {one["name"]: one["template"] for one in found}.get("default")
        if not isinstance(found, str | None):
            raise TypeError(f"a {type(found).__name__}")
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: chat_template is no text and no list of names and templates ({error!r}); "
            "correct or remove it"
        ) from None
    return found


def token_name(token: Any) -> str | None:
    """Returns the text of a special token, which may be one of its fields."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None
