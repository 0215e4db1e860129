"""How the program's own log is written: structlog, to standard error, so that standard output stays for results."""

from __future__ import annotations

import logging
import sys

from esperml.settings.model import LogSettings


def configure_logging(settings: LogSettings) -> None:
    """Set the level and the format of the log of this process."""
    import structlog  # It imports rich, for which `--help` must not wait.

    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if settings.format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.level.upper()]),
        # Standard error as it is when something is written: it may be another by then.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )
