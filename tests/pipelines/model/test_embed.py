from __future__ import annotations

from pathlib import Path

import pytest

from dinov2_core.errors import TrackingUnavailable
from pipelines.model.embed import embed_images


def embed(images: str, tmp_path: Path, tracking_uri: str = "") -> None:
    embed_images(
        images,
        model_uri="models:/m@champion",
        output=tmp_path / "out.parquet",
        tracking_uri=tracking_uri,
        batch_size=4,
    )


def test_missing_images_are_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        embed(str(tmp_path / "none"), tmp_path)


def test_without_a_store_the_choice_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.png").write_bytes(b"")
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "mlflow.db").write_bytes(b"")
    with pytest.raises(ValueError, match="set --tracking-uri, for example .*runs/a/mlflow.db"):
        embed(str(tmp_path / "x.png"), tmp_path)


def test_an_unreachable_store_is_told(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(TrackingUnavailable, match="does not answer"):
        embed(str(tmp_path / "x.png"), tmp_path, tracking_uri="http://127.0.0.1:9")
