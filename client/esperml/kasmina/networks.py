"""The graph of a host as a NetworkX graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from esperml.kasmina.errors import KasminaError
from esperml.kasmina.kinds import kind_name
from esperml.kasmina.layers import KasminaLayer
from esperml.kasmina.topology import Edge
from esperml.v1 import graph_pb2

if TYPE_CHECKING:
    import networkx as nx


def to_networkx(layers: Sequence[KasminaLayer], edges: Sequence[Edge]) -> nx.DiGraph[str]:
    """Layers by name as nodes, dataflow as edges; see :meth:`esperml.kasmina.Host.to_networkx`."""
    try:
        import networkx as nx
    except ModuleNotFoundError as error:
        raise KasminaError("NetworkX is not installed: pip install 'esperml[server]'") from error
    network: nx.DiGraph[str] = nx.DiGraph()
    for layer in layers:
        network.add_node(
            layer.name,
            kind=kind_name(layer.type),
            parameters=layer.parameter_count,
            input_shape=layer.input_shape,
            output_shape=layer.output_shape,
            activated=layer.activated,
            calls=layer.calls,
            grows=layer.grows,
            inputs=layer.inputs,
            outputs=layer.outputs,
        )
    for edge in edges:
        kind = graph_pb2.EdgeKind.Name(edge.kind).removeprefix("EDGE_KIND_").lower()
        network.add_edge(layers[edge.source].name, layers[edge.target].name, kind=kind)
    return network
