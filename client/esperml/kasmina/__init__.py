"""The torch side: wrap a model, grow seeds in it, tell Tamiyo how it fares, and do what Tamiyo decides.

::

    from esperml import kasmina

    model = kasmina.wrap(model, example_input)
    with kasmina.connect("localhost:50051", model, optimizer, run="my-run", mode="act") as session:
        for batch in loader:
            ...  # forward, backward, optimizer.step()
            session.step(loss=loss)
    print(session.summary())
"""

from esperml.kasmina.blueprints import Blueprint, register, registered, unregister
from esperml.kasmina.connecting import connect
from esperml.kasmina.errors import CheckpointError, KasminaError, RefusedError, UnsupportedHostError
from esperml.kasmina.evaluation import Evaluator
from esperml.kasmina.file_link import FileLink
from esperml.kasmina.geometry import Geometry
from esperml.kasmina.governor import GovernorOptions
from esperml.kasmina.grafting import Grafter
from esperml.kasmina.grpc_link import GrpcLink
from esperml.kasmina.host import Host, Place, host_of, preview, print_trainable_parameters, unwrap, wrap
from esperml.kasmina.layers import KasminaLayer
from esperml.kasmina.link import Link, LinkStatistics, LocalLink
from esperml.kasmina.proposals import Proposal
from esperml.kasmina.seeds import Seed
from esperml.kasmina.session import Session
from esperml.kasmina.spool import SpoolOptions
from esperml.kasmina.summary import Summary
from esperml.kasmina.tables import LayerTable, ParameterCount

__all__ = [
    "Blueprint",
    "CheckpointError",
    "Evaluator",
    "FileLink",
    "Geometry",
    "GovernorOptions",
    "Grafter",
    "GrpcLink",
    "Host",
    "KasminaError",
    "KasminaLayer",
    "LayerTable",
    "Link",
    "LinkStatistics",
    "LocalLink",
    "ParameterCount",
    "Place",
    "Proposal",
    "RefusedError",
    "Seed",
    "Session",
    "SpoolOptions",
    "Summary",
    "UnsupportedHostError",
    "connect",
    "host_of",
    "preview",
    "print_trainable_parameters",
    "register",
    "registered",
    "unregister",
    "unwrap",
    "wrap",
]
