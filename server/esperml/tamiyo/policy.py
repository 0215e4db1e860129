"""The policy network: message passing over the host's graph, and a head for each part of a decision.

A decision is factored: whether to adapt, then where, then with which blueprint. Each factor has a head of its own, so
that each can be trained on the decisions in which it had a say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch_geometric.nn import GCNConv
from torch_geometric.utils import scatter, softmax

from esperml.tamiyo.feature_names import GRAPH_FEATURES, NODE_FEATURES, PLACE_FEATURES
from esperml.tamiyo.graphs import EDGE_KINDS, GraphBatch


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """Sizes of a policy network.

    Attributes:
        vocabulary: names of the blueprints that it knows, distinct.
        hidden: units of each hidden layer; 64 to 128 are tried.
        layers: rounds of message passing.
    """

    vocabulary: tuple[str, ...]
    hidden: int = 96
    layers: int = 3

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for sizes that make no network."""
        if not self.vocabulary or len(set(self.vocabulary)) != len(self.vocabulary):
            raise ValueError(f"vocabulary: must name at least one blueprint, each once, but is {self.vocabulary}")
        if not 1 <= self.hidden <= 4096:
            raise ValueError(f"hidden: is {self.hidden}, outside [1, 4096]")
        if not 1 <= self.layers <= 64:
            raise ValueError(f"layers: is {self.layers}, outside [1, 64]")


@dataclass(frozen=True, slots=True)
class PolicyOutput:
    """What the heads say of g hosts with P places together and B blueprints. Nothing is masked yet.

    Attributes:
        adapt_logit: log-odds of adapting, ``[g]``.
        place_logits: score of each place, ``[P]``; softmax within a host.
        blueprint_logits: score of each blueprint at each place, ``[P, B]``; softmax within a place.
        value: estimate of the state's worth in units of reward, ``[g]``.
    """

    adapt_logit: Tensor
    place_logits: Tensor
    blueprint_logits: Tensor
    value: Tensor


class MessageLayer(nn.Module):
    """One round of message passing: ``h + relu(norm(sum over kinds of GCNConv_kind(h)))``.

    Each kind of edge has weights of its own, so that a layer can tell what feeds it from what it feeds. The residual
    connection keeps a layer's own measures at hand however many rounds there are.

    Shapes:
        ``h``: ``[N, hidden]``, in and out.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        # One bias is enough for all kinds, and the norm has it.
        self.convolutions = nn.ModuleList(GCNConv(hidden, hidden, bias=False) for _ in EDGE_KINDS)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, h: Tensor, edge_index: tuple[Tensor, ...]) -> Tensor:
        """Pass messages along ``edge_index``, one index per kind of :data:`EDGE_KINDS`."""
        messages = [convolution(h, edges) for convolution, edges in zip(self.convolutions, edge_index, strict=True)]
        return self.update(h, torch.stack(messages).sum(dim=0))

    def stacked(self) -> Tensor:
        """A copy of the weights of all kinds, transposed, one below the other: ``[kinds * hidden, hidden]``."""
        return torch.cat([convolution.get_parameter("lin.weight").detach().T for convolution in self.convolutions])

    def update(self, h: Tensor, messages: Tensor) -> Tensor:
        """The new ``h`` from the summed messages; both ``[N, hidden]``."""
        return h + torch.relu(self.norm(messages))


class PolicyNetwork(nn.Module):
    """Whether, where and with what to adapt, and what the state is worth.

    The binary head sees the pooled layers, the features of the host and the best of what may be done: whether to act
    depends on how good the best act is. It sees only places at which something is allowed.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden
        self.encode_node = nn.Linear(len(NODE_FEATURES), hidden)
        self.encode_graph = nn.Linear(len(GRAPH_FEATURES), hidden)
        self.messages = nn.ModuleList(MessageLayer(hidden) for _ in range(config.layers))
        self.place = _mlp(2 * hidden + len(PLACE_FEATURES), hidden, hidden)
        self.target = nn.Linear(hidden, 1)
        self.blueprint = nn.Linear(hidden, len(config.vocabulary))
        pooled = 4 * hidden + 2
        self.adapt = _mlp(pooled, hidden, 1)
        self.value = _mlp(pooled, hidden, 1)

    def forward(self, batch: GraphBatch) -> PolicyOutput:
        """Judge a batch of hosts."""
        h = torch.relu(self.encode_node(batch.node))
        for layer in self.messages:
            h = layer(h, batch.edge_index)
        return self.read_out(h, batch)

    def read_out(self, h: Tensor, batch: GraphBatch) -> PolicyOutput:
        """The heads.

        Args:
            h: embeddings of the layers after message passing, ``[N, hidden]``.
            batch: the hosts that they are of.
        """
        z = torch.relu(self.place(torch.cat([h[batch.place_source], h[batch.place_target], batch.place], dim=1)))
        scores = self.target(z).squeeze(1)
        pooled = torch.cat([self._pool_layers(h, batch), self._pool_places(z, scores, batch)], dim=1)
        return PolicyOutput(
            adapt_logit=self.adapt(pooled).squeeze(1),
            place_logits=scores,
            blueprint_logits=self.blueprint(z),
            value=self.value(pooled).squeeze(1),
        )

    def _pool_layers(self, h: Tensor, batch: GraphBatch) -> Tensor:
        mean = scatter(h, batch.node_graph, dim_size=batch.size, reduce="mean")
        most = scatter(h, batch.node_graph, dim_size=batch.size, reduce="max")
        return torch.cat([mean, most, torch.relu(self.encode_graph(batch.graph))], dim=1)

    def _pool_places(self, z: Tensor, scores: Tensor, batch: GraphBatch) -> Tensor:
        """The best score, how many places there are, and the mean of z weighted by score; zero where nothing may be."""
        usable = batch.allowed.any(dim=1).nonzero().squeeze(1)
        hosts, chosen = batch.place_graph[usable], scores[usable]
        best = scatter(chosen, hosts, dim_size=batch.size, reduce="max")
        count = scatter(torch.ones_like(chosen), hosts, dim_size=batch.size, reduce="sum")
        weights = softmax(chosen, hosts, num_nodes=batch.size)
        expected = scatter(weights.unsqueeze(1) * z[usable], hosts, dim_size=batch.size, reduce="sum")
        return torch.cat([best.unsqueeze(1), torch.log1p(count).unsqueeze(1), expected], dim=1)


