"""Strict YAML into a tree of dataclasses, `key=value` on top of it, and the tree back into text.

The fields decide how a scalar is read, not the look of the scalar: `1e-4` is a number for a float, `no` is text for a text, and
a value that its field cannot hold without loss is refused. Files are checked before they are merged, so an error names the
file and the line where the mistake stands.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from blm_jax.config import Experiment
from blm_jax.errors import RequestError

Tree = TypeVar("Tree")
Partial = dict[str, Any]  # what one source says: checked values by field name, fields it does not speak of absent

INCLUDE = "include"  # files at the head of a file, merged in order beneath what the file itself says


def load(*files: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Experiment:
    """The experiment that the files describe together, later ones and then the overrides having the last word."""
    return load_as(Experiment, *files, overrides=overrides)


def load_as(cls: type[Tree], *files: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Tree:
    """The same of any tree."""
    merged: Partial = {}
    for file in files:
        _merge(merged, _read_file(cls, file, ()))
    _merge_overrides(merged, cls, overrides)
    sources = [str(file) for file in files] + ["the command line"] * bool(overrides or not files)
    return _build(cls, merged, " and ".join(sources), ())


def override(tree: Tree, overrides: Sequence[str]) -> Tree:
    """The tree with each `a.b.c=value` put in its place."""
    merged = _partial(tree)
    _merge_overrides(merged, type(tree), overrides)
    return _build(type(tree), merged, "the command line", ())


def read(cls: type[Tree], file: str | os.PathLike[str]) -> Tree:
    """One file as a tree of this kind. It stands for itself: there is no `include`."""
    from etils import epath  # slow to import, and only files need it

    name = str(file)
    entries = _file_entries(epath.Path(file), name)
    return _build(cls, _fields(cls, entries, _Place(name)), name, ())


def parse(cls: type[Tree], value: Any, source: str) -> Tree:
    """A tree of this kind from what a JSON file holds."""
    try:
        text = yaml.dump(value, Dumper=_Writer, sort_keys=False, width=math.inf, allow_unicode=True)
    except yaml.YAMLError as error:
        raise RequestError(f"{source}: {' '.join(str(error).split())}") from error
    node, place = _compose(text, source), _Place(source, lines=False)
    return _build(cls, _fields(cls, _entries(node or yaml.ScalarNode("tag:yaml.org,2002:null", ""), place), place), source, ())


def render(tree: Any) -> str:
    """Every field of the tree as YAML, defaults filled in, one a line. `load` reads it back as the same tree."""
    return "".join(f"{line}\n" for line in _lines(tree))


# --- text -> nodes -----------------------------------------------------------------------------------------------------


class _Reader(yaml.SafeLoader):
    """The scalars of YAML 1.2: no octal 010, no sexagesimal 1:30, no dates, no `yes` or `off`."""

    yaml_implicit_resolvers: ClassVar = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.inf", "-+.0123456789"),
):
    _Reader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


class _Writer(yaml.SafeDumper):
    yaml_implicit_resolvers: ClassVar = _Reader.yaml_implicit_resolvers

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Only double quotes keep a line break or a control character on one line.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')

    def ignore_aliases(self, data: Any) -> bool:
        return True  # what is used twice is written twice


_Writer.add_representer(str, _Writer.represent_str)
_Writer.add_representer(tuple, _Writer.represent_list)


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        return _Reader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RequestError(f"{source}{line}: not YAML: {' '.join(filter(None, (error.context, error.problem)))}") from error
    except yaml.YAMLError as error:
        raise RequestError(f"{source}: not YAML: {' '.join(str(error).split())}") from error


def _kind(node: yaml.Node) -> str:
    return node.tag.rpartition(":")[2]


# --- nodes -> checked values ---------------------------------------------------------------------------------------------


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


class _Place:
    """Where a value stands, for the message if it is wrong."""

    def __init__(self, source: str, path: tuple[str, ...] = (), *, lines: bool = True):
        self.source, self.path, self.lines = source, path, lines

    def at(self, key: str) -> _Place:
        return _Place(self.source, (*self.path, key), lines=self.lines)

    def error(self, node: yaml.Node, message: str) -> RequestError:
        line = f":{node.start_mark.line + 1}" if self.lines else ""
        path = f"{'.'.join(self.path)}: " if self.path else ""
        return RequestError(f"{self.source}{line}: {path}{message}")


def _value(kind: Any, node: yaml.Node, place: _Place) -> Any:
    """What the node says, as this type."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return _fields(kind, _entries(node, place), place)
    if origin in (Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not type(None))
        return None if _kind(node) == "null" else _value(inner, node, place)
    if origin is dict:
        return {key: _value(arguments[1], child, place.at(key)) for key, (_, child) in _entries(node, place).items()}
    if origin is tuple:
        return tuple(_items(arguments, node, place))
    return _scalar(kind, node, place)


