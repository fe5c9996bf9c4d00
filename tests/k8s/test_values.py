from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from k8s import values
from k8s.values import dns_label, label_value


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (values.DnsLabel, ["a", "my-queue-2"], ["", "A", "-a", "a-", "a.b", "a" * 64]),
        (values.DnsName, ["a", "a.b-c.d"], ["a..b", ".a", "A", "a_b", "a" * 254]),
        (values.LabelValue, ["", "A.b_c-1"], ["-a", "a-", "a b", "a/b", "a" * 64]),
        (
            values.LabelKey,
            ["zone", "nvidia.com/gpu.product", "a/B"],
            ["", "/a", "a/", "A.com/x", "a/b/c", "a b", "x/" + "a" * 64],
        ),
        (values.Quantity, ["4", "500m", "1.5Gi", "64Gi"], ["64Q", "-1Gi", "lots", "", "1 Gi"]),
        (
            values.AcceleratorName,
            ["nvidia.com/gpu", "nvidia.com/mig-1g.5gb", "amd.com/gpu", "habana.ai/gaudi"],
            ["nvidia.com/gpux", "gpu", "nvidia/gpu"],
        ),
        (values.RdmaName, ["rdma/ib", "vpc.amazonaws.com/efa"], ["ib", "rdma/", "rdma/a b"]),
        (values.VariableName, ["AWS_REGION", "_A"], ["aws", "1A", "A-B", "PET_NNODES", ""]),
        (values.MountPath, ["/mnt/a", "/a"], ["mnt/a", "/", "/a/../b", "/a/", "/a:b", "/a//b"]),
    ],
)
def test_names_are_what_kubernetes_takes(kind: object, right: list[str], wrong: list[str]) -> None:
    adapter: TypeAdapter[str] = TypeAdapter(kind)
    assert [adapter.validate_python(text) for text in right] == right
    for text in wrong:
        with pytest.raises(ValidationError, match=r"is not (a|an|the) "):
            adapter.validate_python(text)


def test_a_dns_label_says_its_parts_where_it_can() -> None:
    assert dns_label("vits14", "0a1b2c3d", "pretrain", longest=40) == "vits14-0a1b2c3d-pretrain"


def test_what_is_changed_or_cut_off_stays_told_apart() -> None:
    names = [
        dns_label("Ä b", longest=40), dns_label("a b", longest=40), dns_label("9a"),
        dns_label("x" * 60, "a", longest=40), dns_label("x" * 60, "b", longest=40),
    ]  # fmt: skip
    assert len(set(names)) == 5
    adapter: TypeAdapter[str] = TypeAdapter(values.DnsLabel)
    for name in names:
        assert adapter.validate_python(name)[0].isalpha()
        assert len(name) <= 40
    assert dns_label("Ä b", longest=40) == names[0]


def test_a_label_value_is_one() -> None:
    assert label_value("run-1") == "run-1"
    adapter: TypeAdapter[str] = TypeAdapter(values.LabelValue)
    made = [label_value(text) for text in ("run 1", "run/1", "x" * 64, "x" * 65, "/", "ä")]
    assert [adapter.validate_python(text) for text in made] == made
    assert len(set(made)) == len(made)
