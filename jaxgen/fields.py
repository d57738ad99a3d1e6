"""Trees of dataclasses as text: their fields, to and from JSON, and `--a.b value` overrides.

A tree is a frozen dataclass whose fields are bool, int, float, str, None, `Literal`s, tuples, other
trees, or unions of these with at most one tree. Nothing here knows a particular config.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from jaxgen.errors import UserError

T = TypeVar("T")
SCALARS = (bool, int, float, str)


class Field(NamedTuple):
    """One field of a tree, or the head of a group of fields, which is a tree itself."""

    path: str
    kind: Any
    value: Any
    doc: str
    in_absent_group: bool = False

    @property
    def is_group(self) -> bool:
        """Whether fields of this field follow."""
        return _tree_in(self.kind) is not None


def to_json(tree: Any) -> Any:
    """Returns the tree as dicts, lists and scalars; `from_json` is its exact inverse."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return {name: to_json(getattr(tree, name)) for name in _kinds(type(tree))}
    if isinstance(tree, list | tuple):
        return [to_json(item) for item in tree]
    if tree is None or isinstance(tree, SCALARS):
        return tree
    raise UserError(f"{tree!r} is a {type(tree).__name__}; a config holds numbers, text and tuples")


def from_json(kind: type[T], data: Any, path: str = "") -> T:
    """Builds a `kind` from what `to_json` wrote; also checks and rebuilds a tree of objects.

    A key that is absent takes the field's default.

    Raises:
        UserError: an unknown key, a missing one without a default, or a value of another type.
    """
    return _read(kind, data, path)


def override(tree: T, overrides: Mapping[str, str]) -> T:
    """Returns the tree with fields replaced, for example `{"train.steps": "100"}`.

    Setting a field of an optional part that is None makes that part from its defaults.

    Raises:
        UserError: no such field (the message suggests one), or text that is not of its type.
    """
    data = to_json(tree)
    for path, text in overrides.items():
        try:
            data = _set(type(tree), data, path.split("."), text, path)
        except KeyError:
            known = [field.path for field in walk(tree)]
            raise UserError(f"no field --{path}{did_you_mean(path, known, '--')}") from None
    return from_json(type(tree), data)


def walk(tree: Any) -> Iterator[Field]:
    """Yields every field of the tree in order, each part's fields after a `Field` for the part.

    The fields of an optional part that is None come too, marked as of an absent group.
    """
    return _walk(type(tree), tree, "", "", absent=False)


