"""What the pods of a job say, brought into the log of the step that follows it."""

from __future__ import annotations

import logging
import re
from collections import deque
from contextlib import suppress

from components.runtime.progress import Reporter
from k8s.cluster import Cluster, ClusterRefused, ClusterUnreachable, Pod

logger = logging.getLogger(__name__)

LINES = 200
"""Looked back at every time; what comes faster is left out."""
KEPT = 15
"""Last lines that a failure shows."""
PROGRESS = re.compile(r"\] ([^·]+) · (\w+) (\d+)/(\d+)")
"""Task, unit, done and total in a line of progress."""


class JobLog:
    """The lines of the first node, each told once, and why pods do not run."""

    def __init__(self, cluster: Cluster, *, job: str, report: Reporter) -> None:
        self._cluster = cluster
        self._job = job
        self._report = report
        self._container = "node"
        self._label = "jobset.sigs.k8s.io/jobset-name"
        self._first = ("batch.kubernetes.io/job-completion-index", "0")
        self._last_time = ""
        self._num_at_last_time = 0
        self._last_lines: deque[str] = deque(maxlen=KEPT)
        self._troubles: dict[str, str] = {}

    def catch_up(self) -> None:
        """Tell what is new. Best effort: a log that cannot be read does not end a step."""
        try:
            pods = self._cluster.pods(self._label, self._job)
            self._tell_troubles(pods)
            first = self._first_node(pods)
            if first is not None:
                self._tell_lines(
                    self._cluster.log_lines(first.name, container=self._container, last=LINES)
                )
        except (ClusterUnreachable, ClusterRefused) as error:
            logger.debug("no log: %s", error)

    def has_pods(self) -> bool:
        """Whether pods of the job run or may run, be it that the job itself is gone.

        Raises:
            ClusterRefused, ClusterUnreachable: They cannot be listed.
        """
        return any(not pod.has_ended for pod in self._cluster.pods(self._label, self._job))

    def last_words(self) -> list[str]:
        """Last lines of the first node and last events of the job, for an error's message."""
        self.catch_up()
        words = [f"  {line}" for line in self._last_lines]
        with suppress(ClusterUnreachable, ClusterRefused):
            pods = self._cluster.pods(self._label, self._job)
            names = [self._job, *(pod.name for pod in pods[:4])]
            words += [f"  {event}" for event in self._cluster.events(names)]
        return words

    def _first_node(self, pods: list[Pod]) -> Pod | None:
        key, value = self._first
        return next((pod for pod in pods if pod.labels.get(key) == value), None)

    def _tell_troubles(self, pods: list[Pod]) -> None:
        for pod in pods:
            if pod.trouble and self._troubles.get(pod.name) != pod.trouble:
                logger.info("pod %s: %s", pod.name, pod.trouble)
            self._troubles[pod.name] = pod.trouble

    def _tell_lines(self, stamped: list[str]) -> None:
        """Log lines that came after the last one seen; progress goes to the step's own."""
        num_told = self._num_at_last_time
        for line in stamped:
            stamp, _, text = line.partition(" ")
            time = _sortable(stamp)
            if time < self._last_time:
                continue
            if time > self._last_time:
                self._last_time, self._num_at_last_time, num_told = time, 0, 0
            if num_told:  # lines of one time are told apart by their number
                num_told -= 1
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