def _scalar(kind: Any, node: yaml.Node, place: _Place) -> Any:
    if not isinstance(node, yaml.ScalarNode) or _kind(node) == "null":
        raise place.error(node, f"expected {_name(kind)}, found {_shown(node)}")
    text, found = node.value, _kind(node)
    if get_origin(kind) is Literal:
        choices = [str(choice) for choice in get_args(kind)]
        if text not in choices:
            raise place.error(node, f"{text!r} is not one of {', '.join(choices)}{suggest(text, choices)}")
        return text
    if kind is str:
        return text
    if kind is bool and found == "bool":
        return text.lower() == "true"
    try:
        if kind is int and found == "int":
            return int(text)
        number = float(text.replace(".inf", "inf")) if kind is float and found in ("int", "float") else None
    except ValueError:  # not a number in spite of its tag, such as `!!int x`
        number = None
    if number is None:
        raise place.error(node, f"expected {_name(kind)}, found {_shown(node)}")
    if math.isinf(number) and not text.endswith(".inf"):
        raise place.error(node, f"{text} is too large for a number: write .inf if infinity is meant")
    return number


def _items(arguments: tuple[Any, ...], node: yaml.Node, place: _Place) -> Iterable[Any]:
    if not isinstance(node, yaml.SequenceNode):
        raise place.error(node, f"expected a list, found {_shown(node)}: write [a, b]")
    if arguments[-1] is Ellipsis:
        arguments = arguments[:1] * len(node.value)
    if len(arguments) != len(node.value):
        raise place.error(node, f"expected {len(arguments)} values, found {len(node.value)}")
    return [_value(kind, child, place.at(str(i))) for i, (kind, child) in enumerate(zip(arguments, node.value, strict=True))]


def _entries(node: yaml.Node, place: _Place) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        raise place.error(node, f"expected keys and values, found {_shown(node)}")
    entries: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, child in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise place.error(key, "a key must be plain text")
        if key.value in entries:
            first = entries[key.value][0].start_mark.line + 1
            raise place.at(key.value).error(key, f"given twice, first on line {first}")
        entries[key.value] = key, child
    return entries


def _fields(cls: type, entries: dict[str, tuple[yaml.Node, yaml.Node]], place: _Place, besides: tuple[str, ...] = ()) -> Partial:
    hints = _hints(cls)
    for key, (node, _) in entries.items():
        if key not in hints:
            raise place.at(key).error(node, _unknown(key, (*besides, *hints)))
    return {key: _value(hints[key], child, place.at(key)) for key, (_, child) in entries.items()}


def _unknown(key: str, known: Iterable[str]) -> str:
    return "no such key" + (suggest(key, known) or f"; the keys here are {', '.join(known)}")


def suggest(word: str, known: Iterable[str]) -> str:
    """The end of a message about a wrong word: the known one that is near, if there is one."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _name(kind: Any) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind) or f"one of {', '.join(get_args(kind))}"


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "keys and values"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "nothing" if _kind(node) == "null" else f"{node.value!r} ({'text' if _kind(node) == 'str' else _kind(node)})"


# --- files and overrides -------------------------------------------------------------------------------------------------


def _read_file(cls: type, file: str | os.PathLike[str], including: tuple[str, ...]) -> Partial:
    """What a file and the files it includes say."""
    from etils import epath  # slow to import, and only files need it

    path = epath.Path(file)
    name, identity = str(file), os.path.normpath(path)
    if identity in including:
        raise RequestError(f"{including[-1]}: includes itself: {' -> '.join((*including, identity))}")
    place = _Place(name)
    entries = _file_entries(path, name, f" (included by {including[-1]})" if including else "")
    merged: Partial = {}
    if INCLUDE in entries:
        for other in _value(tuple[str, ...], entries.pop(INCLUDE)[1], place.at(INCLUDE)):
            # An address or an absolute path stands for itself; anything else is beside this file.
            target = other if "://" in other else path.parent / other
            _merge(merged, _read_file(cls, target, (*including, identity)))
    _merge(merged, _fields(cls, entries, place, (INCLUDE,)))
    return merged


def _file_entries(path: Any, name: str, asked: str = "") -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """Keys and values of a file; none if it is empty."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read as text: {error}"
        raise RequestError(f"{name}{asked}: {reason}") from error
    node = _compose(text, name)
    return {} if node is None or _kind(node) == "null" else _entries(node, _Place(name))


