"""Keeps gRPC out of forks. Imported before gRPC is, which looks at its environment when it is loaded.

gRPC does things of its own whenever the process forks, as PyTorch's data loaders do: beside threads that are in gRPC,
one child in five died of that. Children have no use for our connections. A variable that is set stays as it is.
"""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
