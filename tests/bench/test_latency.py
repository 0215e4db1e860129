"""Gates on latency. They measure only with ``--benchmark-enable``; otherwise they check that the calls work."""

import grpc
import pytest

from esperml.bench.hosts import chain
from esperml.bench.server import server_process
from esperml.v1 import tamiyo_pb2, tamiyo_pb2_grpc

BUDGET_S = 0.010


@pytest.fixture(scope="module")
def tamiyo():
    with server_process(None, threads=1) as address, grpc.insecure_channel(address) as channel:
        yield tamiyo_pb2_grpc.TamiyoStub(channel)


@pytest.mark.parametrize("layers", [10, 64, 256])
def test_decide_over_the_wire_takes_less_than_ten_milliseconds(tamiyo, benchmark, layers):
    request = tamiyo_pb2.DecideRequest(state=chain(layers))
    response = benchmark.pedantic(tamiyo.Decide, args=(request,), kwargs={"timeout": 10}, rounds=200, warmup_rounds=20)
    assert len(response.layer_scores) == layers
    if benchmark.enabled:
        assert benchmark.stats["median"] < BUDGET_S
