"""Every log engine behind one fixture, and a stream spoken frame by frame, as a client in another language might."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from esperml.oona.jetstream.nats_server import NatsServer, NatsServerError, find_nats_server, free_ports
from esperml.oona.log import Log
from esperml.oona.sqlite.log import SqliteLog
from esperml.settings import JetStreamSettings, OonaSettings
from esperml.v1 import event_pb2, oona_pb2


@dataclass(frozen=True)
class Engine:
    """A log engine under test.

    Attributes:
        durability: what it must declare.
        open: opens the test's own log; when that was closed, the same one again.
    """

    durability: str
    open: Callable[[], Awaitable[Log]]


# Each is a fixture of this name that gives an :class:`Engine`, and skips where it lacks what it needs.
ENGINES = ("sqlite_engine", "sqlite_page_cache_engine", "jetstream_engine")


@pytest.fixture
def sqlite_engine(tmp_path):
    async def open_log() -> Log:
        return SqliteLog(tmp_path / "log.sqlite")

    return Engine("fsync", open_log)


@pytest.fixture
def sqlite_page_cache_engine(tmp_path):
    async def open_log() -> Log:
        return SqliteLog(tmp_path / "log.sqlite", durability="page_cache")

    return Engine("page_cache", open_log)


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory):
    """One nats-server for all tests; each has streams under a prefix of its own."""
    pytest.importorskip("nats")
    try:
        find_nats_server()
    except NatsServerError as error:
        pytest.skip(str(error))
    first, second, third = free_ports(3)
    server = NatsServer(tmp_path_factory.mktemp("nats"), "alone", (first, second, third))
    server.start()
    asyncio.run(server.ready())
    yield server
    server.stop()


@pytest.fixture
def jetstream_settings(nats_server):
    """Settings of the bus for a gateway with streams that no other test uses."""
    prefix = f"test-{secrets.token_hex(6)}"
    cluster = JetStreamSettings(servers=nats_server.url, monitoring=nats_server.monitoring, prefix=prefix)
    return OonaSettings(engine="jetstream", jetstream=cluster)


@pytest.fixture
def jetstream_engine(jetstream_settings):
    from esperml.oona.jetstream.log import JetStreamLog

    async def open_log() -> Log:
        return await JetStreamLog.open(jetstream_settings)

    return Engine("one server, fsync", open_log)


@pytest.fixture(params=ENGINES)
def engine(request):
    """Each engine in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def open_log(engine):
    """Awaited, opens the test's log; once more, after closing, opens the same again."""
    return engine.open


@pytest.fixture
async def log(open_log):
    log = await open_log()
    yield log
    await log.close()


class RawStream:
    """Sends and reads frames; ``answer`` sends a request and gives back what the server says to it."""

    def __init__(self, call) -> None:
        self.call = call
        self.opened = oona_pb2.Opened()
        self.deliveries: list[oona_pb2.Delivery] = []
        self.unasked: list[oona_pb2.StreamResponse] = []
        self._request_id = 0

    async def send(self, **request) -> int:
        self._request_id += 1
        await self.call.write(oona_pb2.StreamRequest(request_id=self._request_id, **request).SerializeToString())
        return self._request_id

    async def send_bytes(self, data: bytes) -> None:
        await self.call.write(data)

    async def read(self) -> oona_pb2.StreamResponse | None:
        response = await self.call.read()
        return response if isinstance(response, oona_pb2.StreamResponse) else None

    async def answer(self, **request) -> oona_pb2.StreamResponse:
        request_id = await self.send(**request)
        while True:
            response = await self.read()
            assert response is not None, "the stream ended"
            if response.request_id == request_id:
                return response
            self.unasked.append(response)

    async def next(self, name: str) -> oona_pb2.StreamResponse:
        """The next frame of a sort that the server sends unasked."""
        for index, response in enumerate(self.unasked):
            if response.WhichOneof("response") == name:
                return self.unasked.pop(index)
        while (following := await self.read()) is not None:
            if following.WhichOneof("response") == name:
                return following
            self.unasked.append(following)
        raise AssertionError(f"the stream ended before {name}")

    async def records(self, count: int) -> list[event_pb2.Record]:
        records: list[event_pb2.Record] = []
        while len(records) < count:
            records += (await self.next("delivery")).delivery.records
        return records

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """Read to the end; the status that ended the stream."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await self.read() is not None:
                pass
        return await self.call.code(), await self.call.details()


@contextlib.asynccontextmanager
async def raw_stream(target: str, client_id: str | None = "raw") -> AsyncIterator[RawStream]:
    async with grpc.aio.insecure_channel(
        target, options=[("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        call = channel.stream_stream(
            "/esperml.v1.Oona/Stream",
            request_serializer=None,
            response_deserializer=oona_pb2.StreamResponse.FromString,
        )(None)
        stream = RawStream(call)
        if client_id is not None:
            stream.opened = (await stream.answer(open=oona_pb2.Open(client_id=client_id))).opened
        try:
            yield stream
        finally:
            call.cancel()


@pytest.fixture
def open_stream():
    return raw_stream


class BusProcess:
    """The bus in a process of its own, on one file and, once it has one, on one port.

    Args:
        path: its log.
        errors: takes what it writes to standard error. Default: that of the test.
        environment: what its environment has beyond that of the test.
    """

    def __init__(self, path: Path, errors: Path | None = None, **environment: str) -> None:
        self.path = path
        self.errors = errors
        self.port = 0
        self.environment = {**os.environ, **environment}
        self.process: subprocess.Popen[str]

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def launch(self) -> None:
        """Start it, and do not wait until it serves."""
        with contextlib.nullcontext() if self.errors is None else self.errors.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, Path(__file__).parent / "serve_bus.py", self.path, str(self.port)],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=self.environment,
            )

    def start(self) -> None:
        """Start it, and wait until it serves."""
        self.launch()
        assert self.process.stdout is not None
        self.port = int(self.process.stdout.readline())

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.communicate()

    def alive(self) -> dict[str, int]:
        """How many tasks and streams there are in it."""
        self.process.send_signal(signal.SIGUSR1)
        assert self.process.stdout is not None
        alive: dict[str, int] = json.loads(self.process.stdout.readline())
        return alive

    def resident_mb(self) -> float:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture
def start_bus_process(tmp_path):
    """Starts a bus in a process of its own, with these environment variables; it is killed when the test ends."""
    started: list[BusProcess] = []

    def start(path: Path | None = None, errors: Path | None = None, **environment: str) -> BusProcess:
        process = BusProcess(path or tmp_path / "oona.sqlite", errors, **environment)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


@pytest.fixture
def preload(tmp_path):
    """Compiles a C file of this folder into a library that a process under test preloads."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler to stand between the server and the system")

    def compile_library(source: str) -> str:
        library = tmp_path / f"{source}.so"
        here = Path(__file__).parent
        subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", library, here / source, "-ldl"], check=True)
        return str(library)

    return compile_library
