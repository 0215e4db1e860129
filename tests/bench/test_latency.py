"""Gates on latency. They measure only with ``--benchmark-enable``; otherwise they check that the calls work.

What else runs on the machine can only add to a call's time, so the best of many short blocks of calls is what counts.
"""

from statistics import median

import grpc
import pytest

from esperml.bench.hosts import chain
from esperml.bench.server import server_process
from esperml.v1 import tamiyo_pb2, tamiyo_pb2_grpc

BUDGET_S = 0.010
BLOCKS, CALLS = 24, 25


@pytest.fixture(scope="module")
def tamiyo():
    with server_process(None, threads=1) as address, grpc.insecure_channel(address) as channel:
        yield tamiyo_pb2_grpc.TamiyoStub(channel)


@pytest.mark.parametrize("layers", [10, 64, 256])
def test_decide_over_the_wire_takes_less_than_ten_milliseconds(tamiyo, benchmark, layers):
    request = tamiyo_pb2.DecideRequest(state=chain(layers))
    rounds = BLOCKS * CALLS
    response = benchmark.pedantic(
        tamiyo.Decide, args=(request,), kwargs={"timeout": 10}, rounds=rounds, warmup_rounds=20
    )
    assert len(response.layer_scores) == layers
    if benchmark.enabled:
        times = benchmark.stats["data"]
        assert min(median(times[block * CALLS : (block + 1) * CALLS]) for block in range(BLOCKS)) < BUDGET_S
