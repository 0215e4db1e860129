"""Figures for Prometheus, of a bus whose traffic is known."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from esperml.client import InvalidRequestError, OonaClient, WrongPayloadError, new_event
from esperml.oona import Doors
from esperml.oona.metrics import bus_metrics
from esperml.oona.traffic import Distribution
from esperml.tamiyo.work import Work
from esperml.v1 import decision_pb2, event_pb2, oona_pb2

EVENTS = event_pb2.KIND_EVENTS
EARLIEST = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)


def figures(bus) -> CollectorRegistry:
    class Bus(Collector):
        def collect(self):
            return bus_metrics(bus.broker, Doors(bus.settings))

    registry = CollectorRegistry()
    registry.register(Bus())
    return registry


async def test_counts_follow_what_goes_through_the_bus(bus, make_event):
    value = figures(bus).get_sample_value
    of_kind = {"kind": "events"}
    of_group = {"kind": "events", "group": "g"}
    async with OonaClient(bus.target, client_id="test") as oona:
        await oona.publish(EVENTS, [make_event("a", str(number)) for number in range(20)])
        await oona.publish(EVENTS, [make_event("b")])
        for refused, events in ((WrongPayloadError, [make_event()]), (InvalidRequestError, [])):
            with pytest.raises(refused):
                await oona.publish(event_pb2.KIND_COMMANDS, events)
        redelivery = oona_pb2.Redelivery(max_attempts=2)
        redelivery.min_delay.FromTimedelta(timedelta(milliseconds=1))
        async with oona.subscribe(EVENTS, group="g", start=EARLIEST, redelivery=redelivery) as records:
            for _ in range(2):
                record = await anext(records)
                while record.event.run_id != "b":
                    record = await anext(records)
                await records.nack(record)
            async with asyncio.timeout(10):
                while not value("oona_group_dead_letters", of_group):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await oona.publish(EVENTS, [make_event("a", "more")])
            more = await anext(records)
            while more.event.run_ended.error != "more":
                more = await anext(records)
            await records.ack(more)
    assert value("oona_events_stored_total", of_kind) == 22
    assert value("oona_events_stored_total", {"kind": "telemetry"}) == 0
    assert value("oona_event_bytes_stored_total", of_kind) > 0
    assert value("oona_records_delivered_total", of_kind) >= 22
    assert value("oona_records_redelivered_total", of_kind) == 1
    assert value("oona_records_given_back_total", of_kind) == 2
    assert value("oona_records_acknowledged_total", of_kind) == 1
    assert value("oona_records_dead_lettered_total", of_kind) == 1
    assert value("oona_delivery_bytes_total", of_kind) > value("oona_event_bytes_stored_total", of_kind) / 2
    assert value("oona_requests_rejected_total", {"reason": "wrong_payload"}) == 1
    assert value("oona_requests_rejected_total", {"reason": "invalid"}) == 1
    assert value("oona_commit_seconds_count", of_kind) == value("oona_frame_events_count", of_kind) == 3
    assert value("oona_frame_events_sum", of_kind) == 22
    assert value("oona_frame_events_bucket", of_kind | {"le": "1.0"}) == 2
    assert value("oona_frame_events_bucket", of_kind | {"le": "+Inf"}) == 3
    assert value("oona_log_next_offset", of_kind) == 22
    assert value("oona_log_earliest_offset", of_kind) == 0
    assert value("oona_log_bytes", of_kind) > 0
    assert value("oona_group_lag", of_group) > 0
    assert value("oona_group_members", of_group) == 0
    assert value("oona_group_waiting_spans", of_group) == 0


def test_values_fall_at_the_first_bound_that_they_do_not_exceed():
    distribution = Distribution((1, 10))
    for value in (0.5, 1, 2, 10, 11):
        distribution.add(value)
    assert distribution.counts == [2, 2, 1]
    assert distribution.total == 24.5


def test_decisions_are_counted_with_the_time_they_took():
    class Bus(Collector):
        def collect(self):
            return work.metrics()

    work = Work()
    registry = CollectorRegistry()
    registry.register(Bus())
    decision = decision_pb2.AdaptationDecision(disposition=decision_pb2.DISPOSITION_SENT)
    decision.action.cull.SetInParent()
    told = new_event("run", decision=decision)
    work.handled(event_pb2.KIND_TELEMETRY, [(event_pb2.KIND_DECISIONS, told)], 0.003)
    work.handled(event_pb2.KIND_TELEMETRY, [], 0.1)
    assert registry.get_sample_value("tamiyo_events_total", {"kind": "telemetry"}) == 2
    assert registry.get_sample_value("tamiyo_decisions_total", {"action": "cull", "disposition": "sent"}) == 1
    assert registry.get_sample_value("tamiyo_decision_seconds_bucket", {"le": "0.005"}) == 1
    assert registry.get_sample_value("tamiyo_decision_seconds_count") == 1
