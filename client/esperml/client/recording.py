"""Recordings: events in an MCAP file that any MCAP reader can decode, because the schema lies inside.

One topic a kind (``/esperml/telemetry`` and so on), each message an ``esperml.v1.Event``, in chunks compressed with
zstd. A file that was cut off gives back its whole chunks, which are small; what is recorded live is written out every
second besides.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final, Self

import zstandard
from google.protobuf.message import DecodeError
from mcap.exceptions import EndOfFile, InvalidMagic, RecordLengthLimitExceeded, UnsupportedCompressionError
from mcap.records import Channel, Message, Metadata, Schema
from mcap.stream_reader import CRCValidationError, StreamReader
from mcap.well_known import MessageEncoding, SchemaEncoding
from mcap.writer import CompressionType, Writer
from mcap_protobuf.schema import build_file_descriptor_set

from esperml.client.errors import NotARecordingError, TruncatedRecordingError
from esperml.contract import KINDS, kind_name, parse_kind
from esperml.v1 import event_pb2, oona_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Generator, Iterable, Mapping
    from types import TracebackType

    from esperml.client.oona import OonaClient

    _Write = Callable[[event_pb2.Kind.ValueType, event_pb2.Record], None]

TOPIC_PREFIX: Final = "/esperml/"
# Name of the metadata record that holds what a file says of itself.
_LABELS: Final = "esperml"
# Small chunks: what a crash or a cut costs is one of them, and it cannot be unpacked in part.
_CHUNK_BYTES: Final = 64 * 2**10
# How often a live recording is written out, in s.
_FLUSH_INTERVAL_S: Final = 1.0
# What the MCAP reader raises where a file breaks off or holds garbage: in texts, in lengths (which it then tries to
# allocate), in the numbers of channels, in compressed data.
_CUT_OFF: Final = (
    EndOfFile,
    RecordLengthLimitExceeded,
    UnsupportedCompressionError,
    CRCValidationError,
    zstandard.ZstdError,
    struct.error,
    UnicodeDecodeError,
    OverflowError,
    MemoryError,
    KeyError,
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One recorded event.

    Attributes:
        kind: the kind that it was published under.
        event: the event.
        log_time_ns: when it was stored, in ns since 1970: by the bus where it came from there.
    """

    kind: event_pb2.Kind.ValueType
    event: event_pb2.Event
    log_time_ns: int


@dataclass(slots=True)
class RecordingInfo:
    """What a recording holds.

    Attributes:
        counts: events of each kind that occurs.
        runs: events of each run that occurs.
        first_ns: earliest log time, in ns since 1970. None: there are no events.
        last_ns: latest log time, in ns since 1970. None: there are no events.
        truncated: whether the end is missing; the figures are of what is whole.
    """

    counts: Counter[event_pb2.Kind.ValueType] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    first_ns: int | None = None
    last_ns: int | None = None
    truncated: bool = False


