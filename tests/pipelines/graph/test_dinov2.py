from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.__main__ import main
from pipelines.graph.dinov2 import compile_pipeline
from pipelines.spec.pipeline_spec import STAGES, load_spec
from tests.golden.compiled import CONTEXT, GOLDEN, VOLUME, portable_spec
from tests.pipelines.specs import REPOSITORY


@pytest.fixture
def spec_path(tmp_path: Path) -> Path:
    return portable_spec(tmp_path)


def compiled(spec_path: Path, output: Path) -> str:
    compile_pipeline(load_spec(spec_path), context=CONTEXT, path=output, volume=VOLUME)
    return output.read_text()


def test_compilation_equals_the_golden_file(spec_path: Path, tmp_path: Path) -> None:
    text = compiled(spec_path, tmp_path / "pipeline.yaml")
    assert text == GOLDEN.read_text(), "if this is meant: python -m tests.golden.compiled"


def test_another_process_compiles_the_same_bytes_and_loads_no_heavy_library(
    spec_path: Path, tmp_path: Path
) -> None:
    here, there = tmp_path / "here.yaml", tmp_path / "there.yaml"
    assert main(["compile", str(spec_path), "-o", str(here)]) == 0
    code = (
        "import sys; from pipelines.__main__ import main; main(sys.argv[1:]); "
        "print(sorted({'torch', 'mlflow', 'boto3'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "compile", str(spec_path), "-o", str(there)],
        check=True,
        env={"PYTHONHASHSEED": "1", "PYTHONPATH": str(REPOSITORY), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert here.read_bytes() == there.read_bytes()


@pytest.fixture
def document(spec_path: Path, tmp_path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = next(
        yaml.safe_load_all(compiled(spec_path, tmp_path / "pipeline.yaml"))
    )
    return loaded


def test_the_five_stages_run_in_order(document: dict[str, Any]) -> None:
    tasks = document["root"]["dag"]["tasks"]
    needs = {name: set(task.get("dependentTasks", ())) for name, task in tasks.items()}
    assert needs == {
        "curate": set(),
        "pretrain": {"curate"},
        "finetune": {"curate", "pretrain"},
        "evaluate": {"curate", "finetune"},
        "register": {"curate", "finetune", "evaluate"},
    }


def test_settings_are_parameters_and_pass_through_unchanged(
    document: dict[str, Any], spec_path: Path
) -> None:
    parameters = document["root"]["inputDefinitions"]["parameters"]
    assert set(parameters) == {
        "context", "curate_config", "pretrain_config", "finetune_config", "evaluate_config",
        "register_config",
    }  # fmt: skip
    settings = json.loads(parameters["pretrain_config"]["defaultValue"])
    assert settings == json.loads(load_spec(spec_path).pretrain_stage.model_dump_json())


def test_kubeflow_keeps_its_name_based_cache_out(document: dict[str, Any]) -> None:
    for task in document["root"]["dag"]["tasks"].values():
        assert task["cachingOptions"] in ({}, {"enableCache": False})


HELP = """
import contextlib, io, json, runpy, sys
helps = {}
for module in sys.argv[1:]:
    output = io.StringIO()
    sys.argv[1:] = ["--help"]
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    helps[module] = output.getvalue()
print(json.dumps(helps))
"""


def test_flags_of_the_components_are_those_of_the_programs(document: dict[str, Any]) -> None:
    """Every flag that a component passes is one that its program knows, and no other is required."""
    executors = document["deploymentSpec"]["executors"]
    containers = [executor["container"] for executor in executors.values()]
    assert len(containers) == len(STAGES)
    modules = {container["command"][2] for container in containers}
    done = subprocess.run(
        [sys.executable, "-c", HELP, *modules], capture_output=True, text=True, check=True
    )
    helps = json.loads(done.stdout)
    for container in containers:
        module, arguments = container["command"][2], container["args"]
        flags = {arg for arg in arguments if arg.startswith("--")}
        usage = helps[module].partition("options:")[0]
        assert not [flag for flag in flags if flag not in usage], module
        required = re.findall(r"(?<!\[)(--[\w-]+)", usage)
        assert set(required) <= flags, module


PLACEMENT = """
image: registry/dinopipe@sha256:{digest}
resources: {{pretrain: {{num_gpus: 8}}}}
placement: {{launcher: {{kind: trainjob}}, queue: research, environment: {{NCCL_DEBUG: INFO}}}}
"""


def without_placement(path: Path) -> dict[str, Any]:
    """A compiled pipeline but for where its tasks run."""
    document: dict[str, Any] = next(yaml.safe_load_all(path.read_text()))
    document["root"]["inputDefinitions"]["parameters"].pop("context")
    for task in document["root"]["dag"]["tasks"].values():
        task.pop("retryPolicy", None)
        task["inputs"]["parameters"].pop("launcher", None)
    for executor in document["deploymentSpec"]["executors"].values():
        for key in ("image", "resources", "env"):
            executor["container"].pop(key, None)
    return document


def test_here_and_on_a_cluster_differ_in_placement_only(spec_path: Path, tmp_path: Path) -> None:
    spec_path.write_text(spec_path.read_text() + PLACEMENT.format(digest="a" * 64))
    spec, here, there = load_spec(spec_path), tmp_path / "here.yaml", tmp_path / "there.yaml"
    compile_pipeline(spec, context='{"workdir":"/w"}', path=here, on_cluster=False)
    compile_pipeline(spec, context=CONTEXT, path=there, volume=VOLUME)
    assert here.read_text() != there.read_text()
    assert without_placement(here) == without_placement(there)
    documents = list(yaml.safe_load_all(here.read_text()))
    assert len(documents) == 1, "here nothing is placed"
    executors = documents[0]["deploymentSpec"]["executors"].values()
    assert not [item for item in executors if "resources" in item["container"]]
    tasks = documents[0]["root"]["dag"]["tasks"]
    for stage in ("curate", "pretrain", "finetune"):
        launcher = tasks[stage]["inputs"]["parameters"]["launcher"]["runtimeValue"]["constant"]
        assert json.loads(launcher) == {"kind": "processes"}
    assert not [task for task in tasks.values() if "retryPolicy" in task]
