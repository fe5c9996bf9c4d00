from __future__ import annotations

from pipelines.spec.problems import Problem


def test_a_long_value_is_cut() -> None:
    text = str(Problem(path="a.b", value="x" * 200, message="is too long"))
    assert len(text) < 100
    assert text.startswith("a.b: 'xxx")


def test_a_mapping_is_not_printed() -> None:
    assert str(Problem(path="a", value={"k": 1}, message="is odd")) == "a: is odd"
