"""A session that says things to a server that is not there, until it is killed: ``speak_until_killed.py TARGET``."""

from __future__ import annotations

import itertools
import sys
import threading

from esperml import kasmina
from esperml.client import new_event
from esperml.v1 import event_pb2, run_pb2

link = kasmina.GrpcLink(sys.argv[1], "r")
pause = threading.Event()
for step in itertools.count():
    link.publish(event_pb2.KIND_EVENTS, new_event("r", run_ended=run_pb2.RunEnded(step=step)))
    pause.wait(0.002)
    if spooled := link.statistics().spooled:
        print("spooled", spooled, flush=True)
