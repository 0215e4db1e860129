"""The policy as a distribution over the decisions that are open to many hosts at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch_geometric.utils import scatter

from esperml.tamiyo.features import GraphBatch
from esperml.tamiyo.policy import (
    PolicyOutput,
    adapt_log_probabilities,
    blueprint_log_probabilities,
    place_log_probabilities,
)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Log-probabilities of decisions, for g hosts with P places together and B blueprints; -inf where masked.

    Attributes:
        whether: [g, 2] of doing nothing and of adapting.
        where: [P] of each place, given that something is done.
        what: [P, B] of each blueprint, given the place.
        place_graph: [P] host of each place.
        first_place: [g] index of each host's first place.
    """

    whether: Tensor
    where: Tensor
    what: Tensor
    place_graph: Tensor
    first_place: Tensor

    @classmethod
    def of(cls, output: PolicyOutput, graphs: GraphBatch) -> Distribution:
        """The distribution that a policy's output means under the masks of its hosts."""
        adapt, nothing = adapt_log_probabilities(output, graphs)
        count = torch.bincount(graphs.place_graph, minlength=graphs.size)
        return cls(
            whether=torch.stack([nothing, adapt], dim=1),
            where=place_log_probabilities(output, graphs),
            what=blueprint_log_probabilities(output, graphs),
            place_graph=graphs.place_graph,
            first_place=torch.cumsum(count, 0) - count,
        )

    def entropy(self) -> Tensor:
        """[g] entropy of the whole decision in nats, by the chain rule: whether, then where, then what."""
        within = _surprise(self.what).sum(dim=1)
        place = _surprise(self.where) + self.where.exp() * within
        graft: Tensor = scatter(place, self.place_graph, dim_size=len(self.whether), reduce="sum")
        return _surprise(self.whether).sum(dim=1) + self.whether[:, 1].exp() * graft


def _surprise(log_probability: Tensor) -> Tensor:
    """-p log p, element by element; zero where p is."""
    never = torch.isneginf(log_probability)
    finite = log_probability.masked_fill(never, 0.0)
    return -finite.exp() * finite
