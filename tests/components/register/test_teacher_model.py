"""The registered teacher: what it takes, and how a process without this project runs it."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import components.register.teacher_model as teacher_model
from components.register.bundle import write_model_code
from dinov2_core.errors import InputError
from dinov2_core.evaluation.labelled_set import EncodedImage
from dinov2_core.evaluation.preprocessing import (
    Preprocessing,
    decode,
    normalise,
    resize_and_crop,
)
from dinov2_core.models import build_backbone
from dinov2_core.vit.transformer import VisionTransformer
from tests.components.runtime.test_registry import registered
from tests.components.teachers import BACKBONE, IMAGE_SIZE

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
    preprocessing: Preprocessing

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
    return Export(
        weights=weights,
        config=config,
        backbone=backbone,
        preprocessing=Preprocessing(
            size_pixels=PREPROCESSING["size_pixels"],
            mean=tuple(mean),
            standard_deviation=tuple(deviation),
        ),
    )


@torch.no_grad()
def expected_of(exported: Export, images: Tensor) -> np.ndarray:
    """What the core's own network gives: cls beside the mean of the patches."""
    features = exported.backbone.features(images)
    return torch.cat([features.cls, features.patches.mean(dim=1)], dim=1).numpy()


def preprocessed(exported: Export, contents: list[bytes]) -> Tensor:
    """As the evaluation prepares image files."""
    preprocessing = exported.preprocessing
    pixels = [
        resize_and_crop(
            decode(EncodedImage(name="x", content=content), num_channels=len(preprocessing.mean)),
            preprocessing=preprocessing,
        )
        for content in contents
    ]
    return normalise(np.stack(pixels), preprocessing=preprocessing)


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


def test_preprocessing_is_that_of_the_evaluation(
    exported: Export, teacher: teacher_model.TeacherModel
) -> None:
    expected = expected_of(exported, preprocessed(exported, IMAGES))
    found = teacher.predict(None, IMAGES, {"output": "cls+patch_mean"})
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(teacher.predict(None, IMAGES), expected[:, :32])


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


@pytest.fixture(scope="module")
def grey_or_colour(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[int, teacher_model.TeacherModel]:
    folders = {number: tmp_path_factory.mktemp(f"channels{number}") for number in (1, 3)}
    return {number: export(path, num_channels=number).loaded() for number, path in folders.items()}


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("name", sorted(UNUSUAL))
def test_unusual_images_are_decoded_as_in_training(
    name: str, num_channels: int, grey_or_colour: dict[int, teacher_model.TeacherModel]
) -> None:
    image = EncodedImage(name=name, content=UNUSUAL[name])
    expected = np.asarray(decode(image, num_channels=num_channels))
    found = grey_or_colour[num_channels].predict(None, [UNUSUAL[name]])
    wanted = grey_or_colour[num_channels].predict(
        None, expected.reshape(1, *expected.shape[:2], num_channels)
    )
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (IMAGES[0][:100], "item 1 .*100 bytes"),
        (b"", "item 1 .*0 bytes"),
        ("no/such/file.png", "item 1 .*neither a file that exists here nor base64"),
        ("x" * 5001, "item 1 .*neither a file"),
        (Path("no/such/file.png"), "item 1 .*No such file"),
        (17, "item 1 .*type int is none of the known forms"),
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 3}, r"lacks .* parameters: blocks\.2\.attn"),
        ({"image_size_pixels": 35}, r"pos_embed has shape \[1, 17, 32\] .* but \[1, 26, 32\]"),
        ({"num_heads": 5}, "embed_dim 32 is not divisible by num_heads 5"),
        ({"num_channels": 1}, r"patch_embed\.proj\.weight has shape \[32, 3, 7, 7\]"),
        ({"heads": 2}, "unexpected keyword argument 'heads'"),
    ],
)
def test_config_and_weights_must_fit(tmp_path: Path, change: dict[str, int], message: str) -> None:
    exported = export(tmp_path)
    config = json.loads(exported.config.read_text())
    exported.config.write_text(
        json.dumps(config | {"architecture": config["architecture"] | change})
    )
    with pytest.raises(InputError, match=message):
        exported.loaded()


def test_a_config_without_a_section_or_with_another_size_is_refused(tmp_path: Path) -> None:
    exported = export(tmp_path)
    config = json.loads(exported.config.read_text())
    config["preprocessing"]["size_pixels"] = 30
    exported.config.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"size_pixels 30 .* patch_size_pixels 7"):
        exported.loaded()
    del config["preprocessing"]
    exported.config.write_text(json.dumps(config))
    with pytest.raises(InputError, match="'preprocessing'"):
        exported.loaded()


