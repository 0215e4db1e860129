"""The command ``esper``."""

from esperml.cli.root import main

__all__ = ["main"]
