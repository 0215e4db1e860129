"""Print Tamiyo's decisions as they are made: what, where, why, and what became of them.

It needs only the light install: ``pip install esperml``.
"""

from __future__ import annotations

import argparse
import asyncio
import uuid

from esperml.client import Credentials, OonaClient
from esperml.v1 import decision_pb2, event_pb2, oona_pb2


async def watch(target: str, *, earliest: bool, count: int | None) -> None:
    """Print decisions to do something; "none" is left out.

    Args:
        target: address of the server.
        earliest: begin with the oldest decision that is kept, not with the next one.
        count: how many decisions to read, "none" included; ``None`` for no end.
    """
    start = oona_pb2.StartAt(anchor=oona_pb2.ANCHOR_EARLIEST if earliest else oona_pb2.ANCHOR_LATEST)
    credentials = Credentials.from_environment()  # ESPER_TOKEN, ESPER_CA and the like, where the server asks for them.
    read = 0
    async with (
        OonaClient(target, client_id=f"watcher-{uuid.uuid4().hex}", credentials=credentials) as oona,
        oona.subscribe(event_pb2.KIND_DECISIONS, start=start) as decisions,
    ):
        async for record in decisions:
            decision = record.event.decision
            action = decision.action.WhichOneof("kind")
            if action != "none":
                became = decision_pb2.Disposition.Name(decision.disposition).removeprefix("DISPOSITION_").lower()
                print(f"{decision.run_id} step {decision.step}: {action} ({became}). {decision.reason}", flush=True)
            read += 1
            if count is not None and read >= count:
                return


def main() -> None:
    """Watch until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="localhost:50051", help="address of the server")
    parser.add_argument("--earliest", action="store_true", help="begin with the oldest decision that is kept")
    parser.add_argument("--count", type=int, help="stop after that many decisions")
    arguments = parser.parse_args()
    asyncio.run(watch(arguments.target, earliest=arguments.earliest, count=arguments.count))


if __name__ == "__main__":
    main()
