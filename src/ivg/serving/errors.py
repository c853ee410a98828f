"""Errors as clients see them: OpenAI's JSON object and headers, without file paths or addresses of this machine.

Independent of models and web frameworks.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from ivg.errors import ConfigError, IVGError, MissingDependencyError, NoTokenFault, PromptError, ScoreFault, ServeError, UpstreamError
from ivg.serving.protocol import Guidance
from ivg.settings.sampling import STRUCTURES


def client_error(error: Exception, param: str = "prompt", given: Collection[str] = ()) -> ServeError:
    """The HTTP error for an error that ivg raised on purpose.

    Args:
        error: any :class:`~ivg.errors.IVGError`.
        param: the field of the body that holds the prompt.
        given: fields of the body at its top level; other settings were given in ``guidance``.
    """
    if isinstance(error, ServeError):
        return error
    message = redact(str(error))
    if isinstance(error, PromptError):
        path = re.match(r"messages(?:\.\w+|\[\d+\])*", message)
        return ServeError(message, 400, "invalid_prompt", path[0] if path else param)
    if isinstance(error, ConfigError | ValueError | MissingDependencyError):
        field = message.partition(" ")[0].rstrip(":")
        if field in STRUCTURES or message.startswith("structured output"):
            outer = ("response_format", "structured_outputs", *STRUCTURES)
            field = next((name for name in outer if name in given), field)
        inner = f"guidance.{field}" if field in Guidance.model_fields else "guidance"
        return ServeError(message, 400, "invalid_value", field if field in given else inner)
    return ServeError(message, 500, "model_error")


def completion_error(error: str, structure: str = "guidance") -> ServeError:
    """The HTTP error for ``Completion.error``. Addresses of an upstream server are left out.

    Args:
        error: of the completion.
        structure: the field of the body that forbids tokens.
    """
    if isinstance(error, ScoreFault):
        return client_error(PromptError(error)) if error.prompt else ServeError(redact(error.said), 500, "model_error")
    if isinstance(error, NoTokenFault):
        return ServeError(error, 400, "invalid_value", structure)
    if not isinstance(error, UpstreamError):
        return ServeError(redact(error), 500, "model_error")
    if error.status in (400, 413, 422):  # the request's own fault: mostly too long
        return ServeError(redact(error.said), 400, "invalid_request")
    if error.status is None or error.status in (408, 409, 429) or error.status >= 500:
        return ServeError("the upstream engine is unavailable or overloaded; try again later", 503, "upstream_unavailable")
    return ServeError("the upstream engine rejected the request; see the server's log", 502, "upstream_refused")


def model_error(error: Exception) -> ServeError:
    """The HTTP error for the request on which a model failed."""
    return client_error(error) if isinstance(error, IVGError) else ServeError("a model failed on this request", 500, "model_error")


def unavailable() -> ServeError:
    """The HTTP error while a failed model cannot be restarted."""
    return ServeError("a model failed and could not be restarted; try again later", 503, "unavailable")


def error_body(error: ServeError) -> dict[str, Any]:
    """OpenAI's error object."""
    types = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = types.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_headers(error: ServeError) -> dict[str, str]:
    """Headers that tell clients whether and when to retry."""
    if error.status == 429 or error.code in ("unavailable", "upstream_unavailable", "too_many_connections"):
        return {"retry-after": "1"}
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    return {"x-should-retry": "false"} if error.code in ("model_error", "deadline_exceeded", "upstream_refused") else {}


def one_line(message: str) -> str:
    """A message of several lines (got, expected, what to do) as one line, its parts separated by semicolons."""
    out = ""
    for line in filter(None, map(str.strip, message.splitlines())):
        out += f"{' ' if out[-1] in ':;,.' else '; '}{line}" if out else line
    return out


def redact(message: str) -> str:
    """One line in which every file path is cut to its last part."""
    return re.sub(r"(?<![\w.:/~])~?/(?!v1/)(?:[\w.+@-]+/)+([\w.+@-]*)", r"\1", one_line(message))
