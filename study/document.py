"""Documents: a file becomes plain values and the line of each, safely; plain values become a file again.

YAML or JSON ─read_document─> Document(tree, lines) ─overridden, for each path=value─> Document        tree ─to_yaml─> YAML ─write_whole─> file
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from study.errors import HomeError, NotFound, Problem, SpecError
from study.problems import OVERRIDDEN, shown

MAX_BYTES = 1_000_000
"""A larger file is refused, and no more than this is read of it."""

MAX_NODES = 20_000
"""Values in a file after anchors are expanded; more is refused, so that a small file cannot fill the memory."""


class Document(NamedTuple):
    """A parsed file: plain values, and the line of every key by its path."""

    tree: object
    lines: dict[tuple[str, ...], int]


def read_document(path: Path) -> Document:
    """Parses a YAML or JSON file safely.

    Raises:
        NotFound: if the file is missing.
        SpecError: if it is unreadable, too large, not UTF-8, empty, not YAML, or more than plain values.
    """

    def refuse(kind: str, message: str, remedy: str, line: int | None = None) -> SpecError:
        return SpecError([Problem(kind, message, f"{path}:{line}" if line else str(path), remedy)])

    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            size = max(len(content), path.stat().st_size) / 1e6
            raise refuse("too-large", f"is larger than {MAX_BYTES / 1e6:g} MB (got {size:.1f} MB)", "is this the right file?")
        text = content.decode("utf-8")
    except FileNotFoundError:
        raise NotFound("no such file", where=str(path), remedy="check the path, or start from one in search_spaces/") from None
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise refuse("encoding", f"is not UTF-8 (byte 0x{byte:02x} at offset {error.start})", "save it as UTF-8 text") from None
    except OSError as error:
        raise refuse("unreadable", f"cannot be read ({error.strerror})", "check that it is a file that you may read") from None
    try:
        document = _parsed(text.replace("\t", " ") if path.suffix == ".json" else text)
    except _Refused as error:
        raise refuse(error.kind, error.message, error.remedy, error.line) from None
    if not document.lines:
        raise refuse("empty", "is empty", "start with `name: my-study`", 1)
    return document


def parse_value(text: str) -> object:
    """One YAML value, read as a spec reads it.

    Raises:
        ValueError: if it is not YAML, or more than plain values.
    """
    return _parsed(text).tree


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Plain values as YAML that reads back to the same values, here and in other YAML readers."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a file, whole or not at all.

    Raises:
        HomeError: if it cannot be written.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        raise HomeError(f"cannot be written ({error.strerror})", where=str(path), remedy="choose a folder that you may write to") from None


def overridden(document: Document, override: str) -> Document:
    """The document with one field or section replaced, whose line is OVERRIDDEN.

    Args:
        document: The file of a study.
        override: `path=value` with a YAML value.

    Raises:
        SpecError: if it is not written so.
    """
    keys, value = _parsed_override(document.tree, override)
    lines = {where: line for where, line in document.lines.items() if where[: len(keys)] != keys}
    return Document(_replaced(document.tree, keys, value), {keys[: depth + 1]: OVERRIDDEN for depth in range(len(keys))} | lines)


class _Refused(ValueError):
    """Text that a spec may not hold."""

    def __init__(self, kind: str, message: str, remedy: str, line: int = 1) -> None:
        super().__init__(message)
        self.kind, self.message, self.remedy, self.line = kind, message, remedy, line


def _parsed(text: str) -> Document:
    lines: dict[tuple[str, ...], int] = {}
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return Document(None, lines)
        for count, (where, node) in enumerate(_walk(root)):
            if count > MAX_NODES:
                raise _Refused("too-large", f"holds more than {MAX_NODES} values once anchors are expanded", "write out what you need")
            lines.setdefault(where, node.start_mark.line + 1)
        return Document(loader.construct_document(root), lines)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = f"is not valid YAML: {error.problem or error.context or 'cannot be parsed'}"
        raise _Refused("yaml", message, "mend the line", mark.line + 1 if mark else 1) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _Refused("yaml", f"is not valid YAML: a control character (got {chr(error.character)!r})", "remove it", line) from None
    except RecursionError:
        raise _Refused("too-deep", "nests too deeply", "a spec needs a handful of levels") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-3` as a number, `no` and `off` as words, and refuses tags and repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        tag = getattr(event, "tag", None)
        if tag is not None:
            shown = tag.replace("tag:yaml.org,2002:", "!!")
            raise _Refused("tag", f"tags are not allowed (got {shown!r})", "write plain values", event.start_mark.line + 1)
        return super().compose_node(parent, index)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused("key", "a key must be a word, not a list or a mapping", "mend the line", line)
            if key.value in seen:
                raise _Refused("repeated-key", f"the key {key.value!r} stands twice", "keep one of them", line)
            seen.add(key.value)
        return node

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        # JSON writes a character beyond U+FFFF as two escapes, which PyYAML leaves apart.
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

    def construct_yaml_int(self, node: Any) -> int:
        try:
            return super().construct_yaml_int(node)
        except ValueError:
            got = shown(node.value)
            raise _Refused("number", f"cannot be read as a number (got {got})", "mend the line", node.start_mark.line + 1) from None


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every word that `_Loader` or a stock YAML reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> Any:
        # PyYAML loses spaces around these line breaks, unless it escapes them.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style='"' if set(data) & set("\x85\u2028\u2029") else None)


_FLOAT = re.compile(r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF|nan|NaN|NAN))$")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.removeprefix("tag:yaml.org,2002:") not in ("bool", "float", "timestamp", "value")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Dumper.add_representer(str, _Dumper.represent_str)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _walk(node: yaml.Node, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], yaml.Node]]:
    yield where, node
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*where, key.value), key
            yield from _walk(value, (*where, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _walk(value, (*where, str(index)))


def _parsed_override(tree: object, override: str) -> tuple[tuple[str, ...], object]:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise SpecError([Problem("override", f"an override is path=value (got {override!r})", "--set", "for example --set search.trials=10")])
    try:
        return _keys(tree, path), parse_value(text)
    except ValueError as error:
        raise SpecError([Problem("override", f"the value {error} (got {shown(text)})", f"--set {path}", "quote it")]) from None


def _keys(tree: object, path: str) -> tuple[str, ...]:
    """The steps to a field; below `space` the dotted path of an axis is one step."""
    if not path.startswith("space."):
        return tuple(path.split("."))
    axis = path.removeprefix("space.")
    space = tree.get("space") if isinstance(tree, Mapping) else None
    for name in map(str, space if isinstance(space, Mapping) else ()):
        if axis.startswith(f"{name}."):
            return ("space", name, *axis.removeprefix(f"{name}.").split("."))
    return ("space", axis)


def _replaced(tree: object, keys: Sequence[str], value: object) -> object:
    if not keys:
        return value
    branch = dict(tree) if isinstance(tree, Mapping) else {}
    branch[keys[0]] = _replaced(branch.get(keys[0]), keys[1:], value)
    return branch
