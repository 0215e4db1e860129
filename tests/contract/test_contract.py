"""The contract's facts agree with the protos."""

from __future__ import annotations

import math

import pytest

from esperml.contract import KINDS, MEASURES, PAYLOADS, InvalidFieldError, KindValue, check_event, kind_name, parse_kind
from esperml.v1 import event_pb2, graph_pb2, health_pb2


def test_signal_columns_and_registry_name_the_same_measures_with_the_same_numbers() -> None:
    signal = {f.name: f.number for f in health_pb2.EnhancedHealthSignal.DESCRIPTOR.fields if f.name != "layer"}
    columns = {f.name: f.number for f in graph_pb2.LayerColumns.DESCRIPTOR.fields}
    assert signal == columns
    assert list(signal) == list(MEASURES)


def test_every_measure_of_a_layer_can_be_absent() -> None:
    fields = health_pb2.EnhancedHealthSignal.DESCRIPTOR.fields
    assert [f.name for f in fields if f.name != "layer" and not f.has_presence] == []


def test_place_signal_and_columns_agree() -> None:
    signal = {f.name: f.number for f in health_pb2.PlaceSignal.DESCRIPTOR.fields if f.name != "place"}
    assert signal == {f.name: f.number for f in graph_pb2.PlaceColumns.DESCRIPTOR.fields}


def test_each_payload_belongs_to_one_kind() -> None:
    payloads = [payload for carried in PAYLOADS.values() for payload in carried]
    declared = {f.name for f in event_pb2.Event.DESCRIPTOR.oneofs_by_name["payload"].fields}
    assert sorted(payloads) == sorted(declared)
    assert {kind_name(kind) for kind in KINDS} == {
        name.removeprefix("KIND_").lower()
        for name in event_pb2.Kind.DESCRIPTOR.values_by_name
        if name != "KIND_UNSPECIFIED"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_has_a_name_that_leads_back_to_it(kind: KindValue) -> None:
    assert parse_kind(kind_name(kind)) == kind


def test_an_unknown_kind_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="telemetry, events"):
        parse_kind("gossip")


def _event() -> event_pb2.Event:
    return event_pb2.Event(event_id="e", run_id="r", health_report=health_pb2.HealthReport(step=1))


def test_a_kind_carries_its_own_payload() -> None:
    check_event(event_pb2.KIND_TELEMETRY, _event())


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"event_id": ""}, "events[3].event_id"),
        ({"run_id": ""}, "events[3].run_id"),
        ({"run_id": "x" * 129}, "events[3].run_id"),
    ],
)
def test_what_is_missing_is_named(change: dict[str, str], field: str) -> None:
    event = _event()
    for name, value in change.items():
        setattr(event, name, value)
    with pytest.raises(InvalidFieldError) as caught:
        check_event(event_pb2.KIND_TELEMETRY, event, "events[3]")
    assert caught.value.field == field


def test_a_payload_of_another_kind_is_refused() -> None:
    with pytest.raises(
        InvalidFieldError, match=r"event\.payload: is health_report, but kind decisions carries decision"
    ):
        check_event(event_pb2.KIND_DECISIONS, _event())


def test_a_kind_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidFieldError, match="kind: 0 is not a kind"):
        check_event(event_pb2.KIND_UNSPECIFIED, _event())


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1])
def test_a_measure_outside_its_range_is_refused(value: float) -> None:
    with pytest.raises(InvalidFieldError, match=r"^layers\[0\]\.health: "):
        MEASURES["health"].check(value, "layers[0].health")


def test_a_measure_within_its_range_passes() -> None:
    MEASURES["health"].check(0.5, "health")
