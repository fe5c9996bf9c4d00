from __future__ import annotations

import pytest

from components.runtime.context import RunContext
from components.runtime.tracking import Tracker, join_injected_run
from dinov2_core.errors import InputError


def test_stages_are_nested_below_one_parent_and_continue_their_own_run(tracker: Tracker) -> None:
    first = tracker.stage("pretrain", key="k1")
    first.end("FAILED")
    again = Tracker(tracker.context).stage("pretrain", key="k1")
    other = tracker.stage("pretrain", key="k2")
    assert again.run_id == first.run_id != other.run_id
    run = tracker.client.get_run(first.run_id)
    assert run.info.status == "RUNNING"
    assert run.data.tags["mlflow.parentRunId"] == tracker.parent()


def test_the_parent_knows_versions_and_machine(tracker: Tracker) -> None:
    tags = tracker.client.get_run(tracker.parent()).data.tags
    assert tags["version.torch"].startswith("2.")
    assert int(tags["system.cpus"]) >= 1
    assert tags["dinopipe.run_id"] == tracker.context.run_id


def test_numbers_of_a_step_arrive_together(tracker: Tracker) -> None:
    run = tracker.stage("pretrain", key="rows")
    for step in range(3):
        run.log_metrics({"loss": 1 / (step + 1), "lr": 0.1}, step=step)
    history = tracker.client.get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert run.last_step("loss") == 2
    assert run.last_step("never") == -1


def test_results_of_a_stage_leave_a_history_of_steps_as_it_is(tracker: Tracker) -> None:
    run = tracker.stage("pretrain", key="results")
    for step in range(3):
        run.log_metrics({"loss/total": float(step)}, step=step)
    for _ in range(2):  # a reused stage logs them again
        run.log_results({"loss/total": 2.0, "images_per_second": 7.0})
    for name, steps in (("loss/total", [0, 1, 2]), ("images_per_second", [0])):
        history = tracker.client.get_metric_history(run.run_id, name)
        assert [point.step for point in history] == steps
    assert tracker.client.get_run(run.run_id).data.metrics["loss/total"] == 2.0


def test_settings_are_logged_once_with_dotted_names(tracker: Tracker) -> None:
    run = tracker.stage("curate", key="params")
    run.log_params({"a": {"b": 1}, "c": "x"})
    run.log_params({"a": {"b": 2}})  # a restart with another value must not raise
    assert tracker.client.get_run(run.run_id).data.params == {"a.b": "1", "c": "x"}


def test_the_end_of_a_pipeline_closes_stages_that_were_killed(context: RunContext) -> None:
    tracker = Tracker(context.model_copy(update={"run_id": f"{context.run_id}-killed"}))
    ended, killed = (tracker.stage(stage, key="end") for stage in ("curate", "pretrain"))
    ended.end("FINISHED")
    parent = tracker.end_parent("KILLED")
    statuses = {
        run_id: tracker.client.get_run(run_id).info.status
        for run_id in (ended.run_id, killed.run_id, parent)
    }
    assert statuses == {ended.run_id: "FINISHED", killed.run_id: "KILLED", parent: "KILLED"}


def test_a_dataset_is_logged_by_reference(tracker: Tracker) -> None:
    run = tracker.stage("curate", key="dataset")
    run.log_dataset(name="pile", uri="/data/shards", digest="d" * 64, context="pretraining")
    inputs = tracker.client.get_run(run.run_id).inputs.dataset_inputs
    assert inputs[0].dataset.name == "pile"
    assert inputs[0].dataset.digest == "d" * 32
    assert "/data/shards" in inputs[0].dataset.source


