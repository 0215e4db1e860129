from __future__ import annotations

import pytest

from esperml.client import new_event
from esperml.v1 import health_pb2, run_pb2


def test_an_event_has_an_id_of_its_own_a_time_and_its_payload():
    one = new_event("run", run_ended=run_pb2.RunEnded(step=3), traceparent="00-a")
    two = new_event("run", run_ended=run_pb2.RunEnded())
    assert one.event_id != two.event_id
    assert (one.run_id, one.run_ended.step, one.traceparent) == ("run", 3, "00-a")
    assert one.HasField("created_at")
    assert two.WhichOneof("payload") == "run_ended"


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"run_ended": run_pb2.RunEnded(), "health_report": health_pb2.HealthReport()},
        {"other": run_pb2.RunEnded()},
        {"run_id": run_pb2.RunEnded()},
    ],
)
def test_anything_but_one_known_payload_is_refused(payload):
    with pytest.raises(TypeError):
        new_event("run", **payload) if "run_id" not in payload else new_event(**payload)


def test_a_payload_of_another_type_is_refused():
    with pytest.raises(TypeError):
        new_event("run", run_ended=health_pb2.HealthReport())
