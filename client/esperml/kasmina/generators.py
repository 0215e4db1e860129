"""Random number generators: their state taken down, and put back."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor

from esperml.kasmina.errors import CheckpointError


def capture_generators() -> dict[str, Any]:
    """State of torch's generators, of Python's, and of NumPy's global one where NumPy is in use.

    Generators that a program made for itself are not among them.
    """
    version, key, following = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "key": _as_tensor(key), "gauss": following},
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, key, position, has_gauss, gauss = numpy.random.get_state()
        state["numpy"] = {
            "name": str(name),
            "key": _as_tensor(key),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(gauss),
        }
    return state


def restore_generators(state: dict[str, Any], *, torch_only: bool = False) -> None:
    """Put back what :func:`capture_generators` took down.

    Args:
        state: what it gave. That of devices which are not here is left out.
        torch_only: leave Python's and NumPy's as they are.
    """
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        for device, saved in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(saved.cpu(), device)
    if torch_only:
        return
    python = state["python"]
    try:
        random.setstate((python["version"], tuple(python["key"].tolist()), python["gauss"]))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"generators: Python does not take the state of its generator: {error}") from error
    numpy, saved = sys.modules.get("numpy"), state.get("numpy")
    if numpy is not None and saved is not None:
        numpy.random.set_state(
            (
                saved["name"],
                saved["key"].cpu().numpy().astype("uint32"),
                saved["position"],
                saved["has_gauss"],
                saved["gauss"],
            )
        )


def _as_tensor(key: Any) -> Tensor:
    return torch.tensor([int(word) for word in key], dtype=torch.int64)
