"""The registered teacher, loaded by a process that does not know this project."""

from __future__ import annotations

import base64
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.models import ModelSignature
from mlflow.tracking import MlflowClient
from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec
from PIL import Image
from safetensors.torch import save_file

import components.register.teacher_model as teacher_model
from dinov2_core.evaluation.preprocessing import (
    EncodedImage,
    Preprocessing,
    decode,
    normalise,
    resize_and_crop,
)
from dinov2_core.vit.transformer import VisionTransformer

MODEL_FILE = Path(teacher_model.__file__)
ARCHITECTURE: dict[str, Any] = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 4.0,
    "feed_forward": "mlp",
    "patch_size_pixels": 7,
    "num_register_tokens": 2,
    "num_channels": 3,
    "position_offset": 0.0,
    "position_antialias": True,
    "image_size_pixels": 28,
}
PREPROCESSING = {
    "size_pixels": 28,
    "mean": [0.485, 0.456, 0.406],
    "standard_deviation": [0.229, 0.224, 0.225],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Artifacts of a random teacher and the network they came from."""

    weights: Path
    config: Path
    backbone: VisionTransformer

    def loaded(self) -> teacher_model.TeacherModel:
        model = teacher_model.TeacherModel()
        artifacts = {"weights": str(self.weights), "config": str(self.config)}
        model.load_context(SimpleNamespace(artifacts=artifacts))
        return model


def export(folder: Path, **changes: Any) -> Export:
    architecture = {**ARCHITECTURE, **changes}
    backbone = VisionTransformer(**architecture, drop_path_rate=0.0, layer_scale=1.0).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    weights, config = folder / "teacher.safetensors", folder / "teacher.json"
    save_file({name: t.contiguous() for name, t in backbone.state_dict().items()}, weights)
    mean = PREPROCESSING["mean"][: architecture["num_channels"]]
    deviation = PREPROCESSING["standard_deviation"][: architecture["num_channels"]]
    preprocessing = {**PREPROCESSING, "mean": mean, "standard_deviation": deviation}
    config.write_text(json.dumps({"architecture": architecture, "preprocessing": preprocessing}))
    return Export(weights=weights, config=config, backbone=backbone)


def png(*, width: int, height: int, seed: int, mode: str = "RGB") -> bytes:
    channels = () if mode == "L" else (3,)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = [png(width=w, height=h, seed=i) for i, (w, h) in enumerate([(28, 28), (60, 40), (9, 12)])]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export(tmp_path_factory.mktemp("export"))


@pytest.fixture(scope="module")
def teacher(exported: Export) -> teacher_model.TeacherModel:
    return exported.loaded()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"feed_forward": "swiglu", "num_register_tokens": 0},
        {"position_offset": 0.1, "position_antialias": False},
        {"num_channels": 1},
    ],
    ids=["registers", "swiglu", "offset", "grey"],
)
@pytest.mark.parametrize("side", [(28, 28), (14, 42)], ids=["learned grid", "other grid"])
def test_cls_and_patches_equal_the_backbone(
    tmp_path: Path, changes: dict[str, Any], side: tuple[int, int]
) -> None:
    exported = export(tmp_path, **changes)
    channels = changes.get("num_channels", 3)
    images = torch.randn(2, channels, *side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = exported.backbone.features(images)
    found = exported.loaded().predict(None, images.numpy(), {"output": "cls+patch_mean"})
    expected = torch.cat([features.cls, features.patches.mean(dim=1)], dim=1).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_preprocessing_is_that_of_the_evaluation(
    teacher: teacher_model.TeacherModel, tmp_path: Path
) -> None:
    preprocessing = Preprocessing(
        size_pixels=28,
        mean=tuple(PREPROCESSING["mean"]),
        standard_deviation=tuple(PREPROCESSING["standard_deviation"]),
    )
    pixels = [
        resize_and_crop(
            decode(EncodedImage(name="x", content=content), num_channels=3),
            preprocessing=preprocessing,
        )
        for content in IMAGES
    ]
    images = normalise(np.stack(pixels), preprocessing=preprocessing).numpy()
    np.testing.assert_allclose(
        teacher.predict(None, IMAGES), teacher.predict(None, images), atol=1e-5
    )
    np.testing.assert_array_equal(
        teacher.predict(None, IMAGES), teacher.predict(None, np.stack(pixels))
    )


def test_batches_do_not_change_the_embeddings(teacher: teacher_model.TeacherModel) -> None:
    one_by_one = teacher.predict(None, IMAGES, {"batch_size": 1})
    np.testing.assert_allclose(teacher.predict(None, IMAGES), one_by_one, atol=1e-5)


def test_no_item_gives_no_row(teacher: teacher_model.TeacherModel) -> None:
    assert teacher.predict(None, []).shape == (0, 32)
    assert teacher.predict(None, [], {"output": "cls+patch_mean"}).shape == (0, 64)


def test_every_kind_of_input_gives_the_same_embeddings(
    teacher: teacher_model.TeacherModel, tmp_path: Path
) -> None:
    paths = []
    for index, content in enumerate(IMAGES):
        paths.append(tmp_path / f"{index}.png")
        paths[-1].write_bytes(content)
    pixels = [np.asarray(Image.open(path)) for path in paths]
    text = [base64.b64encode(content).decode() for content in IMAGES]
    wrapped = [base64.encodebytes(content).decode() for content in IMAGES]
    expected = teacher.predict(None, IMAGES)
    kinds: list[Any] = [
        paths,
        [str(path) for path in paths],
        text,
        wrapped,
        [bytearray(content) for content in IMAGES],
        pixels,
        tuple(IMAGES),
        pd.Series(IMAGES),
        pd.DataFrame({"image": text, "other": 0}),
        pd.DataFrame({"anything": IMAGES}),
        {"image": IMAGES},
        np.array(IMAGES, dtype=object),
        np.array(text),
        np.array(text)[:, None],
    ]
    for kind in kinds:
        np.testing.assert_array_equal(teacher.predict(None, kind), expected)
    np.testing.assert_array_equal(teacher.predict(None, IMAGES[0]), expected[:1])
    np.testing.assert_array_equal(teacher.predict(None, str(paths[0])), expected[:1])
    np.testing.assert_array_equal(teacher.predict(None, pixels[0][None]), expected[:1])


def test_grey_images_are_read_as_grey(tmp_path: Path) -> None:
    teacher = export(tmp_path, num_channels=1).loaded()
    content = png(width=28, height=28, seed=0, mode="L")
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    expected = teacher.predict(None, [content])
    np.testing.assert_array_equal(teacher.predict(None, pixels[None, :, :, None]), expected)
    np.testing.assert_array_equal(teacher.predict(None, [pixels[:, :, None]]), expected)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned() -> bytes:
    image = Image.open(io.BytesIO(png(width=40, height=28, seed=5)))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, "JPEG", exif=exif)


WIDE = np.random.default_rng(0).integers(0, 60_000, (30, 30))
COLOURS = np.random.default_rng(1).integers(0, 256, (30, 30, 4), np.uint8)
UNUSUAL = {
    "turned": turned(),
    "16 bits": encoded(Image.fromarray(WIDE.astype(np.uint16))),
    "32 bits": encoded(Image.fromarray(((WIDE - 5000) * 1000).astype(np.int32)), "TIFF"),
    "floats": encoded(Image.fromarray((WIDE - 5e3).astype(np.float32)), "TIFF"),
    "constant floats": encoded(Image.fromarray(np.zeros((30, 30), np.float32)), "TIFF"),
    "transparent": encoded(Image.fromarray(COLOURS)),
    "grey and transparent": encoded(Image.fromarray(COLOURS).convert("LA")),
    "palette": encoded(Image.fromarray(COLOURS[:, :, :3]).quantize(16)),
    "transparent palette": encoded(Image.fromarray(COLOURS).quantize(16), transparency=3),
    "black and white": encoded(Image.fromarray(COLOURS[:, :, 0]).convert("1")),
    "print": encoded(Image.fromarray(COLOURS[:, :, :3]).convert("CMYK"), "JPEG"),
}


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("name", sorted(UNUSUAL))
def test_unusual_images_are_decoded_as_in_training(name: str, num_channels: int) -> None:
    image = EncodedImage(name=name, content=UNUSUAL[name])
    expected = np.asarray(decode(image, num_channels=num_channels))
    found = np.asarray(teacher_model._image(UNUSUAL[name], 0, num_channels))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (IMAGES[0][:100], "item 1 .*100 bytes"),
        (b"", "item 1 .*0 bytes"),
        ("no/such/file.png", "item 1 .*neither a file that exists here nor base64"),
        ("x" * 5001, "item 1 .*neither a file"),
        (Path("no/such/file.png"), "item 1 .*No such file"),
        (17, "item 1 .*type int is neither"),
        (np.zeros((8, 8, 3), np.float32), "item 1 .*not uint8"),
        (encoded(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF"), "item 1 .*finite"),
    ],
)
def test_an_unreadable_item_is_named(
    teacher: teacher_model.TeacherModel, item: object, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        teacher.predict(None, [IMAGES[0], item], {"batch_size": 1})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (pd.DataFrame({"a": [1], "b": [2]}), "one column named 'image'"),
        (np.zeros((2, 3, 28, 27), np.float32), "multiples of 7"),
        (np.zeros((2, 1, 28, 28), np.float32), "C = 3"),
        (np.zeros((2, 28, 28, 3), np.int64), "array of type int64"),
        (np.zeros((28, 28, 3), np.uint8), "array of type uint8 and shape"),
        (3.5, "input of type float"),
    ],
)
def test_a_wrong_form_of_input_is_explained(
    teacher: teacher_model.TeacherModel, given: Any, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        teacher.predict(None, given)


@pytest.mark.parametrize("params", [{"batch_size": 0}, {"batch_size": "8"}, {"output": "patches"}])
def test_unknown_params_are_refused(
    teacher: teacher_model.TeacherModel, params: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="params"):
        teacher.predict(None, IMAGES, params)


def test_config_and_weights_must_fit(tmp_path: Path) -> None:
    exported = export(tmp_path)
    config = json.loads(exported.config.read_text())
    config["architecture"]["depth"] = 3
    config["architecture"]["image_size_pixels"] = 35
    exported.config.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing \['blocks\.2.*pos_embed \[1, 17, 32\] instead"):
        exported.loaded()
    config["preprocessing"]["size_pixels"] = 30
    exported.config.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"size_pixels 30 .* multiple of 7"):
        exported.loaded()
    del config["preprocessing"]
    exported.config.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"section preprocessing .* has None"):
        exported.loaded()
    config["architecture"]["heads"] = config["architecture"].pop("num_heads")
    exported.config.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"section architecture .*'heads'"):
        exported.loaded()


CONSUMER = """
import json, sys
from pathlib import Path
import numpy as np, pandas as pd
try:
    import dinov2_core
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the consumer can see the project")
import mlflow
from mlflow.pyfunc.scoring_server import invocations
from PIL import Image
mlflow.set_tracking_uri(sys.argv[1])
paths = json.loads(sys.argv[2])
images = [Path(path).read_bytes() for path in paths]
pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
model = mlflow.pyfunc.load_model("models:/teacher@champion")
mean, deviation = np.array(json.loads(sys.argv[3]), np.float32)
arrays = ((pixels / np.float32(255) - mean) / deviation).transpose(0, 3, 1, 2)
served = invocations(
    json.dumps({"dataframe_records": [{"image": text} for text in json.loads(sys.argv[4])]}),
    "application/json", model, model.metadata.get_input_schema())
assert served.status == 200, served
found = {
    "paths": model.predict(paths),
    "bytes": model.predict(images),
    "pixels": model.predict(pixels),
    "arrays": model.predict(arrays.astype(np.float32)),
    "frame": model.predict(pd.DataFrame({"image": images})),
    "batched": model.predict(images, params={"batch_size": 1}),
    "served": np.array(json.loads(served.response)["predictions"], np.float32),
}
wide = model.predict(images, params={"output": "cls+patch_mean"})
assert wide.shape == (len(images), 64), wide.shape
assert model.input_example["image"][0]
try:
    model.predict([paths[0], "missing.png"])
except ValueError as error:
    assert "item 1" in str(error), error
else:
    raise SystemExit("a missing file was accepted")
print(json.dumps({name: value.tolist() for name, value in found.items()}))
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[str]:
    before = mlflow.get_tracking_uri()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    yield uri
    mlflow.set_tracking_uri(before)


def register(exported: Export, *, artifacts: Path) -> None:
    experiment = mlflow.create_experiment("registering", artifact_location=artifacts.as_uri())
    params = [ParamSpec("batch_size", "long", 64), ParamSpec("output", "string", "cls")]
    with mlflow.start_run(experiment_id=experiment):
        mlflow.pyfunc.log_model(
            name="teacher",
            python_model=str(MODEL_FILE),
            artifacts={"weights": str(exported.weights), "config": str(exported.config)},
            signature=ModelSignature(
                outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1))]),
                params=ParamSchema(params),
            ),
            input_example=pd.DataFrame({"image": [base64.b64encode(IMAGES[0]).decode()]}),
            pip_requirements=["mlflow", "torch", "safetensors", "pillow", "numpy", "pandas"],
            registered_model_name="teacher",
        )
    MlflowClient().set_registered_model_alias("teacher", "champion", "1")


def test_a_process_without_the_project_loads_and_predicts(
    exported: Export, store: str, tmp_path: Path
) -> None:
    register(exported, artifacts=tmp_path / "artifacts")
    paths = []
    for index in range(3):
        paths.append(tmp_path / f"{index}.png")
        paths[-1].write_bytes(png(width=28, height=28, seed=index))
    normalisation = [PREPROCESSING["mean"], PREPROCESSING["standard_deviation"]]
    text = [base64.b64encode(path.read_bytes()).decode() for path in paths]
    site = [entry for entry in sys.path if entry.endswith("site-packages")]
    argument_lists = [[str(path) for path in paths], normalisation, text]
    done = subprocess.run(
        [sys.executable, "-S", "-c", CONSUMER, store, *map(json.dumps, argument_lists)],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(site),
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    preprocessing = Preprocessing(
        size_pixels=28,
        mean=tuple(PREPROCESSING["mean"]),
        standard_deviation=tuple(PREPROCESSING["standard_deviation"]),
    )
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    with torch.no_grad():
        expected = exported.backbone.features(normalise(pixels, preprocessing=preprocessing)).cls
    for name, embeddings in found.items():
        np.testing.assert_allclose(embeddings, expected.numpy(), atol=2e-5, err_msg=name)
