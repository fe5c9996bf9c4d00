"""Trainings as an example of ranks: the fixtures of that stage's tests."""

from tests.components.train.conftest import context, dataset, flags, stage, store

__all__ = ["context", "dataset", "flags", "stage", "store"]
