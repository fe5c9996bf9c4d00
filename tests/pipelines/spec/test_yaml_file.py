from __future__ import annotations

from pathlib import Path

import pytest

from dinov2_core.errors import InputError
from pipelines.spec.problems import SpecError
from pipelines.spec.yaml_file import read_yaml


def read(folder: Path, content: str | bytes) -> object:
    path = folder / "spec.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6e-3", 6e-3),
        ("1e-4", 1e-4),
        ("1.5E+3", 1500.0),
        ("-.5e2", -50.0),
        ("1.0e-4", 1e-4),
        ("12", 12),
        ("0x10", 16),
        ("no", False),
        ("'6e-3'", "6e-3"),
        ("1e", "1e"),
        ("e3", "e3"),
        ("2024-01-31", "2024-01-31"),
        ("~", None),
    ],
)
def test_values_are_those_of_json(text: str, value: object, tmp_path: Path) -> None:
    found = read(tmp_path, f"a: {text}\nb: [{text}]\n")
    assert found == {"a": value, "b": [value]}
    assert isinstance(found, dict)
    assert type(found["a"]) is type(value)


def test_keys_that_stand_twice_are_all_listed_with_both_lines(tmp_path: Path) -> None:
    text = "a: 1\nb:\n  c: 1\n  d: [{e: 1,\n       e: 2}]\n  c: 2\na: 3\n"
    with pytest.raises(SpecError) as caught:
        read(tmp_path, text)
    assert str(caught.value).splitlines() == [
        "b.d.0.e: stands in line 4 and again in line 5; keep one of them",
        "b.c: stands in line 3 and again in line 6; keep one of them",
        "a: stands in line 1 and again in line 7; keep one of them",
    ]


def test_a_key_may_override_what_is_merged_into_its_mapping(tmp_path: Path) -> None:
    values = read(tmp_path, "base: &base {k: 1, l: 2}\nother: {<<: *base, k: 3}\n")
    assert values == {"base": {"k": 1, "l": 2}, "other": {"k": 3, "l": 2}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("Käse: 1\nname: ä".encode("latin-1"), "is not UTF-8: byte 0xe4 in line 1; if it is Latin"),
        (b"a: 1\nb: \xff", "byte 0xff in line 2"),
        ("a: 1".encode("utf-16"), "is text in UTF-16; a spec is YAML, saved as UTF-8"),
        (b"\x89PNG\r\n\x1a\n", "is a PNG image"),
        (b"PK\x03\x04", "is a zip archive"),
        (b"PAR1", "is a Parquet file"),
        ("", "is empty; dinopipe init writes a spec"),
        ("# only a comment\n", "is empty"),
        ("name: [", "is not YAML of plain values"),
        ("a: 1\n---\nb: 2\n", "but found another document"),
        ("a: &a [*a]\n", "is not YAML of plain values: Circular reference"),
        ("a: !!python/object:os.system {}\n", "could not determine a constructor"),
        ("[" * 1200, "maximum recursion depth"),
    ],
)
def test_other_files_are_named_for_what_they_are(
    content: str | bytes, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path}/spec.yaml ")
    assert reason in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbfa: 1") == {"a": 1}


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml cannot be read: No such file"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_yaml(tmp_path)