class Recorder:
    """Writes a recording; a context manager. A file that is there is replaced.

    Args:
        path: the file to write. Its folder must exist.
        labels: what the file says of itself; :func:`read_labels` gives it back.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path | str, *, labels: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self._file: IO[bytes] = self.path.open("wb")
        self._writer = Writer(self._file, chunk_size=_CHUNK_BYTES, compression=CompressionType.ZSTD)
        self._writer.start(profile="", library="esperml")
        if labels:
            self._writer.add_metadata(_LABELS, dict(labels))
        self._schema_id = self._writer.register_schema(
            name=event_pb2.Event.DESCRIPTOR.full_name,
            encoding=SchemaEncoding.Protobuf,
            data=build_file_descriptor_set(event_pb2.Event).SerializeToString(),
        )
        self._channels: dict[int, int] = {}
        self._counts: Counter[int] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def write(self, kind: event_pb2.Kind.ValueType, event: event_pb2.Event, *, log_time_ns: int | None = None) -> None:
        """Append an event, stored at ``log_time_ns`` (ns since 1970), or now."""
        channel = self._channels.get(kind)
        if channel is None:
            channel = self._channels[kind] = self._writer.register_channel(
                topic=TOPIC_PREFIX + kind_name(kind),
                message_encoding=MessageEncoding.Protobuf,
                schema_id=self._schema_id,
            )
        log_time_ns = time.time_ns() if log_time_ns is None else log_time_ns
        self._writer.add_message(
            channel,
            log_time=log_time_ns,
            data=event.SerializeToString(),
            publish_time=event.created_at.ToNanoseconds() if event.HasField("created_at") else log_time_ns,
            sequence=self._counts[kind],
        )
        self._counts[kind] += 1

    def flush(self) -> None:
        """Hand what was written so far to the operating system: the process may be killed now and it can be read."""
        self._writer.flush()  # type: ignore[no-untyped-call]

    def close(self) -> None:
        """Finish the file. Further calls do nothing."""
        if not self._file.closed:
            try:
                self._writer.finish()  # type: ignore[no-untyped-call]
            finally:
                self._file.close()


def read(path: Path | str, *, kinds: Container[event_pb2.Kind.ValueType] = KINDS) -> Generator[Recorded, None, None]:
    """Events of a recording in the order in which they were written.

    Args:
        path: the file.
        kinds: only events of these.

    Raises (while iterating):
        TruncatedRecordingError: the end is missing or damaged; everything that is whole was given back before.
        NotARecordingError: the file is no recording, or holds messages that are not ``esperml.v1.Event``.
        OSError: the file cannot be read.
    """
    path = Path(path)
    whole = 0
    with path.open("rb") as file:
        if not file.read(1):
            raise NotARecordingError(path, "the file is empty")
        file.seek(0)
        schemas: dict[int, Schema] = {}
        channels: dict[int, event_pb2.Kind.ValueType] = {}
        try:
            for record in StreamReader(file, validate_crcs=True).records:
                match record:
                    case Schema():
                        schemas[record.id] = record
                    case Channel():
                        channels[record.id] = _kind_of(path, record, schemas)
                    case Message():
                        whole += 1
                        if (kind := channels[record.channel_id]) in kinds:
                            yield Recorded(kind, event_pb2.Event.FromString(record.data), record.log_time)
        except InvalidMagic as error:
            if whole:
                raise TruncatedRecordingError(path, whole) from error
            raise NotARecordingError(path, "is not an MCAP file") from error
        except DecodeError as error:
            raise NotARecordingError(path, f"event {whole - 1} cannot be decoded") from error
        except _CUT_OFF as error:
            raise TruncatedRecordingError(path, whole) from error


def read_labels(path: Path | str) -> dict[str, str]:
    """What a recording says of itself, ahead of its first event; empty where it says nothing.

    Raises:
        NotARecordingError: the file is no recording.
        OSError: the file cannot be read.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            for record in StreamReader(file, validate_crcs=True).records:
                match record:
                    case Metadata() if record.name == _LABELS:
                        return record.metadata
                    case Message():
                        break
        except InvalidMagic as error:
            raise NotARecordingError(path, "is not an MCAP file") from error
        except _CUT_OFF:
            pass  # It says nothing as far as it is whole.
    return {}


def describe(path: Path | str) -> RecordingInfo:
    """Count what a recording holds. A truncated one is described as far as it is whole.

    Raises:
        NotARecordingError: the file is no recording.
        OSError: the file cannot be read.
    """
    info = RecordingInfo()
    try:
        for recorded in read(path):
            info.counts[recorded.kind] += 1
            info.runs[recorded.event.run_id] += 1
            time_ns = recorded.log_time_ns
            info.first_ns = time_ns if info.first_ns is None else min(info.first_ns, time_ns)
            info.last_ns = time_ns if info.last_ns is None else max(info.last_ns, time_ns)
    except TruncatedRecordingError:
        info.truncated = True
    return info


