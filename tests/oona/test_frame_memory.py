"""What the cache counts for a frame is about what the frame costs."""

from __future__ import annotations

import tracemalloc

import pytest

from esperml.client import new_event
from esperml.oona.frames import Frame
from esperml.oona.log import EncodedEvents
from esperml.v1 import run_pb2


@pytest.mark.parametrize("events", [1, 8, 256])
def test_the_size_of_a_frame_is_about_its_bytes_in_memory(events):
    event = new_event("run-1", run_ended=run_pb2.RunEnded(error="x" * 200)).SerializeToString()
    tracemalloc.start()
    try:
        # Bytes of its own for each frame, as they come from the network.
        frames = [
            Frame(index * events, 10**18, EncodedEvents(["run-1"] * events, [bytes(bytearray(event))] * events))
            for index in range(100)
        ]
        for frame in frames:
            frame.records()
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(frame.size for frame in frames) == pytest.approx(used, rel=0.25)
