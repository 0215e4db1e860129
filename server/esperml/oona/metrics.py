"""The bus's figures for Prometheus: read from its state and its counts whenever somebody asks."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from esperml.contract import KINDS, kind_name
from esperml.v1 import oona_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.core import Metric

    from esperml.oona.admission import Doors
    from esperml.oona.broker import Broker
    from esperml.oona.traffic import Distribution, Traffic

_COUNTERS = (
    ("oona_events_stored", "Events stored."),
    ("oona_event_bytes_stored", "Bytes of the events stored."),
    ("oona_events_duplicate", "Events that a publisher sent again and that were not stored twice."),
    ("oona_records_delivered", "Records delivered, to whomever and however often."),
    ("oona_delivery_bytes", "Bytes of the deliveries."),
    ("oona_records_redelivered", "Records delivered to a group that had been delivered them before."),
    ("oona_records_acknowledged", "Records that members of groups said they were done with."),
    ("oona_records_given_back", "Records that members of groups gave back."),
    ("oona_records_dead_lettered", "Records that groups gave up on."),
)


def _counts(traffic: Traffic) -> tuple[int, ...]:
    """The values of the counters, in their order."""
    return (
        traffic.stored,
        traffic.stored_bytes,
        traffic.duplicates,
        traffic.delivered,
        traffic.delivered_bytes,
        traffic.redelivered,
        traffic.acknowledged,
        traffic.given_back,
        traffic.given_up,
    )


_HISTOGRAMS: tuple[tuple[str, str, Callable[[Traffic], Distribution]], ...] = (
    ("oona_commit_seconds", "Time from a frame's arrival to its confirmation.", lambda traffic: traffic.commit_s),
    ("oona_frame_events", "Events in a published frame.", lambda traffic: traffic.frame_events),
    ("oona_delivery_records", "Records in a delivery.", lambda traffic: traffic.delivery_records),
)


def bus_metrics(broker: Broker, doors: Doors) -> Iterator[Metric]:
    """The figures of a bus, as they are now. To be called on the bus's event loop.

    Counters begin at 0 with the process. Labels: ``kind`` (telemetry, events, …), ``group``, ``reason``.
    """
    kinds = [(kind, kind_name(kind)) for kind in KINDS]
    counters = [CounterMetricFamily(name, text, labels=["kind"]) for name, text in _COUNTERS]
    histograms = [HistogramMetricFamily(name, text, labels=["kind"]) for name, text, _ in _HISTOGRAMS]
    for kind, name in kinds:
        traffic = broker.traffic(kind)
        for counter, count in zip(counters, _counts(traffic), strict=True):
            counter.add_metric([name], count)
        for histogram, (_, _, distribution) in zip(histograms, _HISTOGRAMS, strict=True):
            _add(histogram, name, distribution(traffic))
    yield from counters
    yield from histograms

    floor = GaugeMetricFamily("oona_log_earliest_offset", "First offset that is still there.", labels=["kind"])
    end = GaugeMetricFamily("oona_log_next_offset", "Offset of the next record to be stored.", labels=["kind"])
    size = GaugeMetricFamily("oona_log_bytes", "Bytes of the events that the log holds.", labels=["kind"])
    lag = GaugeMetricFamily("oona_group_lag", "Records that a group is not done with.", labels=["kind", "group"])
    members = GaugeMetricFamily("oona_group_members", "Members of a group.", labels=["kind", "group"])
    letters = GaugeMetricFamily("oona_group_dead_letters", "Records that a group gave up on.", labels=["kind", "group"])
    text = "Spans of records that wait for members of a group; with 65536 of them the group reads on no further."
    waiting = GaugeMetricFamily("oona_group_waiting_spans", text, labels=["kind", "group"])
    for kind, name in kinds:
        topic = broker.topic(kind)
        floor.add_metric([name], topic.earliest_offset)
        end.add_metric([name], topic.next_offset)
        size.add_metric([name], topic.bytes)
        for group in broker.groups(kind):
            lag.add_metric([name, group.name], group.lag)
            members.add_metric([name, group.name], group.members)
            letters.add_metric([name, group.name], group.dead_letters)
        for group_name, spans in broker.waiting(kind).items():
            waiting.add_metric([name, group_name], spans)
    yield from (floor, end, size, lag, members, letters, waiting)

    rejections = CounterMetricFamily("oona_requests_rejected", "Requests rejected.", labels=["reason"])
    for number, reason in oona_pb2.RejectReason.items():
        if reason:
            rejections.add_metric([number.removeprefix("REJECT_REASON_").lower()], broker.rejections[reason])
    yield rejections
    yield GaugeMetricFamily("oona_streams_open", "Streams that are open.", value=len(doors.inside))


def _add(histogram: HistogramMetricFamily, label: str, distribution: Distribution) -> None:
    bounds = [*map(str, map(float, distribution.bounds)), "+Inf"]
    buckets = list(zip(bounds, accumulate(distribution.counts), strict=True))
    histogram.add_metric([label], buckets, distribution.total)
