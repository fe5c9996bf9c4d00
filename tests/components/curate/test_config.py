from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from components.curate.config import CurateSettings

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
