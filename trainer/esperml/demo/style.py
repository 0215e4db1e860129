"""Colours and words that the pictures, the report and the live display share."""

from __future__ import annotations

from typing import Final

from esperml.demo.story import Role
from esperml.v1 import decision_pb2, graph_pb2, health_pb2

INK: Final = "#1d2733"
MUTED: Final = "#6b7684"
RULE: Final = "#dde2e8"

TWINS: Final[dict[Role, str]] = {"static": "#8592a0", "adapted": "#0b7a75", "random": "#d9822b"}
"""A colour for each twin; they differ in lightness too, for those who see few colours."""

TERMINAL: Final[dict[Role, str]] = {"static": "#9aa7b4", "adapted": "#2dd4bf", "random": "#f5a623"}
"""The same on a terminal, which is dark more often than not."""

HEALTH: Final = ("#b83a2e", "#e8a15c", "#f3e3b3", "#8cc0b0", "#1f7a72")
"""From sick (0) to healthy (1)."""

STAGES: Final[dict[health_pb2.SeedStage.ValueType, tuple[str, str]]] = {
    health_pb2.SEED_STAGE_GERMINATED: ("germinated", "#d7e8c8"),
    health_pb2.SEED_STAGE_BLENDING: ("blending in", "#a8d08d"),
    health_pb2.SEED_STAGE_HOLDING: ("on trial", "#5aa469"),
    health_pb2.SEED_STAGE_FOSSILISED: ("kept for good", "#2f5d50"),
    health_pb2.SEED_STAGE_CULLED: ("culled", "#b83a2e"),
}
"""Name and colour of each stage of a seed."""

MARKERS: Final = {"germinate": "^", "fossilise": "s", "cull": "X", "set_alpha": "D"}
"""Shape by which pictures mark each action."""

_VERBS: Final = {"germinate": "plant", "fossilise": "keep", "cull": "cull", "set_alpha": "set alpha of"}
_DISPOSITIONS: Final = {
    decision_pb2.DISPOSITION_SUPPRESSED: "held back",
    decision_pb2.DISPOSITION_SHADOWED: "recorded only",
    decision_pb2.DISPOSITION_PENDING: "waits for approval",
    decision_pb2.DISPOSITION_VETOED: "vetoed",
}


def action_in_words(decision: decision_pb2.AdaptationDecision) -> str:
    """What a decision asks for: ``plant convolution: input of hidden1 → output of hidden2``."""
    kind = decision.action.WhichOneof("kind")
    if kind in (None, "none"):
        return "leave as it is"
    if kind == "germinate":
        return f"plant {decision.action.germinate.blueprint}: {place_in_words(decision.target)}"
    return f"{_VERBS[kind]} {decision.target.seed_id or place_in_words(decision.target)}"


def place_in_words(target: decision_pb2.Target) -> str:
    """Where: ``around hidden2`` for a span of one, ``input of hidden1 → output of hidden2`` for longer ones."""
    if target.source_layer == target.target_layer:
        return f"around {target.target_layer}"
    return f"input of {target.source_layer} → output of {target.target_layer}"


def seed_place(graph: graph_pb2.HostGraph, place: int) -> decision_pb2.Target:
    """The layers of place number ``place`` of ``graph``."""
    return decision_pb2.Target(
        source_layer=graph.layers[graph.places.sources[place]].name,
        target_layer=graph.layers[graph.places.targets[place]].name,
    )


def fate_in_words(decision: decision_pb2.AdaptationDecision, applied: decision_pb2.Applied | None) -> str:
    """What became of a decision."""
    if decision.disposition != decision_pb2.DISPOSITION_SENT:
        return _DISPOSITIONS.get(decision.disposition, "nothing to do")
    if applied is None:
        return "sent, no answer"
    if applied.status == decision_pb2.COMMAND_STATUS_APPLIED:
        return f"applied at step {applied.step}"
    if applied.status == decision_pb2.COMMAND_STATUS_EXPIRED:
        return f"expired at step {applied.step}"
    return f"refused at step {applied.step}: {applied.reason}"
