"""What a session saw, what it did and why, for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from esperml.kasmina.proposals import Proposal
from esperml.kasmina.stages import stage_name
from esperml.v1 import health_pb2


@dataclass(frozen=True, slots=True)
class Summary:
    """A run so far; ``print`` it.

    Attributes:
        run: name of the run.
        mode: observe, advise or act.
        steps: optimizer steps.
        reports: reports that were made.
        reports_dropped: reports that could not be sent.
        connected: whether the server can be reached; of a closed session, whether it was sent everything.
        overhead: share of the time since the start that Esper took, evaluation excluded; ``None`` before the first
            report.
        host_parameters: parameters of the host before anything grew.
        parameters: parameters of host and seeds together now.
        train_loss: first and last training loss that were reported; ``None`` where none was.
        held_out_loss: first and last held-out loss; ``None`` where none was measured.
        seeds: living and fossilised seeds.
        actions: step, and in words what was asked, by whom, and what came of it.
        layers: the latest measures of each layer.
        decisions_applied: commands that were carried out.
        decisions_refused: commands that were refused or had expired.
        proposals: what Tamiyo would do, where it may not act by itself, oldest first.
        remarks: what the user should know of the session, once each.
        failure: why the session stopped working; empty where it did not.
        sampling: how much was measured at last under a ceiling on the overhead; ``None`` without one.
    """

    run: str
    mode: str
    steps: int
    reports: int
    reports_dropped: int
    connected: bool
    overhead: float | None
    host_parameters: int
    parameters: int
    train_loss: tuple[float, float] | None
    held_out_loss: tuple[float, float] | None
    seeds: tuple[health_pb2.SeedSignal, ...] = ()
    actions: tuple[tuple[int, str], ...] = ()
    layers: tuple[health_pb2.EnhancedHealthSignal, ...] = ()
    failure: str = ""
    decisions_applied: int = 0
    decisions_refused: int = 0
    proposals: tuple[Proposal, ...] = ()
    remarks: tuple[str, ...] = ()
    sampling: health_pb2.Sampling | None = None

    def __str__(self) -> str:
        lines = [
            f"run {self.run} ({self.mode}): {self.steps} steps, {self.reports} reports"
            + (f", {self.reports_dropped} of them dropped" if self.reports_dropped else "")
            + ("" if self.connected else ", the server cannot be reached"),
            f"  parameters     {self.host_parameters:,} at the start, {self.parameters:,} now",
        ]
        for title, pair in (("training loss", self.train_loss), ("held-out loss", self.held_out_loss)):
            if pair is not None:
                lines.append(f"  {title:<14} {pair[0]:.4g} at first, {pair[1]:.4g} at last")
        if self.overhead is not None:
            lines.append(f"  overhead       {self.overhead:.2%} of the time, evaluation excluded")
        if self.sampling is not None:
            lines.append(f"  sampling       {_sampled(self.sampling)}")
        seen = list(_ailments(self.layers))
        if seen:
            lines.append("what was seen:")
            lines += [f"  {words}" for words in seen]
        lines += self._proposed()
        lines.append("what was done:" if self.actions else "nothing was done.")
        lines += [f"  step {step}: {words}" for step, words in self.actions]
        if self.seeds:
            lines.append("seeds:")
            lines += [f"  {_describe(seed)}" for seed in self.seeds]
        if self.remarks:
            lines.append("what to know:")
            lines += [f"  {remark}" for remark in self.remarks]
        if self.failure:
            lines += ["the session stopped working; training went on without it:", f"  {self.failure}"]
        return "\n".join(lines)

    def _proposed(self) -> Iterator[str]:
        if self.mode == "act":
            return
        yield "what was proposed:" if self.proposals else "nothing was proposed."
        for proposal in self.proposals:
            yield f"  step {proposal.step}: {proposal.reason} ({proposal.fate}; decision {proposal.decision_id})"
        if any(proposal.pending for proposal in self.proposals):
            yield f"  esperml.v1.Runs/ApproveDecision carries one out, by run_id {self.run!r} and its decision_id."


def _ailments(layers: Sequence[health_pb2.EnhancedHealthSignal]) -> Iterator[str]:
    """What stands out in the latest measures, in words: the worst layer by each, where it is bad at all."""
    for measure, bad, words in (
        ("expressivity_bottleneck", 0.5, "of the step that the loss asks of its output is beyond its own parameters"),
        ("dead_fraction", 0.25, "of its units never respond"),
        ("vanishing_fraction", 0.25, "of its gradient entries vanish"),
        ("exploding_fraction", 0.0, "of its gradient entries explode"),
    ):
        known = [
            (value, layer.layer) for layer in layers for field, value in layer.ListFields() if field.name == measure
        ]
        if known and max(known)[0] > bad:
            value, name = max(known)
            yield f"{name}: {value:.0%} {words}"


def _sampled(sampling: health_pb2.Sampling) -> str:
    words = f"{sampling.layers} of {sampling.layers_due} layers that were due"
    if sampling.HasField("interval"):
        words += f", {sampling.interval} steps after the report before"
    if sampling.reports_skipped:
        words += f"; {sampling.reports_skipped} reports left out in all"
    return f"{words} (ceiling {sampling.ceiling:.2%} of the time)"


def _describe(seed: health_pb2.SeedSignal) -> str:
    words = (
        f"{seed.seed_id}: {seed.blueprint}, {stage_name(seed.stage)} for {seed.steps_in_stage} steps, "
        f"alpha {seed.alpha:.2g}, {seed.parameters:,} parameters"
    )
    if seed.HasField("ablation_contribution"):
        words += f", held-out loss {seed.ablation_contribution:+.4g} without it"
    if seed.errors:
        words += f", left out {seed.errors} times"
    return words
