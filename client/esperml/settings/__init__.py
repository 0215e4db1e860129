"""Every setting there is, in one typed model: defaults < TOML file < environment < flags."""

from esperml.settings.load import SettingsError, Source, load, sources
from esperml.settings.logs import configure_logging
from esperml.settings.model import (
    JetStreamSettings,
    LogSettings,
    OonaSettings,
    RedeliverySettings,
    RetentionLimits,
    RetentionSettings,
    ServerSettings,
    Settings,
    TamiyoSettings,
)

__all__ = [
    "JetStreamSettings",
    "LogSettings",
    "OonaSettings",
    "RedeliverySettings",
    "RetentionLimits",
    "RetentionSettings",
    "ServerSettings",
    "Settings",
    "SettingsError",
    "Source",
    "TamiyoSettings",
    "configure_logging",
    "load",
    "sources",
]
