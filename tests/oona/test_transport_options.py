"""gRPC says nothing of an option that it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
from grpc._cython import cygrpc

from esperml.client.connection import CHANNEL_OPTIONS
from esperml.oona import server_options
from esperml.settings import OonaSettings

OPTIONS = dict([*CHANNEL_OPTIONS, *server_options(OonaSettings())])


@pytest.fixture(scope="module")
def library() -> bytes:
    return Path(cygrpc.__file__).read_bytes()


@pytest.mark.parametrize("name", OPTIONS)
def test_grpc_knows_every_option_of_the_transport(library, name):
    assert name.encode() in library


def test_an_idle_client_may_ping_as_often_as_it_does():
    client, server = dict(CHANNEL_OPTIONS), dict(server_options(OonaSettings()))
    assert client["grpc.keepalive_time_ms"] > server["grpc.http2.min_ping_interval_without_data_ms"]
