"""One process that runs Oona and Tamiyo. Splitting them is configuration, never code."""

from esperml.server.app import EXPOSED_WITHOUT_TLS, ExposedAddressError, serve

__all__ = ["EXPOSED_WITHOUT_TLS", "ExposedAddressError", "serve"]