@pytest.mark.parametrize("variable", [*teacher_model.SERVING_VARIABLES, "uvicorn"])
def test_a_server_opens_no_paths_that_a_client_names(
    teacher: teacher_model.TeacherModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
) -> None:
    path = tmp_path / "0.png"
    path.write_bytes(IMAGES[0])
    expected = teacher.predict(None, [str(path)])
    if variable == "uvicorn":
        monkeypatch.setitem(sys.modules, variable, SimpleNamespace())
    else:
        monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match="not base64 text, and a server opens no paths unless"):
        teacher.predict(None, [str(path)])
    text = base64.b64encode(IMAGES[0]).decode()
    np.testing.assert_array_equal(teacher.predict(None, [text]), expected)
    np.testing.assert_array_equal(teacher.predict(None, [path]), expected)
    monkeypatch.setenv(teacher_model.ALLOWS_PATHS, "1")
    np.testing.assert_array_equal(teacher.predict(None, [str(path)]), expected)


def test_paths_can_be_closed_everywhere(
    teacher: teacher_model.TeacherModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "0.png"
    path.write_bytes(IMAGES[0])
    monkeypatch.setenv(teacher_model.ALLOWS_PATHS, "0")
    with pytest.raises(ValueError, match="item 0"):
        teacher.predict(None, [str(path)])


@pytest.mark.parametrize(
    ("variable", "limit", "given", "message"),
    [
        ("IMAGES", 2, IMAGES, "3 images are more than the 2 of one request"),
        ("BYTES", len(IMAGES[0]) + 9, IMAGES, "item 1 .*more than the .* bytes of one request"),
        ("PIXELS", 28 * 28, IMAGES, "item 1 .*60 x 40 is more than max_pixels 784"),
        ("IMAGES", 1, np.zeros((1, 3, 28, 56), np.float32), "more than the 784 pixels of one"),
    ],
)
def test_a_server_bounds_what_one_request_holds(
    teacher: teacher_model.TeacherModel,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    limit: int,
    given: Any,
    message: str,
) -> None:
    monkeypatch.setenv(f"DINOPIPE_MODEL_MAX_{variable}", str(limit))
    assert len(teacher.predict(None, given)) == len(given)
    monkeypatch.setenv(teacher_model.SERVING_VARIABLES[0], "true")
    with pytest.raises(MlflowException, match=message) as caught:
        teacher.predict(None, given)
    assert caught.value.get_http_status_code() == 400


def test_a_clients_error_has_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    teacher = export(tmp_path).loaded()
    del teacher.embedder.network.norm
    with pytest.raises(AttributeError):
        teacher.predict(None, IMAGES)
    monkeypatch.setenv(teacher_model.SERVING_VARIABLES[0], "true")
    with pytest.raises(MlflowException, match="the server's log has the reason") as caught:
        teacher.predict(None, IMAGES)
    assert caught.value.get_http_status_code() == 500
    assert "AttributeError" in caplog.text


COMBINATIONS = list(itertools.product(("mlp", "swiglu"), (0, 4), (1, 3)))

CONSUMER = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("dinov2_core", "components", "pipelines", "k8s"):
            raise AssertionError(f"the consumer imports {name}")

sys.meta_path.insert(0, Refuse())
import base64, io, json, resource, threading, urllib.error, urllib.request
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
import mlflow, numpy as np, pandas as pd
from PIL import Image

store, code, folder = sys.argv[1:]
folder = Path(folder)
mlflow.set_tracking_uri(store)
model = mlflow.pyfunc.load_model("models:/consumed@champion")
paths = [str(path) for path in sorted(folder.glob("*.png"))]
images = [Path(path).read_bytes() for path in paths]
texts = [base64.b64encode(content).decode() for content in images]
found = {
    "paths": model.predict(paths),
    "bytes": model.predict(images),
    "base64": model.predict(texts),
    "pixels": model.predict(np.stack([np.asarray(Image.open(path)) for path in paths])),
    "frame": model.predict(pd.DataFrame({"image": images})),
}
assert model.predict(images, params={"output": "cls+patch_mean"}).shape == (len(images), 64)
assert model.input_example["image"][0]
try:
    model.predict([paths[0], "missing.png"])
except ValueError as error:
    assert "item 1" in str(error), error
else:
    raise SystemExit("a missing file was accepted")

sys.path.insert(0, code)
spec = spec_from_file_location("other_version", code + "/teacher_model.py")
module = sys.modules[spec.name] = module_from_spec(spec)
spec.loader.exec_module(module)
for kind in sorted(folder.glob("kind*")):
    names = {"weights": str(kind / "teacher.safetensors"), "config": str(kind / "teacher.json")}
    teacher = module.TeacherModel()
    teacher.load_context(SimpleNamespace(artifacts=names))
    arrays = np.load(kind / "arrays.npz")
    wide = {"output": "cls+patch_mean"}
    found[kind.name] = teacher.predict(None, images, wide)
    for side in arrays.files:
        found[kind.name + side] = teacher.predict(None, arrays[side], wide)
assert "dinov2_core" not in sys.modules

big = io.BytesIO()
Image.new("RGB", (3000, 3000)).save(big, "PNG")  # 36 MB in memory
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model.predict([big.getvalue()] * 8)
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert grown < 200_000, f"8 images took {grown} KiB"

import uvicorn
from mlflow.pyfunc.scoring_server import init
server = uvicorn.Server(uvicorn.Config(init(model), port=0, log_level="error"))
threading.Thread(target=server.run, daemon=True).start()
while not server.started:
    pass
port = server.servers[0].sockets[0].getsockname()[1]

def served(items):
    body = json.dumps({"dataframe_records": [{"image": item} for item in items]}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/invocations", body)
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()

status, body = served(texts)
assert status == 200, body
found["served"] = np.array(json.loads(body)["predictions"], np.float32)
for wrong in ([paths[0]], ["/etc/passwd"], ["/dev/zero"], texts * 30):
    status, body = served(wrong)
    assert status == 400, (status, body)
    assert "Traceback" not in body and "stack_trace" not in body, body
np.savez(folder / "found.npz", **found)
"""


def test_a_process_without_the_project_loads_predicts_and_serves(
    shared_workdir: Path, tmp_path: Path, photographs: list[bytes]
) -> None:
    registered(
        shared_workdir,
        tmp_path / "registered",
        photographs,
        seed=7,
        value=9.0,
        model_name="consumed",
    )
    contents = [png(width=28, height=28, seed=index) for index in range(3)]
    for index, content in enumerate(contents):
        (tmp_path / f"{index}.png").write_bytes(content)
    kinds = {}
    for index, (feed_forward, registers, channels) in enumerate(COMBINATIONS):
        folder = tmp_path / f"kind{index}"
        folder.mkdir()
        kinds[folder.name] = export(
            folder,
            feed_forward=feed_forward,
            num_register_tokens=registers,
            num_channels=channels,
            position_offset=0.1 * (index % 2),
            position_antialias=index % 2 == 0,
        )
        arrays = {
            name: torch.randn(2, channels, *side).numpy()
            for name, side in {"other": (14, 42), "larger": (56, 56)}.items()
        }
        np.savez(folder / "arrays.npz", **arrays)
    code = write_model_code(tmp_path / "code").model.parent
    store = f"sqlite:///{shared_workdir / 'mlflow.db'}"
    site = [entry for entry in sys.path if entry.endswith("site-packages")]
    done = subprocess.run(
        [sys.executable, "-S", "-c", CONSUMER, store, str(code), str(tmp_path)],
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
    found = dict(np.load(tmp_path / "found.npz"))
    for name, exported in kinds.items():
        expected = expected_of(exported, preprocessed(exported, contents))
        np.testing.assert_allclose(found.pop(name), expected, atol=1e-6, rtol=1e-6)
        for side, images in np.load(tmp_path / name / "arrays.npz").items():
            expected = expected_of(exported, torch.from_numpy(images))
            np.testing.assert_allclose(found.pop(name + side), expected, atol=1e-6, rtol=1e-6)
    torch.manual_seed(7)  # as the registered teacher was made
    teacher = build_backbone(BACKBONE, image_size_pixels=IMAGE_SIZE).eval()
    preprocessing = Preprocessing(
        size_pixels=IMAGE_SIZE, mean=(0.5,) * 3, standard_deviation=(0.5,) * 3
    )
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(content))) for content in contents])
    with torch.no_grad():
        cls = teacher.features(normalise(pixels, preprocessing=preprocessing)).cls.numpy()
    assert set(found) == {"paths", "bytes", "base64", "pixels", "frame", "served"}
    for name, embeddings in found.items():
        np.testing.assert_allclose(embeddings, cls, atol=1e-6, rtol=1e-6, err_msg=name)