class TestJoining:
    """Kubeflow's MLflow plugin opens a parent run and one nested below it for each task."""

    @pytest.fixture
    def injected(self, tracker: Tracker) -> dict[str, str]:
        """The variables of a task's container, after the plugin has opened its runs."""
        client = tracker.client
        experiment = client.create_experiment(f"plugin-{tracker.context.run_id}")
        parent = client.create_run(experiment, run_name="pipeline run")
        task = client.create_run(
            experiment, run_name="pretrain", tags={"mlflow.parentRunId": parent.info.run_id}
        )
        return {
            "MLFLOW_TRACKING_URI": tracker.context.resolved_tracking_uri,
            "MLFLOW_EXPERIMENT_ID": experiment,
            "MLFLOW_RUN_ID": task.info.run_id,
        }

    def test_the_stage_logs_to_the_injected_run_and_opens_none(
        self, context: RunContext, injected: dict[str, str]
    ) -> None:
        tracker = Tracker(join_injected_run(context, injected))
        experiments = len(tracker.client.search_experiments())
        run = tracker.stage("pretrain", key="k1")
        run.log_params({"a": {"b": 1}})
        run.log_metrics({"loss": 0.5}, step=3)
        run.log_text("note.txt", "text")
        assert run.run_id == injected["MLFLOW_RUN_ID"]
        assert run.experiment_id == injected["MLFLOW_EXPERIMENT_ID"]
        runs = tracker.client.search_runs([injected["MLFLOW_EXPERIMENT_ID"]])
        assert len(runs) == 2
        assert len(tracker.client.search_experiments()) == experiments
        (mine,) = [item for item in runs if item.info.run_id == run.run_id]
        assert mine.data.params == {"a.b": "1"}
        assert mine.data.metrics == {"loss": 0.5}
        assert mine.data.tags["dinopipe.stage"] == "pretrain"
        assert mine.data.tags["dinopipe.run_id"] == context.run_id
        assert mine.data.tags["version.torch"].startswith("2.")
        assert [item.path for item in tracker.client.list_artifacts(run.run_id)] == ["note.txt"]
        own = tracker.client.search_runs(
            [Tracker(context).experiment_id], f"tags.`dinopipe.run_id` = '{context.run_id}'"
        )
        assert own == []

    def test_the_plugin_closes_what_it_opened(
        self, context: RunContext, injected: dict[str, str]
    ) -> None:
        tracker = Tracker(join_injected_run(context, injected))
        run = tracker.stage("pretrain", key="k1")
        for status in ("FAILED", "FINISHED"):
            run.end(status)
            seen = tracker.client.get_run(run.run_id)
            assert seen.info.status == "RUNNING"
            assert seen.data.tags["dinopipe.status"] == status

    def test_a_retried_task_continues_its_run(
        self, context: RunContext, injected: dict[str, str]
    ) -> None:
        tracker = Tracker(join_injected_run(context, injected))
        tracker.stage("pretrain", key="k1").log_metrics({"loss": 1.0}, step=7)
        again = Tracker(tracker.context).stage("pretrain", key="k1")
        assert again.last_step("loss") == 7

    def test_training_pods_that_see_no_variables_open_the_same_run(
        self, context: RunContext, injected: dict[str, str]
    ) -> None:
        """Their context comes by file; it names the run and its server."""
        joined = join_injected_run(context, injected)
        copy = RunContext.model_validate_json(joined.model_dump_json())
        run = Tracker(copy).open(injected["MLFLOW_RUN_ID"])
        run.log_metrics({"loss": 2.0})
        assert run.is_joined

    def test_without_the_plugin_the_runs_are_our_own(self, context: RunContext) -> None:
        for environment in ({}, {"MLFLOW_RUN_ID": "x"}, {"MLFLOW_TRACKING_URI": "http://m"}):
            assert join_injected_run(context, dict(environment)) == context
        run = Tracker(context).stage("pretrain", key="own")
        assert not run.is_joined
        run.end("FINISHED")
        assert run.client.get_run(run.run_id).info.status == "FINISHED"

    def test_a_password_in_the_address_moves_to_where_mlflow_reads_it(
        self, context: RunContext
    ) -> None:
        environment = {
            "MLFLOW_RUN_ID": "r",
            "MLFLOW_TRACKING_URI": "https://me:geh%40im@mlflow.example/x",
        }
        joined = join_injected_run(context, environment)
        assert joined.tracking_uri == "https://mlflow.example/x"
        assert environment["MLFLOW_TRACKING_USERNAME"] == "me"
        assert environment["MLFLOW_TRACKING_PASSWORD"] == "geh@im"

    def test_a_run_that_does_not_exist_is_an_input_error(
        self, context: RunContext, injected: dict[str, str]
    ) -> None:
        injected["MLFLOW_RUN_ID"] = "0" * 32
        tracker = Tracker(join_injected_run(context, injected))
        with pytest.raises(InputError, match="MLFLOW_RUN_ID 0+ is not in sqlite"):
            tracker.stage("pretrain", key="k1")
