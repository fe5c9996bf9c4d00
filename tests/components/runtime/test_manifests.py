from __future__ import annotations

from pathlib import Path

import pytest

from components.runtime.manifests import (
    AuditReport,
    DatasetManifest,
    EvaluationReport,
    digest_of,
    digest_of_file,
    write_atomically,
)
from dinov2_core.errors import InputError


def dataset(**changes: object) -> DatasetManifest:
    values = {
        "uri": "/d", "sha256": "a", "config_sha256": "b", "num_images": 5, "num_kept": 3,
        "reasons": {"unreadable": 2}, "table_uri": "/t", "shards_uri": "/s", "num_shards": 1,
        "size_bytes": 10,
    }  # fmt: skip
    return DatasetManifest.model_validate(values | changes)


def test_a_manifest_reads_back_as_it_was_written(tmp_path: Path) -> None:
    dataset().write(tmp_path / "deep" / "dataset.json")
    assert DatasetManifest.read(tmp_path / "deep" / "dataset.json") == dataset()


def test_counts_add_up() -> None:
    assert dataset().counts_add_up()
    assert not dataset(num_kept=4).counts_add_up()


def test_a_data_set_has_one_name_for_each_number_and_a_headline() -> None:
    audit = AuditReport(
        exact_recall=1.0, near_recall=0.9, leak_recall=1.0, corrupt_recall=1.0, distinct_lost=0.0
    )
    assert dataset(audit=audit).numbers == {
        "num_images": 5.0, "num_kept": 3.0, "set_aside/unreadable": 2.0, "audit/exact_recall": 1.0,
        "audit/near_recall": 0.9, "audit/leak_recall": 1.0, "audit/corrupt_recall": 1.0,
        "audit/distinct_lost": 0.0,
    }  # fmt: skip
    assert dataset().headline == "3 of 5 kept; set aside: 2 unreadable"
    assert "90.0% of near copies" in dataset(audit=audit).headline
    assert dataset(num_kept=5, reasons={}).headline == "5 of 5 kept; set aside: none"


def test_scores_stand_beside_their_baselines() -> None:
    report = EvaluationReport(
        uri="/e", sha256="1", config_sha256="2", evaluation_sha256="3", pictures=(),
        metrics={"a/knn_top1": 0.8, "a/knn_top1_untrained": 0.5, "a/knn_top1_pixels": 0.79},
    )  # fmt: skip
    assert report.numbers == report.metrics
    assert report.headline == "a/knn_top1 80.0% (untrained 50.0%, raw pixels 79.0%)"
    unlabelled = report.model_copy(update={"metrics": {"collapse/mean_cosine": 0.966}})
    assert unlabelled.headline == "collapse/mean_cosine 0.966"


def test_a_missing_or_foreign_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; run the stage"):
        DatasetManifest.read(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(InputError, match="is not a DatasetManifest"):
        DatasetManifest.read(tmp_path / "other.json")


def test_digests_depend_on_content_alone(tmp_path: Path) -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1})
    assert digest_of({"a": 1}) != digest_of({"a": 2})
    (tmp_path / "x").write_bytes(b"abc")
    assert digest_of_file(tmp_path / "x") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_writing_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "f", "one")
    write_atomically(tmp_path / "f", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f").read_text() == "two"
