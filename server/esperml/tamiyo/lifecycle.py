"""When a seed has shown what it can, it is kept for good or removed. A rule settles that, not a policy."""

from __future__ import annotations

from dataclasses import dataclass

from esperml.v1 import decision_pb2, graph_pb2, health_pb2


@dataclass(frozen=True, slots=True)
class Settlement:
    """What becomes of a seed.

    Attributes:
        seed: the seed.
        keep: fossilise it; otherwise cull it.
        reason: in one sentence, with the figures.
    """

    seed: health_pb2.SeedSignal
    keep: bool
    reason: str

    @property
    def action(self) -> decision_pb2.Action:
        """The action that carries it out."""
        if self.keep:
            return decision_pb2.Action(fossilise=decision_pb2.Fossilise())
        return decision_pb2.Action(cull=decision_pb2.Cull())


def settle(
    seed: health_pb2.SeedSignal,
    run: health_pb2.RunMeasures,
    limits: graph_pb2.RunLimits,
    cull_below: float,
) -> Settlement | None:
    """What becomes of a seed now, or ``None`` where it is too early to say.

    A seed that failed is culled at once. Any other is settled when it has held for ``hold_steps``: kept where taking
    it out would raise held-out loss by at least ``cull_below``, relative to the loss, and culled otherwise. Where the
    run is evaluated, the ablation is waited for, but for no longer than another ``hold_steps``. Where it is not, or the
    ablation never came, the seed is kept: there is nothing to say against it.

    Args:
        seed: as last reported.
        run: latest measures of the run; a held-out loss shows that the run is evaluated.
        limits: in force.
        cull_below: see :class:`esperml.settings.TamiyoSettings`.
    """
    if seed.stage != health_pb2.SEED_STAGE_HOLDING:
        return None
    if seed.errors:
        return Settlement(seed, False, f"Remove {seed.seed_id}: it failed in {seed.errors} forward passes.")
    if seed.steps_in_stage < limits.hold_steps:
        return None
    if seed.HasField("ablation_contribution") and run.HasField("held_out_loss") and run.held_out_loss > 0:
        relative = seed.ablation_contribution / run.held_out_loss
        keep = relative >= cull_below
        verb, relation = ("Keep", "at least") if keep else ("Remove", "less than")
        return Settlement(
            seed,
            keep,
            f"{verb} {seed.seed_id}: without it held-out loss would change by {relative:+.1%}, "
            f"{relation} the {cull_below:+.1%} asked for.",
        )
    if run.HasField("held_out_loss") and seed.steps_in_stage < 2 * max(1, limits.hold_steps):
        return None
    why = "its ablation was never measured" if run.HasField("held_out_loss") else "the run has no evaluator"
    return Settlement(
        seed,
        True,
        f"Keep {seed.seed_id}: it held for {seed.steps_in_stage} steps without error, and {why}.",
    )
