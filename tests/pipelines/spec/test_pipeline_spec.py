from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dinov2_core.config.training import HighResolution
from dinov2_core.errors import InputError
from pipelines.spec.pipeline_spec import STAGES, PipelineSpec, load_spec
from pipelines.spec.problems import SpecError
from tests.pipelines.specs import DEMO, REPOSITORY, changed, demo_values, write_spec


def problems(values: dict[str, Any], folder: Path) -> str:
    with pytest.raises(SpecError) as caught:
        load_spec(write_spec(values, folder / "spec.yaml"))
    return str(caught.value)


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in (REPOSITORY / "pipelines/specs").glob("*.yaml"))
)
def test_shipped_specs_are_right(name: str) -> None:
    assert isinstance(load_spec(REPOSITORY / f"pipelines/specs/{name}.yaml"), PipelineSpec)


def test_relative_paths_are_taken_from_the_specs_folder() -> None:
    spec = load_spec(DEMO)
    assert Path(spec.images.uri) == REPOSITORY / "pipelines/demo/fashion_mnist_train.parquet"
    assert Path(spec.evaluation_sets[0].test).is_absolute()


@pytest.mark.parametrize("source", ["timm:vit.tag", "models:/m@champion", "s3://b/w.pth"])
def test_starting_weights_elsewhere_stay_as_they_are(tmp_path: Path, source: str) -> None:
    values = demo_values()
    values["pretrain"]["initial_weights"] = source
    spec = load_spec(write_spec(values, tmp_path / "s.yaml"))
    assert spec.pretrain.initial_weights == source


def test_paths_of_embedders_are_rooted_too(tmp_path: Path) -> None:
    embedding = {"kind": "torchscript", "path": "sscd.pt"}
    values = changed(demo_values(), {"curate__embedding": embedding})
    spec = load_spec(write_spec(values, tmp_path / "s.yaml"))
    assert spec.curate.embedding.weights_file == str(tmp_path / "sscd.pt")
    assert spec.local_paths["curate.embedding.path"] == str(tmp_path / "sscd.pt")


