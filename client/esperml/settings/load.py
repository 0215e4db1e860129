"""Finds the settings in force and remembers where each came from.

pydantic validates; the layers are merged here, because ``esper config show`` must say for each value which layer set
it, and an unknown variable or key must be refused by name rather than ignored.
"""

from __future__ import annotations

import functools
import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from esperml.settings.model import Settings

ENVIRONMENT_PREFIX: Final = "ESPER_"
CONFIG_VARIABLE: Final = "ESPER_CONFIG"
NOT_SETTINGS: Final = frozenset(
    {
        CONFIG_VARIABLE,
        *("ESPER_TARGET", "ESPER_TOKEN", "ESPER_TOKEN_FILE", "ESPER_TLS", "ESPER_CA", "ESPER_CERT", "ESPER_KEY"),
        "ESPER_SPOOL",
    }
)
"""Variables that say which file to read, where and as whom to connect, or where a session keeps what is unsent."""
DEFAULT_FILE: Final = Path("esper.toml")


class SettingsError(ValueError):
    """A setting is unknown or has a bad value.

    Attributes:
        key: dotted name of the setting, for example ``server.port``.
        source: where it was set.
    """

    def __init__(self, key: str, source: str, problem: str) -> None:
        super().__init__(f"{key} (from {source}): {problem}")
        self.key = key
        self.source = source


@dataclass(frozen=True, slots=True)
class Source:
    """One setting in force.

    Attributes:
        key: dotted name.
        value: its value.
        origin: ``default``, ``file PATH``, ``environment NAME`` or ``flag --NAME``.
        description: what it is for.
    """

    key: str
    value: object
    origin: str
    description: str


def _fields(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting with its dotted name; sections may lie in sections."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def known_keys() -> list[str]:
    """Dotted names of all settings."""
    return [key for key, _ in _fields()]


def _flat(values: Mapping[str, object], known: frozenset[str], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        key = prefix + name
        if isinstance(value, dict) and key not in known:
            yield from _flat(value, known, f"{key}.")
        else:
            yield key, value


def _from_file(path: Path) -> Iterator[tuple[str, object, str]]:
    origin = f"file {path}"
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError("config", origin, "there is no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError("config", origin, f"is not valid TOML: {error}") from error
    except OSError as error:
        raise SettingsError("config", origin, f"cannot be read: {error.strerror}") from error
    for section, values in document.items():
        if not isinstance(values, dict):
            raise SettingsError(section, origin, f"is not a section; sections are {', '.join(Settings.model_fields)}")
    for key, value in _flat(document, frozenset(known_keys())):
        yield key, value, origin


def _from_environment(environment: Mapping[str, str]) -> Iterator[tuple[str, object, str]]:
    for name, value in environment.items():
        if name.startswith(ENVIRONMENT_PREFIX) and name not in NOT_SETTINGS:
            key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", ".")
            yield key, value, f"environment {name}"


def sources(
    *,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> tuple[Settings, list[Source]]:
    """The settings in force, and where each came from.

    Args:
        file: TOML file. Default: ``$ESPER_CONFIG``, or ``esper.toml`` in the working folder if there is one.
        environment: variables. ``ESPER_SERVER__PORT`` sets ``server.port``. Default: those of the process.
        flags: dotted name to value; ``None`` means that the flag was not given.

    Raises:
        SettingsError: a key is unknown or a value is bad; the error names it and its source.
    """
    environment = os.environ if environment is None else environment
    if file is None and CONFIG_VARIABLE in environment:
        file = Path(environment[CONFIG_VARIABLE])
    if file is None and DEFAULT_FILE.exists():
        file = DEFAULT_FILE

    known = set(known_keys())
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    layers = [
        *(_from_file(file) if file else ()),
        *_from_environment(environment),
        *(
            (key, value, f"flag --{key.rpartition('.')[2].replace('_', '-')}")
            for key, value in (flags or {}).items()
            if value is not None
        ),
    ]
    for key, value, origin in layers:
        if key not in known:
            raise SettingsError(key, origin, f"is unknown; {_nearest(key, known)}")
        _put(values, key, value)
        origins[key] = origin

    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise SettingsError(key, origins.get(key, "default"), f"{first['msg']}, not {first['input']!r}") from None
    listed = [
        Source(
            key=key,
            value=functools.reduce(getattr, key.split("."), settings),
            origin=origins.get(key, "default"),
            description=field.description or "",
        )
        for key, field in _fields()
    ]
    return settings, listed


def load(
    *,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> Settings:
    """The settings in force. Arguments and errors as for :func:`sources`."""
    return sources(file=file, environment=environment, flags=flags)[0]


def _put(values: dict[str, object], key: str, value: object) -> None:
    *sections, name = key.split(".")
    for section in sections:
        values = cast("dict[str, object]", values.setdefault(section, {}))
    values[name] = value


def _nearest(key: str, known: set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {close[0]}?" if close else "`esper config show` lists what there is"
