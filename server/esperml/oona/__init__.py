"""Oona, the durable, typed bus: log engines, the broker, and its gRPC face.

>>> from pathlib import Path
>>> from esperml.oona import Broker, OonaService, SqliteLog
>>> from esperml.settings import OonaSettings
>>> def make_service(path: Path) -> OonaService:
...     return OonaService(Broker(SqliteLog(path), OonaSettings()))
"""

from esperml.oona.admission import Doors
from esperml.oona.broker import Broker
from esperml.oona.log import Log, LogDamagedError, LogError, LogInUseError, LogUnavailableError
from esperml.oona.service import OonaService, add_to_server, server_options
from esperml.oona.sqlite.log import SqliteLog

__all__ = [
    "Broker",
    "Doors",
    "Log",
    "LogDamagedError",
    "LogError",
    "LogInUseError",
    "LogUnavailableError",
    "OonaService",
    "SqliteLog",
    "add_to_server",
    "server_options",
]