def _merge_overrides(merged: Partial, cls: type, overrides: Sequence[str]) -> None:
    for text in overrides:
        _merge(merged, _read_override(cls, text))


def _read_override(cls: type, text: str) -> Partial:
    dotted, equals, value = text.partition("=")
    if not equals or not dotted:
        raise RequestError(f"{text!r}: an override is written key=value, such as hardware.mesh.fsdp=8")
    kind: Any = cls
    keys: list[str] = []
    rest = dotted.strip()
    while rest:
        if get_origin(kind) is dict:  # the names in a dict are the user's own and may hold dots
            keys.append(rest)
            kind, rest = get_args(kind)[1], ""
            continue
        key, _, rest = rest.partition(".")
        if not is_dataclass(kind):
            raise RequestError(f"{text!r}: {'.'.join(keys)} is a value and has no keys of its own")
        hints = _hints(kind)  # type: ignore[arg-type]
        if key not in hints:
            raise RequestError(f"{text!r}: {'.'.join((*keys, key))}: {_unknown(key, hints)}")
        keys.append(key)
        kind = hints[key] if not rest else _inner(hints[key])
    node = _compose(value, repr(text)) or yaml.ScalarNode("tag:yaml.org,2002:null", "")
    found = _value(kind, node, _Place(repr(text), tuple(keys), lines=False))
    for key in reversed(keys):
        found = {key: found}
    return found


def _merge(under: Partial, over: Partial) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _merge(under[key], value)
        else:
            under[key] = value


# --- values <-> tree ------------------------------------------------------------------------------------------------------


def _build(cls: type[Tree], partial: Partial, source: str, path: tuple[str, ...]) -> Tree:
    values = {}
    for field in fields(cls):  # type: ignore[arg-type]
        kind, here = _hints(cls)[field.name], (*path, field.name)
        if field.name in partial:
            values[field.name] = _built(kind, partial[field.name], source, here)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise RequestError(f"{source}: {'.'.join(here)} is missing")
    try:
        return cls(**values)
    except RequestError as error:  # a check of the dataclass itself, which does not know where it stands
        raise RequestError(f"{source}: {'.'.join(path)}: {error}" if path else f"{source}: {error}") from error


def _built(kind: Any, value: Any, source: str, path: tuple[str, ...]) -> Any:
    """The value with every part of it that is a dataclass built."""
    kind = _inner(kind)
    if value is None:
        return None
    if is_dataclass(kind):
        return _build(kind, value, source, path)  # type: ignore[arg-type]
    if get_origin(kind) is dict:
        return {key: _built(get_args(kind)[1], child, source, (*path, key)) for key, child in value.items()}
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return tuple(_built(one, child, source, (*path, str(i))) for i, (one, child) in enumerate(zip(kinds, value, strict=True)))
    return value


def _inner(kind: Any) -> Any:
    """The type within `X | None`."""
    if get_origin(kind) in (Union, types.UnionType):
        return next(argument for argument in get_args(kind) if argument is not type(None))
    return kind


def _partial(tree: Any) -> Any:
    if is_dataclass(tree):
        return {field.name: _partial(getattr(tree, field.name)) for field in fields(tree)}
    if isinstance(tree, dict):
        return {key: _partial(value) for key, value in tree.items()}
    return tuple(map(_partial, tree)) if isinstance(tree, tuple) else tree


def _lines(tree: Any, indent: str = "") -> Iterable[str]:
    for field in fields(tree):
        value = getattr(tree, field.name)
        if is_dataclass(value):
            yield f"{indent}{field.name}:"
            yield from _lines(value, indent + "  ")
        elif isinstance(value, dict) and value:
            yield f"{indent}{field.name}:"
            yield from (f"{indent}  {_text(key)}: {_text(value[key])}" for key in sorted(value))
        elif isinstance(value, tuple) and value and is_dataclass(value[0]):
            yield f"{indent}{field.name}:"
            yield from (line for item in value for line in _item_lines(item, indent))
        else:
            yield f"{indent}{field.name}: {_text(value)}"


def _item_lines(item: Any, indent: str) -> Iterable[str]:
    """An item of a list: on one line if it holds nothing but scalars and lists of them."""
    values = _partial(item)
    if not any(isinstance(value, dict) or (isinstance(value, tuple) and value and isinstance(value[0], dict)) for value in values.values()):
        yield f"{indent}- {_text(values)}"
        return
    for i, line in enumerate(_lines(item, indent + "  ")):
        yield line if i else f"{indent}- {line[len(indent) + 2 :]}"


def _text(value: Any) -> str:
    text = yaml.dump([value], Dumper=_Writer, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False)
    return text[1:-2]  # within a list, or the empty text and some others come out bare