def kind_text(kind: Any) -> str:
    """Names a type as the command line takes it: `INT`, `a|b`, `FLOAT,FLOAT,...`, `STR|none`."""
    if len(_options(kind)) > 1:
        return "|".join(kind_text(option) for option in _options(kind))
    (kind,) = _options(kind)
    if typing.get_origin(kind) is Literal:
        return "|".join(map(str, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        return ",".join("..." if item is Ellipsis else kind_text(item) for item in items)
    if kind in (None, types.NoneType):
        return "none"
    return "true|false" if kind is bool else kind.__name__.upper() if kind in SCALARS else "JSON"


def value_text(value: Any) -> str:
    """Writes a value as `override` reads it back."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        if any(dataclasses.is_dataclass(item) for item in value):
            return json.dumps(to_json(value))
        return ",".join(map(value_text, value)) + ("," if len(value) == 1 else "")
    return str(value)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Returns `; did you mean X?` for the nearest known word, or nothing if none is near."""
    known = list(known)
    leaf = word.rpartition(".")[2]
    same_leaf = [name for name in known if name.rpartition(".")[2] == leaf]
    by_leaf = {name.rpartition(".")[2]: name for name in reversed(known)}
    near_leaf = [by_leaf[name] for name in difflib.get_close_matches(leaf, by_leaf, 1, 0.75)]
    near = difflib.get_close_matches(word, known, 1, 0.75) + same_leaf + near_leaf
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _walk(kind: Any, value: Any, path: str, doc: str, absent: bool) -> Iterator[Field]:
    part = _tree_in(kind)
    if path:
        yield Field(path, kind, value, doc, absent)
    if part is not None:
        docs, absent = _docs(part), value is None
        for name, child in _kinds(part).items():
            at, doc = f"{path}.{name}".lstrip("."), docs.get(name, "")
            yield from _walk(child, None if absent else getattr(value, name), at, doc, absent)
    elif isinstance(value, tuple):
        for i, item in enumerate(value):
            if dataclasses.is_dataclass(item):
                yield from _walk(type(item), item, f"{path}.{i}", "", absent)


def _read(kind: Any, data: Any, path: str) -> Any:
    """`from_json` for any kind of value."""
    for option in sorted(_options(kind), key=lambda option: option is not type(data)):
        if _fits(option, data):
            break
    else:
        raise UserError(f"{path or 'config'}={_short(data)}: expected {kind_text(kind)}")
    if _is_tree(option):
        return _build(option, data, path)
    if typing.get_origin(option) is tuple:
        kinds = _item_kinds(option, data, path)
        items = zip(kinds, data, strict=True)
        return tuple(_read(k, item, f"{path}.{i}") for i, (k, item) in enumerate(items))
    return float(data) if option is float else data


def _set(kind: Any, data: Any, names: list[str], text: str, path: str) -> Any:
    """Returns `data`, the JSON form of a `kind`, with the field at `names` read from `text`."""
    if not names:
        return _parse(kind, text, path)
    name, *rest = names
    part = _tree_in(kind)
    if part is not None:
        data = dict(data or {})
        data[name] = _set(_kinds(part)[name], data.get(name), rest, text, path)
        return data
    if isinstance(data, list) and name.isdigit() and int(name) < len(data):
        tuple_kind = next(k for k in _options(kind) if typing.get_origin(k) is tuple)
        index = int(name)
        item_kind = _item_kinds(tuple_kind, data, path)[index]
        item = _set(item_kind, data[index], rest, text, path)
        return [*data[:index], item, *data[index + 1 :]]
    raise KeyError(name)


def _parse(kind: Any, text: str, path: str) -> Any:
    """Reads command-line text as JSON values of a `kind`; `str` is the last reading tried."""
    options = sorted(_options(kind), key=lambda option: option is str)
    for option in options:
        try:
            if option is types.NoneType and text.lower() == "none":
                return None
            if option is bool and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if option in (int, float, str):
                return option(text)
            if typing.get_origin(option) is Literal:
                return next(value for value in typing.get_args(option) if str(value) == text)
            if _is_tree(option) or text.startswith("["):
                return json.loads(text)
            if typing.get_origin(option) is tuple and ("," in text or str not in options):
                items = [item.strip() for item in text.split(",") if item.strip()]
                kinds = _item_kinds(option, items, path)
                return [_parse(k, item, path) for k, item in zip(kinds, items, strict=True)]
        except (ValueError, StopIteration):
            continue
    raise UserError(f"--{path} {text}: expected {kind_text(kind)}")


def _build(cls: Any, data: Any, path: str) -> Any:
    """Makes a dataclass from a mapping of its fields or from an object of the very same class."""
    if isinstance(data, Mapping):
        for name in data:
            if name not in _kinds(cls):
                at = f" in {path}" if path else ""
                raise UserError(f"no field {name!r}{at}{did_you_mean(str(name), _kinds(cls))}")
        values = dict(data)
    else:
        values = {name: getattr(data, name) for name in _kinds(cls)}
    for field in dataclasses.fields(cls):
        at = f"{path}.{field.name}".lstrip(".")
        if field.name in values:
            values[field.name] = _read(_kinds(cls)[field.name], values[field.name], at)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise UserError(f"{at} has no value and no default; set it")
    return cls(**values)


def _fits(kind: Any, data: Any) -> bool:
    if typing.get_origin(kind) is Literal:
        return any(value == data and type(value) is type(data) for value in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(data, list | tuple)
    if _is_tree(kind):
        return isinstance(data, Mapping) or type(data) is kind
    if kind is float:
        return type(data) in (int, float)
    return type(data) is kind


def _item_kinds(kind: Any, items: Any, path: str) -> list[Any]:
    """The kind of each item of a tuple type, once per item that is there."""
    kinds = typing.get_args(kind)
    if kinds[-1] is Ellipsis:
        return [kinds[0]] * len(items)
    if len(items) != len(kinds):
        raise UserError(f"{path}={_short(items)}: expected {len(kinds)} items, {kind_text(kind)}")
    return list(kinds)


def _options(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    options = typing.get_args(kind) if is_union else (kind,)
    return tuple(_unannotated(option) for option in options)


def _unannotated(kind: Any) -> Any:
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def _is_tree(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _tree_in(kind: Any) -> Any:
    return next((option for option in _options(kind) if _is_tree(option)), None)


def _short(value: Any) -> str:
    return textwrap.shorten(repr(value), 60, placeholder="...")


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


@functools.cache
def _docs(cls: Any) -> dict[str, str]:
    """The string after each field; empty where the source cannot be read."""
    docs = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError):  # typed at a prompt, or made by a function
            continue
        assert isinstance(tree, ast.ClassDef)
        for field, doc in itertools.pairwise(tree.body):
            match field, doc:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    docs[name] = inspect.cleandoc(text)
    return docs
