"""Logs as JSON, one object a line. Prompts and completions are not logged, unless ``log_prompts`` is set."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

log = logging.getLogger("ivg.serve")


class JSONFormatter(logging.Formatter):
    """Time, level, message, and the fields given as ``extra={"fields": {...}}``."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        out: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            out["trace"] = self.formatException(record.exc_info)
        return json.dumps(out, default=str)


def configure_logging() -> None:
    """Send all logs and Python warnings to standard error as JSON; turn progress bars off."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter())
    for name, level in (("", logging.WARNING), ("ivg.serve", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.captureWarnings(True)
    for name in ("transformers", "huggingface_hub", "py.warnings"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    transformers_logging.disable_progress_bar()
    disable_progress_bars()


def log_event(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log ``event`` with fields."""
    log.log(level, event, extra={"fields": fields})
