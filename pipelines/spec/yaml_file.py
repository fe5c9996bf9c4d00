"""YAML files of settings: UTF-8, no key twice, and numbers such as 6e-3 are numbers."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from dinov2_core.errors import InputError
from pipelines.spec.problems import Problem, SpecError

TIMESTAMP = "tag:yaml.org,2002:timestamp"
FILE_KINDS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "a gzip file",
    b"PAR1": "a Parquet file",
    codecs.BOM_UTF16_LE: "text in UTF-16",
    codecs.BOM_UTF16_BE: "text in UTF-16",
}
"""First bytes of files that are taken for specs by mistake."""


class _Loader(yaml.SafeLoader):
    """Plain values as JSON has them."""


_Loader.add_constructor(TIMESTAMP, lambda _, node: str(node.value))  # JSON has no dates
_Loader.add_implicit_resolver(  # YAML 1.2; PyYAML's own pattern wants a point and a sign
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_yaml(path: Path) -> object:
    """The values of a YAML file, as JSON has them.

    Raises:
        InputError: There is no such file, or it is of another kind.
        SpecError: A key stands twice in a mapping; the error lists every such key.
    """
    text = _text_of(path)
    try:
        loader = _Loader(text)
        try:
            document = loader.get_single_node()
            if document is None:
                raise InputError(f"{path} is empty; dinopipe init writes a spec")
            repeated = list(_repeated_keys(document, set()))
            if repeated:
                raise SpecError(repeated)
            values = loader.construct_document(document)
        finally:
            loader.dispose()
        return json.loads(json.dumps(values))
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not YAML of plain values: {error}") from error


def _text_of(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}; dinopipe init writes a spec"
        ) from error
    for start, kind in FILE_KINDS.items():
        if content.startswith(start):
            raise InputError(f"{path} is {kind}; a spec is YAML, saved as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02x} in line {line}; if it is "
            f"Latin-1, convert it: iconv -f LATIN1 -t UTF-8"
        ) from error


def _repeated_keys(node: yaml.Node, visited: set[int], path: str = "") -> Iterator[Problem]:
    """A problem for every key that a mapping at or below a node has twice."""
    if id(node) in visited:  # an alias
        return
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _repeated_keys(item, visited, f"{path}.{number}".lstrip("."))
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        name = str(key.value)
        own_path, line = f"{path}.{name}".lstrip("."), key.start_mark.line + 1
        if name in lines:
            message = f"stands in line {lines[name]} and again in line {line}; keep one of them"
            yield Problem(path=own_path, value=None, message=message)
        lines[name] = line
        yield from _repeated_keys(value, visited, own_path)
