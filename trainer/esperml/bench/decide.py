"""How long Decide takes over the wire, beside a call that does nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from esperml.bench.hosts import chain
from esperml.bench.server import server_process
from esperml.v1 import tamiyo_pb2, tamiyo_pb2_grpc

SIZES: Final = (10, 64, 256)
WARM_UP: Final = 20
TIMEOUT_S: Final = 10.0

_R = TypeVar("_R")


def measure(
    *, sizes: Sequence[int] = SIZES, calls: int = 300, threads: int = 1, policy: Path | None = None
) -> dict[str, object]:
    """Measure a no-op call and Decide, alternating, against a server in another process.

    Args:
        sizes: layers of the hosts that are decided on.
        calls: of each kind, per size.
        threads: threads that torch may use in the server.
        policy: checkpoint to serve; see :func:`esperml.bench.server.server_process`.

    Returns:
        What ``esper bench decide --json`` prints; its help documents the keys.
    """
    results: list[dict[str, object]] = []
    with server_process(policy, threads) as address, grpc.insecure_channel(address) as channel:
        check, decide = health_pb2_grpc.HealthStub(channel).Check, tamiyo_pb2_grpc.TamiyoStub(channel).Decide
        served = tamiyo_pb2_grpc.TamiyoStub(channel).DescribePolicy(
            tamiyo_pb2.DescribePolicyRequest(), timeout=TIMEOUT_S
        )
        for size in sizes:
            request = tamiyo_pb2.DecideRequest(state=chain(size))
            nothing = health_pb2.HealthCheckRequest()
            floor, whole, inside = [], [], []
            for call in range(WARM_UP + calls):
                floor_s, _ = _timed(check, nothing)
                whole_s, response = _timed(decide, request)
                if call >= WARM_UP:
                    floor.append(floor_s)
                    whole.append(whole_s)
                    inside.append(response.timings.total)
            results.append(_row(size, request.ByteSize(), floor, whole, inside))
    return {
        "threads": threads,
        "cpus": os.cpu_count(),
        "calls": calls,
        "policy": {"name": served.policy.name, "version": served.policy.version, "weights": served.policy.parameters},
        "results": results,
    }


def _timed(call: Callable[..., _R], request: object) -> tuple[float, _R]:
    started = time.perf_counter()
    response = call(request, timeout=TIMEOUT_S)
    return time.perf_counter() - started, response


def _row(
    size: int, request_bytes: int, floor: Sequence[float], whole: Sequence[float], inside: Sequence[float]
) -> dict[str, object]:
    noop, decide, server = (_percentiles(values) for values in (floor, whole, inside))
    return {
        "layers": size,
        "request_bytes": request_bytes,
        "noop_ms": noop,
        "decide_ms": decide,
        "engine_ms": server,
        "ratio": {name: round(decide[name] / noop[name], 2) for name in noop},
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.percentile(np.asarray(seconds) * 1e3, [50, 99])
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3)}
