"""What stands between a seed and its host: nothing that is not a number, and nothing out of proportion, passes.

The checks wait for no device: where the answer is not at hand, a seed's contribution is replaced by zeros on the device
itself, and the count is read when a report is made.
"""

from __future__ import annotations

from typing import Any, Final, cast

import torch
from torch import Tensor, nn

OUT_OF_PROPORTION: Final = 1e4
"""A contribution is out of proportion where its greatest entry is this much above that of the layer's own output."""

UNUSABLE: Final = f"gave values that are not finite, or more than {OUT_OF_PROPORTION:g} times those of its layer"


class _Shield(torch.autograd.Function):
    """Passes a tensor on, and its gradient back only where all of that is finite."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is needed for the way back."""

    @staticmethod
    def backward(_ctx: Any, *gradients: Any) -> Any:
        return finite_or_zero(gradients[0])


def shield(x: Tensor) -> Tensor:
    """``x`` for a seed to read: a gradient that is not finite does not come back through it."""
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x
    return cast(Tensor, _Shield.apply(x))  # type: ignore[no-untyped-call]


def finite_or_zero(gradient: Tensor) -> Tensor:
    """``gradient``, or zeros where not all of it is finite."""
    return torch.where(gradient.isfinite().all(), gradient, 0)


def shield_parameters(body: nn.Module) -> None:
    """Keep gradients that are not finite from the parameters of ``body``.

    They would spoil more than the seed: clipping and loss scaling look at the gradients of all parameters at once.
    """
    for parameter in body.parameters():
        if parameter.requires_grad:
            parameter.register_hook(finite_or_zero)  # type: ignore[no-untyped-call]


def usable(added: Tensor, output: Tensor) -> Tensor:
    """Whether ``added`` may be added to ``output``: finite, and in proportion. A bool on their device, 0 dimensions.

    Where ``output`` itself is not finite the host is in trouble by itself, and nothing is held against the seed.
    """
    if not output.numel():
        return torch.ones((), dtype=torch.bool, device=output.device)
    own = output.detach().abs().amax().float()
    bound = OUT_OF_PROPORTION * (1 + own)
    return (added.detach().abs().amax().float() <= bound) | ~own.isfinite()
