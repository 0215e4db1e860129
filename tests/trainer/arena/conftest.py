"""Small plans, and a cache of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog
import torch

from esperml.trainer.arena.twins import Plan

torch.set_num_threads(1)


@pytest.fixture
def short_plan() -> Plan:
    """Long enough for a graft to be planted and settled."""
    return Plan(
        steps=120, report_every=10, warmup_steps=20, decision_interval_steps=20, blend_steps=5, hold_steps=10,
        last_germination_step=90, graft_parameter_budget=200, parameter_budget=400,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Commands set up the log for themselves; the next test gets it back."""
    yield
    structlog.reset_defaults()
