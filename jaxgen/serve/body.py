"""Bodies of requests as JSON values, checked against the part of JSON Schema that is used here.

The same schemas are what the server publishes, so what it says of itself is what it does.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from jaxgen.errors import UserError

Schema = dict[str, Any]

ANYTHING: Schema = {}
"""Any value, nested at most `MAX_DEPTH` deep."""
MAX_DEPTH = 64

_KINDS = {
    "null": "null",
    "boolean": "true or false",
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "array": "a list",
    "object": "an object",
}


class Refused(UserError):
    """A body asks for something that cannot be done."""

    def __init__(self, message: str, param: str | None = None):
        """Says what, and which parameter is to blame."""
        super().__init__(message)
        self.param = param


def parse(body: bytes) -> Any:
    """Returns the JSON value of a body.

    Raises:
        Refused: it is not JSON, of which NaN and Infinity are no part, or says something twice.
    """
    how = {"parse_constant": _refuse_constant, "parse_float": _parse_float}
    try:
        return json.loads(body.decode(), object_pairs_hook=_parse_object, **how)
    except Refused:
        raise
    except RecursionError:
        raise Refused("the body is nested too deeply; send a flatter one") from None
    except ValueError as error:
        raise Refused(f"the body is not JSON ({error}); correct it") from None


def check(value: Any, schema: Schema, at: str = "") -> None:
    """Checks a value; `at` names it in errors.

    Raises:
        Refused: it is not what the schema says, or a text is not Unicode.
    """
    if not schema:
        return _check_anything(value, at)
    if "anyOf" in schema:
        return _check_any(value, schema["anyOf"], at)
    if "enum" in schema:
        if not any(_same(value, known) for known in schema["enum"]):
            _refuse_choice(value, schema, at)
        return None
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    kind = next((kind for kind in kinds if _is(value, kind)), None)
    if kind is None:
        _refuse_kind(value, [schema], at)
    match kind:
        case "integer" | "number":
            _check_number(value, schema, at)
        case "string":
            _check_string(value, schema, at)
        case "array":
            _check_array(value, schema, at)
        case "object":
            _check_object(value, schema, at)


def optional(schema: Schema) -> Schema:
    """Returns a schema that null fits too, which means the same as no value."""
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    return {**schema, "type": [schema["type"], "null"]}


def record(properties: Mapping[str, Schema], required: Sequence[str] = ()) -> Schema:
    """Returns the schema of an object with these properties and no others."""
    schema = {"type": "object", "properties": dict(properties), "additionalProperties": False}
    return {**schema, "required": list(required)} if required else schema


def array(items: Schema, least: int = 0, most: int | None = None) -> Schema:
    """Returns the schema of a list."""
    limits = {"minItems": least} if most is None else {"minItems": least, "maxItems": most}
    return {"type": "array", "items": items, **limits}


def _check_anything(value: Any, at: str, depth: int = 0) -> None:
    if depth > MAX_DEPTH:
        raise Refused(f"{at} is nested deeper than {MAX_DEPTH}; send a flatter value", at)
    match value:
        case str():
            _check_string(value, {}, at)
        case float():
            _check_number(value, {"type": "number"}, at)
        case list():
            for item in value:
                _check_anything(item, at, depth + 1)
        case dict():
            for name, item in value.items():
                _check_string(name, {}, at)
                _check_anything(item, at, depth + 1)


def _check_any(value: Any, options: Sequence[Schema], at: str) -> None:
    options = _of_its_kind(value, options, at)
    refusals = []
    for option in options:
        try:
            return check(value, option, at)
        except Refused as refusal:
            refusals.append(refusal)
    # That of the option which fits the longest.
    best = max(refusals, key=lambda refusal: _progress(refusal.param or ""))
    if best.param != at:
        raise best
    same_kind = [
        r for r, option in zip(refusals, options, strict=True) if _is(value, option.get("type", ""))
    ]
    if len(same_kind) == 1:
        raise same_kind[0]
    _refuse_kind(value, options, at)


def _of_its_kind(value: Any, options: Sequence[Schema], at: str) -> Sequence[Schema]:
    """Returns the options for what a value says it is, where all objects among them must say it."""
    records = [option for option in options if option.get("type") == "object"]
    if not isinstance(value, dict) or not records:
        return options
    said = set.intersection(*(set(record.get("required", ())) for record in records)) & set(value)
    for name in said:
        if all("enum" in record["properties"][name] for record in records):
            known = [record["properties"][name]["enum"] for record in records]
            # Each once, though several options may be for it.
            choices = dict.fromkeys(one for each in known for one in each)
            check(value[name], {"enum": list(choices)}, f"{at}.{name}")
            return [r for r, each in zip(records, known, strict=True) if value[name] in each]
    return options


def _progress(param: str) -> tuple[list[int], int]:
    return [int(index) for index in re.findall(r"\[(\d+)\]", param)], len(param)


def _check_number(value: Any, schema: Schema, at: str) -> None:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above = schema.get("exclusiveMinimum", -math.inf)
    if not (low <= value <= high and above < value and value not in (math.inf, -math.inf)):
        raise Refused(f"{at}={_short(value)}: expected {_expected(schema)}", at)


def _check_string(value: str, schema: Schema, at: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise Refused(f"{at} has half of a surrogate pair; send whole characters", at) from None
    if len(value) < schema.get("minLength", 0):
        raise Refused(f"{at} is empty; send a text", at)
    if len(value) > schema.get("maxLength", math.inf):
        most = schema["maxLength"]
        raise Refused(f"{at} has {len(value)} characters; send at most {most}", at)
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        raise Refused(f"{at}={_short(value)}: expected {schema['description']}", at)


def _check_array(value: list[Any], schema: Schema, at: str) -> None:
    if len(value) < schema["minItems"]:
        raise Refused(f"{at} is empty; send at least {schema['minItems']} item", at)
    if len(value) > schema.get("maxItems", math.inf):
        raise Refused(f"{at} has {len(value)} items; send at most {schema['maxItems']}", at)
    items = schema["items"]
    # Token ids come by the ten thousand.
    if items.get("type") == "integer" and set(map(type, value)) == {int}:
        low, high = items["minimum"], items["maximum"]
        if low <= min(value) and max(value) <= high:
            return
    for index, item in enumerate(value):
        check(item, items, f"{at}[{index}]")


def _check_object(value: dict[str, Any], schema: Schema, at: str) -> None:
    known, rest = schema.get("properties", {}), schema["additionalProperties"]
    names = schema.get("propertyNames")
    if len(value) > schema.get("maxProperties", math.inf):
        raise Refused(f"{at} has {len(value)} entries; send at most {schema['maxProperties']}", at)
    if len(value) < schema.get("minProperties", 0):
        raise Refused(f"{at} is empty; send {' or '.join(known)}", at)
    for name, item in value.items():
        if names is not None and not re.fullmatch(names["pattern"], name):
            what = names["description"]
            raise Refused(f"{at} has an entry {json.dumps(name)[:60]}: expected {what}", at)
        if name not in known and rest is False:
            where = f"{at}.{_name(name)}".lstrip(".")
            raise Refused(f"{where} is not known here; leave it out", where)
        check(item, known.get(name, rest), f"{at}.{_name(name)}".lstrip("."))
    for name in schema.get("required", ()):
        if name not in value:
            where = f"{at}.{name}".lstrip(".")
            raise Refused(f"{where} is missing; send it", where)


def _is(value: Any, kind: str) -> bool:
    match kind:
        case "integer":
            return type(value) is int
        case "number":
            return type(value) in (int, float)
        case "boolean":
            return type(value) is bool
        case "null":
            return value is None
        case "string" | "array" | "object":
            return isinstance(value, {"string": str, "array": list, "object": dict}[kind])
    return False


def _same(value: Any, known: Any) -> bool:
    return isinstance(value, bool) is isinstance(known, bool) and value == known


def _refuse_kind(value: Any, schemas: Sequence[Schema], at: str) -> NoReturn:
    wanted = dict.fromkeys(_expected(schema) for schema in schemas)
    kinds = " or ".join(kind for kind in wanted if kind != "null")
    raise Refused(f"{at or 'the body'}={_short(value)}: expected {kinds}", at or None)


def _refuse_choice(value: Any, schema: Schema, at: str) -> NoReturn:
    choices = [json.dumps(choice) for choice in schema["enum"] if choice is not None]
    if None not in schema["enum"]:
        raise Refused(f"{at}={_short(value)}: expected {' or '.join(choices)}", at)
    ways = " or ".join(["leave it out", *(f"use {choice}" for choice in choices)])
    raise Refused(f"{at}={_short(value)} is not supported; {ways}", at)


def _expected(schema: Schema) -> str:
    if "enum" in schema:
        return " or ".join(json.dumps(choice) for choice in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(map(_expected, schema["anyOf"]))
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    text = " or ".join(_KINDS[kind] for kind in kinds if kind != "null" or len(kinds) == 1)
    if "exclusiveMinimum" in schema:
        text += f" above {schema['exclusiveMinimum']}"
    if "minimum" in schema:
        text += f" from {schema['minimum']}"
    if "maximum" in schema:
        text += f" to {schema['maximum']}"
    return text


def _short(value: Any) -> str:
    match value:
        case list():
            return "[...]"
        case dict():
            return "{...}"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _name(name: str) -> str:
    """A name that somebody else chose, fit for a message."""
    return (name if name.isidentifier() and name.isascii() else json.dumps(name))[:60]


def _parse_float(text: str) -> int | float:
    number = float(text)
    # JSON does not tell 1.0 from 1.
    return int(number) if number.is_integer() else number


def _parse_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set()
        for name, _ in pairs:
            if name in seen:
                raise Refused(f"{_name(name)} is there twice; send it once", _name(name))
            seen.add(name)
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
