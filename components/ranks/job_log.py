"""The log and the problems of a job's pods, copied into the log of the step that follows it."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from components.runtime.progress import Reporter
from dinov2_core.errors import ClusterRefused, ClusterUnavailable
from k8s.cluster import Cluster, Pod

logger = logging.getLogger(__name__)

CONTAINER = "node"
JOB_LABEL = "jobset.sigs.k8s.io/jobset-name"
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
LINES = 200
"""Read at a time; what comes faster is left out."""
KEPT = 15
"""Last lines that a failure shows."""
PROGRESS = re.compile(r"\] ([^·]+) · (\w+) (\d+)/(\d+)")
"""Task, unit, done and total in a line of progress."""


class JobLog:
    """The lines of the first node, each logged once, and why pods do not run."""

    def __init__(self, cluster: Cluster, *, job: str, report: Reporter) -> None:
        self._cluster = cluster
        self._job = job
        self._report = report
        self._last_time = ""
        self._num_at_last_time = 0
        self._last_lines: deque[str] = deque(maxlen=KEPT)
        self._problems: dict[str, str] = {}
        self._refused: set[str] = set()

    def catch_up(self) -> None:
        """Log what is new."""
        with self._best_effort("the pods"):
            pods = self._pods()
            self._log_problems(pods)
            first = next((pod for pod in pods if pod.labels.get(INDEX_LABEL) == "0"), None)
            if first is not None:
                with self._best_effort("the log"):
                    self._log_new_lines(
                        self._cluster.log_lines(first.name, container=CONTAINER, last=LINES)
                    )

    def has_pods(self) -> bool:
        """Whether pods of the job run or may run, even if the job itself is gone.

        Raises:
            ClusterRefused, ClusterUnavailable: They cannot be listed.
        """
        return any(not pod.has_ended for pod in self._pods())

    def tail(self) -> list[str]:
        """Last lines of the first node and last events of the job, for an error's message."""
        self.catch_up()
        lines = [f"  {line}" for line in self._last_lines]
        with self._best_effort("the events"):
            names = [self._job, *(pod.name for pod in self._pods()[:4])]
            lines += [f"  {event}" for event in self._cluster.events(names)]
        return lines

    def _pods(self) -> list[Pod]:
        return self._cluster.pods(JOB_LABEL, self._job)

    @contextmanager
    def _best_effort(self, what: str) -> Iterator[None]:
        """Let nothing that cannot be read end a step; a refusal is a warning, once."""
        try:
            yield
        except ClusterUnavailable as error:
            logger.debug("cannot read %s: %s", what, error)
        except ClusterRefused as error:
            if what not in self._refused:
                self._refused.add(what)
                logger.warning("%s of %s cannot be shown: %s", what, self._job, error)

    def _log_problems(self, pods: list[Pod]) -> None:
        for pod in pods:
            if pod.problem and self._problems.get(pod.name) != pod.problem:
                logger.info("pod %s: %s", pod.name, pod.problem)
            self._problems[pod.name] = pod.problem

    def _log_new_lines(self, stamped: list[str]) -> None:
        """Log lines that came after the last one; progress goes to the step's own."""
        num_known = self._num_at_last_time
        for line in stamped:
            stamp, _, text = line.partition(" ")
            time = _sortable(stamp)
            if time < self._last_time:
                continue
            if time > self._last_time:
                self._last_time, self._num_at_last_time, num_known = time, 0, 0
            if num_known:  # lines of one time are told apart by their number
                num_known -= 1
                continue
            self._num_at_last_time += 1
            found = PROGRESS.search(text)
            if found is not None:
                task, unit, done, total = found.groups()
                self._report(task, int(done), int(total), unit=unit)
            else:
                self._last_lines.append(text)
                logger.info("%s", text)


def _sortable(time: str) -> str:
    """A time of RFC 3339 whose fraction has all nine digits, so that text order is time order."""
    whole, _, fraction = time.removesuffix("Z").partition(".")
    return f"{whole}.{fraction:0<9}"