async def record(
    oona: OonaClient,
    path: Path | str,
    *,
    kinds: Iterable[event_pb2.Kind.ValueType] = KINDS,
    run_ids: Iterable[str] = (),
    start: oona_pb2.StartAt | None = None,
    until: asyncio.Event | None = None,
    on_event: Callable[[event_pb2.Kind.ValueType, event_pb2.Event], None] | None = None,
) -> RecordingInfo:
    """Record from the bus into a file until told to stop.

    When told to stop it still records everything that was stored before. What was recorded more than a second ago is
    in the file, and can be read there, even if this process is killed.

    Args:
        oona: the client to read with.
        path: the file to write.
        kinds: what to record.
        run_ids: only events of these runs. Empty: of all.
        start: where to start in each log. None: what is stored from now on.
        until: set when enough is recorded. None: what is stored now is recorded, from the earliest unless ``start``
            says otherwise.
        on_event: called with each event that was recorded.

    Returns:
        What was recorded.

    Raises:
        OonaError: reading failed; what was recorded till then is in the file.
        OSError: the file cannot be written.
    """
    if start is None and until is None:
        start = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST)
    run_ids = list(run_ids)
    with Recorder(path) as recorder:
        recorder.flush()

        def write(kind: event_pb2.Kind.ValueType, record: event_pb2.Record) -> None:
            recorder.write(kind, record.event, log_time_ns=record.append_time.ToNanoseconds())
            if on_event is not None:
                on_event(kind, record.event)

        async def record_kinds() -> None:
            async with asyncio.TaskGroup() as tasks:
                for kind in kinds:
                    tasks.create_task(_record_kind(oona, write, kind, run_ids, start, until))

        try:
            async with asyncio.TaskGroup() as tasks:
                flusher = tasks.create_task(_flush_regularly(recorder))
                await record_kinds()
                flusher.cancel()
        except BaseExceptionGroup as group:
            raise _first(group) from None
    return await asyncio.to_thread(describe, path)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


async def _flush_regularly(recorder: Recorder) -> None:
    while True:
        await asyncio.sleep(_FLUSH_INTERVAL_S)
        recorder.flush()


async def _record_kind(
    oona: OonaClient,
    write: _Write,
    kind: event_pb2.Kind.ValueType,
    run_ids: list[str],
    start: oona_pb2.StartAt | None,
    until: asyncio.Event | None,
) -> None:
    if until is not None:
        start = await _record_live(oona, write, kind, run_ids, start, until)
    end = (await oona.describe(kind)).topic.next_offset
    async with oona.subscribe(kind, run_ids=run_ids, start=start, end_offset=end) as subscription:
        async for record in subscription:
            write(kind, record)


async def _record_live(
    oona: OonaClient,
    write: _Write,
    kind: event_pb2.Kind.ValueType,
    run_ids: list[str],
    start: oona_pb2.StartAt | None,
    until: asyncio.Event,
) -> oona_pb2.StartAt:
    """Record until told to stop. Returns where the rest starts."""

    async def drain_when_told() -> None:
        await until.wait()
        subscription.drain()

    async with oona.subscribe(kind, run_ids=run_ids, start=start) as subscription:
        stopper = asyncio.create_task(drain_when_told())
        try:
            async for record in subscription:
                write(kind, record)
        finally:
            stopper.cancel()
    return oona_pb2.StartAt(offset=subscription.next_offset)


def _kind_of(path: Path, channel: Channel, schemas: Mapping[int, Schema]) -> event_pb2.Kind.ValueType:
    schema = schemas.get(channel.schema_id)
    expected = event_pb2.Event.DESCRIPTOR.full_name
    if schema is None or schema.name != expected or not channel.topic.startswith(TOPIC_PREFIX):
        raise NotARecordingError(
            path, f"topic {channel.topic} holds {schema.name if schema else 'messages without schema'}, not {expected}"
        )
    try:
        return parse_kind(channel.topic.removeprefix(TOPIC_PREFIX))
    except ValueError as error:
        raise NotARecordingError(path, f"topic {channel.topic}: {error}") from error
