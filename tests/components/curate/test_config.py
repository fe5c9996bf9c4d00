from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from components.curate.config import CurateSettings, Images

NETWORK = {"kind": "torchscript", "path": "net.pt"}


@pytest.mark.parametrize(
    ("settings", "here", "on_cluster"),
    [
        ({}, False, False),
        ({"embedding": NETWORK}, False, False),
        ({"embedding_topology": {}}, False, False),
        ({"embedding": NETWORK, "embedding_topology": {}}, False, True),
        ({"embedding_topology": {"processes_per_node": 2}}, True, True),
        ({"embedding": NETWORK, "embedding_topology": {"num_nodes": 2}}, True, True),
    ],
)
def test_ranks_embed_where_they_are_of_use(
    settings: dict[str, object], here: bool, on_cluster: bool
) -> None:
    made = CurateSettings.model_validate_json(json.dumps(settings))
    assert made.embeds_on_ranks(on_cluster=False) == here
    assert made.embeds_on_ranks(on_cluster=True) == on_cluster


def test_a_network_is_not_split_among_ranks() -> None:
    topology = {"processes_per_node": 2, "num_replicas": 2}
    with pytest.raises(ValidationError, match=r"embedding_topology\.num_replicas 2 has no effect"):
        CurateSettings.model_validate_json(json.dumps({"embedding_topology": topology}))


def test_old_names_still_work(caplog: pytest.LogCaptureFixture) -> None:
    old = Images.model_validate_json('{"uri": "a", "planted": {"leaks": 3}}')
    new = Images.model_validate_json('{"uri": "a", "synthetic_defects": {"leaks": 3}}')
    assert old == new
    assert '"synthetic_defects":{' in old.model_dump_json()
    settings = [
        CurateSettings.model_validate_json(
            json.dumps({"verification": {"kind": kind, "near_threshold": 0.99}})
        )
        for kind in ("registration", "alignment")
    ]
    assert settings[0] == settings[1]
    assert '"kind":"alignment"' in settings[0].model_dump_json()
    assert [record.message for record in caplog.records] == [
        "images.planted is an old name that still works; write images.synthetic_defects",
        "curate.verification.kind: registration is an old name that still works; write alignment",
    ]


def test_the_schema_has_new_names_only() -> None:
    schema = json.dumps([Images.model_json_schema(), CurateSettings.model_json_schema()])
    assert "synthetic_defects" in schema
    assert "alignment" in schema
    assert "planted" not in schema
    assert "registration" not in schema


def test_errors_have_the_name_that_was_written() -> None:
    with pytest.raises(ValidationError) as error:
        Images.model_validate_json('{"uri": "a", "planted": {"leaks": -1}}')
    assert error.value.errors()[0]["loc"] == ("planted", "leaks")
    both = {"uri": "a", "planted": {"leaks": 1}, "synthetic_defects": {"leaks": 2}}
    with pytest.raises(ValidationError, match="planted\n *Extra inputs"):
        Images.model_validate_json(json.dumps(both))
