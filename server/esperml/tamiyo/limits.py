"""What a run allows, defaults filled in."""

from __future__ import annotations

from esperml.settings import TamiyoSettings
from esperml.v1 import graph_pb2


def resolve(stated: graph_pb2.RunLimits, settings: TamiyoSettings, host_parameters: int) -> graph_pb2.RunLimits:
    """The limits in force.

    Args:
        stated: what the run says; what it leaves out comes from the settings. ``last_germination_step`` has no default.
        settings: the server's.
        host_parameters: parameters of the host before anything grew, to which the budgets relate.
    """
    resolved = graph_pb2.RunLimits(
        parameter_budget=int(settings.parameter_budget_fraction * host_parameters),
        graft_parameter_budget=int(settings.graft_parameter_budget_fraction * host_parameters),
        max_live_seeds=settings.max_live_seeds,
        warmup_steps=settings.warmup_steps,
        decision_interval_steps=settings.decision_interval_steps,
        blend_steps=settings.blend_steps,
        hold_steps=settings.hold_steps,
        embargo_steps=settings.embargo_steps,
    )
    resolved.MergeFrom(stated)
    return resolved
