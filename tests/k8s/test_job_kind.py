from k8s.job_kind import JobKind
from tests.golden.manifests import manifests


def test_a_kind_is_named_as_its_manifests_name_it() -> None:
    kind = JobKind(group="trainer.kubeflow.org", version="v1alpha1", plural="trainjobs")
    assert kind.api_version == manifests()["trainjob_bare"]["apiVersion"]
