"""Figures for Prometheus from a server process."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from esperml.client import SyncOonaClient, new_event
from esperml.server.listening import ExposedAddressError
from esperml.server.metrics import serving_metrics
from esperml.settings import ServerSettings
from esperml.v1 import event_pb2, run_pb2

EVENTS = event_pb2.KIND_EVENTS


def metrics_url(server) -> str:
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    return next(line["url"] for line in lines if line["event"] == "serving_metrics")


def test_a_server_serves_them_where_it_was_told_to(start_server):
    server = start_server("--policy", "chance", "--metrics-port", "0", "--log-format", "json")
    with SyncOonaClient(server.target, client_id="test") as oona:
        oona.publish(EVENTS, [new_event("run", run_ended=run_pb2.RunEnded())])
        with urllib.request.urlopen(metrics_url(server), timeout=10) as answer:
            families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    stored = {sample.labels["kind"]: sample.value for sample in families["oona_events_stored"].samples}
    assert stored["events"] == 1
    # Tamiyo's own, and the client's.
    assert families["oona_streams_open"].samples[0].value == 2
    assert families["oona_group_lag"].samples
    assert "tamiyo_decision_seconds" in families
    assert families["process_resident_memory_bytes"].samples[0].value > 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(metrics_url(server).replace("127.0.0.1", "127.0.0.2"), timeout=10)
    assert server.stop() == 0


async def test_metrics_are_refused_beyond_loopback_and_on_a_taken_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            OSError, match=f"cannot serve metrics on 127.0.0.1:{port}.* server.metrics_port names another"
        ):
            async with serving_metrics(ServerSettings(metrics_port=port), []):
                pass
    with pytest.raises(ExposedAddressError, match=r"server\.metrics_host: 0\.0\.0\.0 can be reached") as caught:
        async with serving_metrics(ServerSettings(metrics_host="0.0.0.0", metrics_port=0), []):
            pass
    assert caught.value.host == "0.0.0.0"


async def test_without_a_port_nothing_listens():
    with capture_logs() as logs:
        async with serving_metrics(ServerSettings(), []):
            pass
        assert logs == []
        async with serving_metrics(ServerSettings(metrics_port=0), []):
            pass
    assert [entry["event"] for entry in logs] == ["serving_metrics"]