def place_log_probabilities(output: PolicyOutput, batch: GraphBatch) -> Tensor:
    """Log-probability of each place, given that something is done, ``[P]``; ``-inf`` where nothing is allowed."""
    usable = batch.allowed.any(dim=1)
    result = torch.full_like(output.place_logits, -torch.inf)
    index = usable.nonzero().squeeze(1)
    hosts, chosen = batch.place_graph[index], output.place_logits[index]
    most = scatter(chosen.detach(), hosts, dim_size=batch.size, reduce="max")
    shifted = chosen - most[hosts]
    total = scatter(shifted.exp(), hosts, dim_size=batch.size, reduce="sum")
    return result.index_put((index,), shifted - total.log()[hosts])


def blueprint_log_probabilities(output: PolicyOutput, batch: GraphBatch) -> Tensor:
    """Log-probability of each blueprint, given the place, ``[P, B]``; ``-inf`` where not allowed.

    The row of a place where nothing is allowed is ``-inf`` throughout.
    """
    masked = output.blueprint_logits.masked_fill(~batch.allowed, -torch.inf)
    usable = batch.allowed.any(dim=1, keepdim=True)
    # A row of nothing but -inf has no softmax, and its gradient would be NaN: give it zeros, then take it out.
    return torch.log_softmax(masked.masked_fill(~usable, 0.0), dim=1).masked_fill(~batch.allowed, -torch.inf)


def adapt_log_probabilities(output: PolicyOutput, batch: GraphBatch) -> tuple[Tensor, Tensor]:
    """Log-probability of adapting and of doing nothing, ``[g]`` each.

    Where nothing is allowed they are ``-inf`` and zero.
    """
    possible = scatter(batch.allowed.any(dim=1).float(), batch.place_graph, dim_size=batch.size, reduce="sum") > 0
    adapt = nn.functional.logsigmoid(output.adapt_logit).masked_fill(~possible, -torch.inf)
    nothing = nn.functional.logsigmoid(-output.adapt_logit).masked_fill(~possible, 0.0)
    return adapt, nothing


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
