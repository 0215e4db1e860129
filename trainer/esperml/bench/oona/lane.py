"""One system under measurement: its server, one publisher and one consumer, a process each."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Final

from esperml.bench.oona import servers
from esperml.bench.oona.servers import Process

BLOCK_TIMEOUT_S: Final = 120.0
READ_BATCH: Final = 256

StartServer = Callable[[Path, Mapping[str, str]], AbstractContextManager[str]]


@dataclass(frozen=True, slots=True)
class System:
    """A system in one of its modes, through one client.

    Attributes:
        name: what is measured.
        durability: what a confirmed message survives, in the system's own word.
        client: the client library, where a system has several.
        worker: key of :data:`esperml.bench.oona.worker.CLIENTS`.
        start: starts the server.
        settings: of the server.
        threads: threads of the server, in words.
    """

    name: str
    durability: str
    client: str
    worker: str
    start: StartServer
    settings: Mapping[str, str] = field(default_factory=dict)
    threads: str = ""


_BUS_THREADS: Final = "1 event loop, 1 log writer, 1 log reader, gRPC's own"
_NATS_THREADS: Final = "Go's scheduler, as many as there are cores"

SYSTEMS: Final = (
    *(
        System(
            "oona-sqlite",
            durability,
            "esperml.client",
            "oona",
            servers.bus,
            {"ESPER_OONA__DURABILITY": durability},
            threads=_BUS_THREADS,
        )
        for durability in ("fsync", "page_cache")
    ),
    System("relay", "none", "esperml.client", "oona", servers.relay, threads="1 event loop, gRPC's own"),
    *(
        System(
            "redis",
            mode,
            f"redis-py {client}",
            f"redis-{client}",
            servers.redis,
            {"appendfsync": mode},
            threads="1 main thread (io-threads 1), background fsync",
        )
        for mode in ("always", "everysec")
        for client in ("sync", "asyncio")
    ),
    *(
        system
        for mode, settings in (("always", {"sync_interval": "always"}), ("default", {}))
        for system in (
            System("jetstream", mode, "nats-py", "nats", servers.nats, settings, _NATS_THREADS),
            System(
                "oona-jetstream",
                mode,
                "esperml.client",
                "oona",
                servers.gateway,
                settings,
                f"gateway: 1 event loop, gRPC's own; nats-server: {_NATS_THREADS}",
            ),
        )
    ),
)
"""Everything that is measured, in the order in which blocks alternate."""


class Lane:
    """A running system; see :func:`open_lane`.

    Args:
        system: what it is.
        publisher: the process that publishes.
        consumer: the process that consumes.
    """

    def __init__(self, system: System, publisher: Process, consumer: Process) -> None:
        self.system = system
        self._publisher = publisher
        self._consumer = consumer
        self._blocks = count()

    def events_per_s(self, payload: int, frame: int, events: int) -> float:
        """Publish a block of events, read and acknowledge it.

        Returns:
            Events a second, from the first publish to the last confirmed acknowledgement.
        """
        self._prepare(payload)
        _ask(self._consumer, do="consume", count=events, batch=READ_BATCH)
        _ask(self._publisher, do="publish", count=events, frame=frame)
        started_s = _answer(self._publisher)["started_s"]
        settled_s = _answer(self._consumer)["settled_s"]
        self._finish()
        return float(events / (settled_s - started_s))

    def single_latencies_s(self, payload: int, events: int, pause_s: float) -> list[float]:
        """Publish one event at a time, ``pause_s`` after the last was confirmed.

        Returns:
            For each, the time from publish to its delivery to the consumer, in s.
        """
        self._prepare(payload)
        _ask(self._consumer, do="consume", count=events, batch=1)
        _ask(self._publisher, do="publish_singly", count=events, pause_s=pause_s)
        sent_s = _answer(self._publisher)["sent_s"]
        arrivals = _answer(self._consumer)
        self._finish()
        arrived_s = [
            time_s for time_s, count in zip(arrivals["times_s"], arrivals["counts"], strict=True) for _ in range(count)
        ]
        return [arrived - sent for sent, arrived in zip(sent_s, arrived_s, strict=True)]

    def _prepare(self, payload: int) -> None:
        block = f"block{next(self._blocks)}"
        _ask(self._consumer, do="prepare", block=block)
        _ask(self._publisher, do="prepare", block=block, payload=payload)
        _answer(self._consumer)
        _answer(self._publisher)

    def _finish(self) -> None:
        _ask(self._consumer, do="finish")
        _answer(self._consumer)


@contextlib.contextmanager
def open_lane(system: System, folder: Path) -> Iterator[Lane]:
    """Start a system's three processes, its files in ``folder``, which must exist.

    Raises:
        PeerAbsentError: it is not installed here.
        ProcessFailedError: a process did not start.
    """
    with system.start(folder, system.settings) as address, contextlib.ExitStack() as stack:
        workers = []
        for role in ("publisher", "consumer"):
            command = [sys.executable, "-m", "esperml.bench.oona.worker", system.worker, role, address]
            workers.append(Process(command, {"OMP_NUM_THREADS": "1"}))
            stack.callback(workers[-1].stop)
        for worker in workers:
            _answer(worker)
        yield Lane(system, *workers)


def _ask(process: Process, **request: Any) -> None:
    process.say(json.dumps(request))


def _answer(process: Process) -> Any:
    return json.loads(process.read_line(BLOCK_TIMEOUT_S))