def test_a_remote_prefix_stays_as_it_is(tmp_path: Path) -> None:
    values = changed(demo_values(), {"images": {"uri": "s3://bucket/pile"}})
    assert load_spec(write_spec(values, tmp_path / "s.yaml")).images.uri == "s3://bucket/pile"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"pretrain__learning__sed": 0},
            "pretrain.learning.sed: 0 belongs to an unknown key; did you mean seed?",
        ),
        ({"name": ...}, "name: is missing; this key is required"),
        ({"name": "Demo!"}, "name: 'Demo!' has characters that are not allowed here"),
        (
            {"pretrain__learning__optimization__num_steps": "1200"},
            "pretrain.learning.optimization.num_steps: '1200' is wrong: input should be a valid integer",
        ),
        (
            {"pretrain__learning__backbone__architecture": "vit_smal"},
            "pretrain.learning.backbone.architecture: 'vit_smal' is not known; expected",
        ),
        (
            {"pretrain__learning__backbone__architecture": "vit_smal"},
            "did you mean vit_small?",
        ),
        (
            {"pretrain__learning__crops__global_crop_size_pixels": 30},
            "crops.global_crop_size_pixels 30 is not divisible by backbone.patch_size_pixels 7; choose 28 or 35",
        ),
        (
            {"finetune__global_crop_size_pixels": 41},
            "finetune.global_crop_size_pixels: 41 is not divisible by pretrain.learning.backbone.patch_size_pixels 7; choose 35 or 42",
        ),
        (
            {"pretrain__topology__processes_per_node": 3},
            "learning.optimization.global_batch_size 128 is not divisible by 3 ranks",
        ),
        ({"registry__champion_alias": "v1"}, "registry.champion_alias: 'v1' is reserved by MLflow"),
        ({"registry__champion_alias": "latest"}, "registry.champion_alias: 'latest' is reserved"),
        (
            {"registry__gate__metric": "x/knn_top1"},
            "registry.gate.metric: 'x/knn_top1' is not measured; choose one of fashion_mnist/knn_top1",
        ),
        ({"evaluation_sets": []}, "images.synthetic_defects.leaks"),
        (
            {"evaluation_sets": [], "images": {"uri": "a", "planted": {"leaks": 3}}},
            "images.planted.leaks: 3 cannot be made without evaluation_sets",
        ),
        (
            {"images": {"uri": "a", "planted": {"leaks": -3}}},
            "images.planted.leaks: -3 is wrong: input should be greater than or equal to 0",
        ),
        (
            {"curate__verification": {"kind": "registration", "near_threshold": 2.0}},
            "curate.verification.near_threshold: 2.0 is wrong",
        ),
        (
            {"tracking": {"uri": "http://me:secret@host:5000"}},
            "holds a password or token; take it out and set MLFLOW_TRACKING_USERNAME",
        ),
        ({"tracking": {"uri": "https://token@host"}}, "holds a password or token"),
        (
            {"registry__challenger_alias": "champion"},
            "registry.challenger_alias: 'champion' is the",
        ),
        ({"evaluate__image_size_pixels": 30}, "evaluate.image_size_pixels: 30 is not divisible"),
        (
            {"pretrain__learning__crops__standard_deviation": [0.3, 0.0, 0.3]},
            "must be more than 0",
        ),
        (
            {"pretrain__learning__backbone__num_channels": 2},
            "backbone.num_channels: 2 is not known",
        ),
        ({"curate__embedding": {"kind": "pixel"}}, "curate.embedding: "),
        (
            {"pretrain__learning__optimization__warmup_steps": 5000},
            "warmup_steps 5000 is more than num_steps",
        ),
        ({"resources": {"pretrain": {"memory": "64Q"}}}, "resources.pretrain.memory: '64Q'"),
    ],
)
def test_every_mistake_has_its_path_and_its_remedy(
    changes: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    assert expected in problems(changed(demo_values(), changes), tmp_path)


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    changes = {"pretrain__learning__seed": -1, "finetune__num_steps": 0, "nam": "x"}
    text = problems(changed(demo_values(), changes), tmp_path)
    assert len(text.splitlines()) == 3


def test_a_missing_file_and_broken_yaml_are_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_spec(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("name: [")
    with pytest.raises(InputError, match="is not YAML"):
        load_spec(tmp_path / "broken.yaml")


def test_a_spec_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("- name: demo\n")
    with pytest.raises(SpecError, match="spec: .*should be an object"):
        load_spec(tmp_path / "spec.yaml")


def test_numbers_are_written_as_people_write_them(tmp_path: Path) -> None:
    values = changed(demo_values(), {"pretrain__learning__optimization__base_learning_rate": 0.5})
    path = write_spec(values, tmp_path / "spec.yaml")
    path.write_text(path.read_text().replace("base_learning_rate: 0.5", "base_learning_rate: 6e-3"))
    assert load_spec(path).pretrain.learning.optimization.base_learning_rate == 0.006


def test_every_stage_has_its_resources_and_its_place_in_the_order() -> None:
    spec = load_spec(DEMO)
    assert list(STAGES) == ["curate", "pretrain", "finetune", "evaluate", "register"]
    named = {STAGES[name].resources: spec.resources.of(name) for name in STAGES}
    assert named == dict(spec.resources)


def test_the_secret_of_a_tracking_uri_is_not_repeated(tmp_path: Path) -> None:
    values = changed(demo_values(), {"tracking": {"uri": "http://me:hunter2@host:5000"}})
    assert "hunter2" not in problems(values, tmp_path)


def test_high_resolution_compresses_every_schedule() -> None:
    spec = load_spec(DEMO)
    before, after = spec.pretrain.learning, spec.finetune_stage.learning
    ratio = spec.finetune.num_steps / before.optimization.num_steps
    assert after.optimization.num_steps == spec.finetune.num_steps
    assert after.optimization.warmup_steps == round(before.optimization.warmup_steps * ratio)
    assert after.teacher.temperature_warmup_steps == round(
        before.teacher.temperature_warmup_steps * ratio
    )
    assert after.optimization.base_learning_rate == pytest.approx(
        before.optimization.base_learning_rate * spec.finetune.learning_rate_factor
    )
    assert after.crops.global_crop_size_pixels == 35
    assert after.crops.global_crop_scale == before.crops.global_crop_scale


def test_high_resolution_checks_its_crops_again() -> None:
    learning = load_spec(DEMO).pretrain.learning
    with pytest.raises(ValueError, match="not divisible"):
        learning.at_high_resolution(HighResolution(global_crop_size_pixels=41, num_steps=10))


def test_the_first_evaluation_set_gives_a_probe_from_its_train_images() -> None:
    spec = load_spec(DEMO)
    for stage in (spec.pretrain_stage, spec.finetune_stage):
        assert stage.probe is not None
        assert stage.probe.train == spec.evaluation_sets[0].train
        assert not stage.probe.test
        assert stage.probe.every_steps == stage.learning.checkpoints.every_steps
    assert spec.model_copy(update={"evaluation_sets": ()}).pretrain_stage.probe is None


def test_a_probe_of_its_own_is_kept_and_taken_from_the_folder_of_the_spec(tmp_path: Path) -> None:
    values = demo_values()
    values["pretrain"]["probe"] = {"train": "labelled", "every_steps": 7}
    spec = load_spec(write_spec(values, tmp_path / "spec.yaml"))
    assert spec.pretrain_stage.probe == spec.finetune_stage.probe == spec.pretrain.probe
    assert spec.pretrain.probe is not None
    assert spec.pretrain.probe.train == str((tmp_path / "labelled").resolve())
    assert not spec.pretrain.probe.test
