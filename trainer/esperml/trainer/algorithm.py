"""Offline advantage-weighted actor-critic over hosts as graphs.

The actor repeats recorded decisions in proportion to how well they turned out (AWAC: Nair et al., 2020,
arXiv:2006.09359; advantage-weighted regression: Peng et al., 2019, arXiv:1910.00177), and orders what was tried on one
host by how it turned out there (ListNet: Cao et al., 2007). Four things differ from AWAC, each for a reason:

* The critic is a state value trained on multi-step returns, corrected by V-trace for what behaviour did later, not Q
  on one-step targets: what was observed against a twin is worth more than an estimate.
* Weights carry 1 / mu, the inverse of the behaviour's recorded propensity, so that what behaviour did often is not
  learnt for being frequent.
* The decision is factored (whether, where, what) and each head is trained where it mattered only: a place that was not
  chosen says nothing about blueprints.
* The listwise term compares decisions on one host with one another alone. It does not ask the critic how good the host
  is, and says nothing about what was not tried there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from esperml.tamiyo.policy import PolicyNetwork
from esperml.trainer.batches import Batch
from esperml.trainer.likelihood import Distribution

_LEAST_RATIO = 1e-3  # Keeps averages defined over decisions that the policy would never take.


@dataclass(frozen=True, slots=True)
class AdvantageWeightedConfig:
    """Hyperparameters of :class:`AdvantageWeightedActorCritic`.

    For a decision (whether, where, what) taken in state s by behaviour mu, with the V-trace target G and return R of
    :mod:`esperml.trainer.returns`, and A = R - V(s)::

        critic  = mean Huber(V(s) - G)
        graft   = - mean W log pi(where, what | s)                                      over what was germinated
        ranking = - mean q log softmax(log pi(where, what | s)),  q = softmax(A / t_h)  each softmax over one host
        whether = - mean U log pi(whether | s)                                          over decisions with a choice
        loss    = whether + graft_coefficient graft + ranking + value_coefficient critic - entropy_coefficient H(pi)

    with weights of mean one::

        W ~ exp(A / t) / mu(where, what | s)                                            over the batch
        U ~ exp(A' / t) rho / mu(whether | s)                                           over the host, or the batch

    t is temperature times the standard deviation of advantages in the replay buffer. t_h is temperature times
    sqrt(v_h + noise^2), where v_h is the variance of the advantages on the host: where there is little to gain it
    matters as much what gains it, unless it is noise.

    rho = pi(where, what) / mu(where, what) for what adapted, 1 for the rest: adapting is judged by where and what the
    *policy* would do, not by what chance did. A' is A averaged, with weights rho, over the decisions on one host that
    chose the same whether, so that adapting is not preferred for being the more erratic (the mean of an exponential
    exceeds the exponential of the mean). U is normalised over a host where both were tried there, and over all the
    others in the batch where not: then only the critic can tell whether adapting was better than not.

    Attributes:
        gamma: discount of one decision, 0 to 1. Rewards of an episode add up to its final gain; 1 leaves it at that.
        lambda_: of the returns, 0 to 1.
        temperature: in standard deviations of the advantage; smaller trusts the best that was tried more.
        noise: standard deviation of returns that is due to chance, in units of the reward. Repeats of a small host
            differ by about 0.01 in the logarithm of their loss.
        weight_clip: largest exp(A / t) outside a ranking, and largest weight.
        importance_clip: largest correction 1 / mu and largest ratio rho, relative to their means over the batch.
        graft_coefficient: weight of the graft's loss beside the ranking. It is what teaches where to grow on hosts that
            grew before, which have no one to compare with; too much of it learns by heart what was tried.
        value_coefficient: weight of the critic's loss.
        entropy_coefficient: weight of the entropy bonus, per nat.
        huber_delta: deviation, in units of the reward, from which the critic's loss is linear.
        learning_rate: of AdamW.
        weight_decay: of AdamW, decoupled.
        gradient_clip: largest Euclidean norm of the gradient.
        batch_size: decisions of a mini-batch.
        refresh_steps: updates between two computations of the returns with the current critic.
    """

    gamma: float = 1.0
    lambda_: float = 0.95
    temperature: float = 0.5
    noise: float = 0.02
    weight_clip: float = 20.0
    importance_clip: float = 10.0
    graft_coefficient: float = 0.05
    value_coefficient: float = 0.5
    entropy_coefficient: float = 0.003
    huber_delta: float = 0.2
    learning_rate: float = 3e-4
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    batch_size: int = 256
    refresh_steps: int = 100

    def __post_init__(self) -> None:
        for name in ("gamma", "lambda_"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be from 0 to 1")
        for name in ("graft_coefficient", "value_coefficient", "entropy_coefficient", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 0")
        for name in ("temperature", "noise", "huber_delta", "learning_rate", "gradient_clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, must be above 0")
        for name in ("weight_clip", "importance_clip", "batch_size", "refresh_steps"):
            if not 1 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")


@dataclass(frozen=True, slots=True)
class Losses:
    """The losses of one mini-batch, each a scalar, by the names of :class:`AdvantageWeightedConfig`."""

    whether: Tensor
    graft: Tensor
    ranking: Tensor
    critic: Tensor
    entropy: Tensor


class AdvantageWeightedActorCritic:
    """Trains a policy network, in place.

    Args:
        network: actor and critic in one.
        config: hyperparameters.
    """

    def __init__(self, network: PolicyNetwork, config: AdvantageWeightedConfig) -> None:
        self.network = network
        self.config = config
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def update(self, batch: Batch) -> dict[str, float]:
        """One step on a mini-batch.

        Returns:
            The losses and the gradient's norm before clipping, by name.

        Raises:
            FloatingPointError: the loss or its gradient is not finite. The network is left as it was.
        """
        self.network.train()
        losses, config = self.losses(batch), self.config
        actor = losses.whether + config.graft_coefficient * losses.graft + losses.ranking
        loss = actor + config.value_coefficient * losses.critic - config.entropy_coefficient * losses.entropy
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.gradient_clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {float(norm)}; lower the learning rate")
        self.optimizer.step()
        named = {field.name: getattr(losses, field.name) for field in fields(losses)}
        named |= {"loss": loss, "gradient_norm": norm}
        return {name: float(value.detach()) for name, value in named.items()}

    def losses(self, batch: Batch) -> Losses:
        """All losses of a mini-batch, as :class:`AdvantageWeightedConfig` defines them."""
        output = self.network(batch.graphs)
        policy = Distribution.of(output, batch.graphs)
        whether, where, what = batch.log_likelihood(policy)
        graft = where + what
        with torch.no_grad():
            advantage = batch.returns - output.value
            exponent = advantage / (self.config.temperature * batch.advantage_scale)
            graft_weight = self._graft_weights(batch, exponent)
            whether_weight = self._whether_weights(batch, exponent, graft)
        choices = batch.may_adapt.sum().clamp(min=1)
        return Losses(
            whether=-(whether_weight * whether).sum() / choices,
            graft=-(graft_weight * graft).sum() / batch.adapted.sum().clamp(min=1),
            ranking=self._ranking_loss(graft[batch.adapted], advantage[batch.adapted], batch.host[batch.adapted]),
            critic=functional.huber_loss(output.value, batch.targets, delta=self.config.huber_delta),
            entropy=(policy.entropy() * batch.may_adapt).sum() / choices,
        )

    def _graft_weights(self, batch: Batch, exponent: Tensor) -> Tensor:
        """[n] W; zero where nothing was germinated."""
        weight = self._bounded_exp(exponent) * self._corrected(-batch.graft_log_propensity, batch.adapted)
        return _mean_one(weight, batch.adapted).clamp(max=self.config.weight_clip)

    def _whether_weights(self, batch: Batch, exponent: Tensor, graft: Tensor) -> Tensor:
        """[n] U; zero where there was no choice."""
        rho = self._corrected(graft - batch.graft_log_propensity, batch.adapted).clamp(min=_LEAST_RATIO)
        rho = torch.where(batch.adapted, rho, 1.0)
        host = _same(batch.host)
        side = _same(batch.host * 2 + batch.adapted)  # Those on one host that chose the same whether.
        total, count = side @ rho, side.sum(dim=1)
        shared = side @ (rho * exponent) / total
        # Both sides of a host keep the weight that they were recorded with: rho chooses within a side.
        rho = torch.where(count > 1, rho * count / total, rho)
        correction = self._corrected(-batch.adapt_log_propensity, batch.may_adapt) * rho
        both = batch.may_adapt & (host.sum(dim=1) > count)
        # A constant within a host changes nothing after normalising but keeps the exponential in range.
        level = host @ shared / host.sum(dim=1)
        compared = self._bounded_exp(shared - level) * correction * both
        compared = compared * host.sum(dim=1) / (host @ compared).clamp(min=torch.finfo(rho.dtype).tiny)
        alone = batch.may_adapt & ~both
        weight = torch.where(both, compared, _mean_one(self._bounded_exp(shared) * correction, alone))
        return weight.clamp(max=self.config.weight_clip)

    def _ranking_loss(self, scores: Tensor, advantage: Tensor, host: Tensor) -> Tensor:
        """The listwise loss over k grafts, averaged over those on a host with several; zero where there is none.

        Args:
            scores: [k] log-probabilities.
            advantage: [k] advantages.
            host: [k] number of the host.
        """
        same = _same(host)
        count = same.sum(dim=1)
        listed = count > 1
        if not listed.any():
            return scores.sum() * 0.0
        variance = same @ (advantage - same @ advantage / count).square() / count + self.config.noise**2
        exponent = advantage / (self.config.temperature * variance.sqrt())
        target = exponent - _group_logsumexp(exponent, same)
        likelihood = scores - _group_logsumexp(scores, same)
        return -(target.exp() * likelihood * count)[listed].mean()

    def _bounded_exp(self, exponent: Tensor) -> Tensor:
        return exponent.clamp(max=math.log(self.config.weight_clip)).exp()

    def _corrected(self, log_weight: Tensor, where: Tensor) -> Tensor:
        """[n] exp(log_weight), of mean one among ``where`` and clipped; zero elsewhere."""
        log_weight = log_weight.masked_fill(~where, -torch.inf)
        peak = log_weight.max()
        if torch.isneginf(peak):
            return torch.zeros_like(log_weight)
        return _mean_one((log_weight - peak).exp(), where).clamp(max=self.config.importance_clip)


def _group_logsumexp(values: Tensor, same: Tensor) -> Tensor:
    """[k] log of the sum of exp over each element's group."""
    return values.expand(len(values), -1).masked_fill(same == 0, -torch.inf).logsumexp(dim=1)


def _mean_one(weight: Tensor, where: Tensor) -> Tensor:
    """[n] ``weight`` divided by its mean among ``where``; zero elsewhere."""
    weight = weight * where
    return weight * where.sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)


def _same(group: Tensor) -> Tensor:
    """[n, n] 1 where two elements are of one group. Sums by matrix product have a fixed order, also on a GPU."""
    return (group[:, None] == group[None, :]).float()
