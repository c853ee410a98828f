"""Every error that ivg raises on purpose: one root, each also a standard error.

A message says what was got, what was expected and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class IVGError(Exception):
    """Root of all errors that ivg raises on purpose."""


class ConfigError(IVGError, ValueError):
    """An invalid setting: unknown name, out of range, contradiction."""


class PromptError(IVGError, ValueError):
    """A prompt that cannot be read: empty, too long, not text and not messages."""


class ContextLengthError(PromptError):
    """A prompt that, with its answer, exceeds a model's context.

    Args:
        message: what was got, what was expected, what to do.
        model: whose context.
        length: tokens of the prompt, or of its known part, which is then too long alone.
        new_tokens: requested length of the answer.
        limit: context length.
    """

    def __init__(self, message: str, *, model: str, length: int, new_tokens: int, limit: int) -> None:
        super().__init__(message)
        self.model, self.length, self.new_tokens, self.limit = model, length, new_tokens, limit


class VocabularyError(IVGError, ValueError):
    """Two models whose token ids do not mean the same text."""


class ModelError(IVGError, RuntimeError):
    """A model that cannot be loaded, or whose numbers are not finite."""


class MissingDependencyError(IVGError, ImportError):
    """A feature whose optional packages are not installed."""


class JudgeError(IVGError, RuntimeError):
    """A judge that cannot be used: not reachable, busy for too long, key refused."""


class OutputError(IVGError, OSError):
    """A file that cannot be written: full disk, read-only folder, another kind of file, or locked by another run."""


class ServeError(IVGError, RuntimeError):
    """A request that the server does not answer: not found, not allowed, too many at once, too late, a model that failed.

    Args:
        message: what was got, what was expected, what to do.
        status: of HTTP.
        code: for programs.
        param: the field of the request that is wrong.
    """

    def __init__(self, message: str, status: int = 500, code: str = "server_error", param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


class ScoreError(IVGError, ValueError):
    """A value or reward that has no number for some responses.

    Args:
        message: names the first.
        scores: of all responses: numbers, and a :class:`ScoreFault` for each that has none.
    """

    def __init__(self, message: str, scores: Sequence[float | ScoreFault]) -> None:
        super().__init__(message)
        self.scores = tuple(scores)


class ScoreFault(str):
    """Why a value or reward has no score for one response, in one line that names it.

    A text, like every error of a hypothesis; ``ivg serve`` shows its own clients less of it.

    Args:
        line: the whole line.
        said: the line without the message of a user's function.
        prompt: prompt and response cannot be read, whatever the value is.
    """

    said: str
    prompt: bool

    def __new__(cls, line: str, *, said: str = "", prompt: bool = False) -> ScoreFault:
        """A line of text that knows more."""
        made = super().__new__(cls, line)
        made.said, made.prompt = said or line, prompt
        return made


class UpstreamError(str):
    """The error of another server, in one line that names it.

    A text, like every error of a hypothesis; ``ivg serve`` shows its own clients less of it.

    Args:
        line: the whole line.
        status: of HTTP; None: no answer came, or none that is a completion.
        said: the other server's own message, without its address.
    """

    status: int | None
    said: str

    def __new__(cls, line: str, status: int | None = None, said: str = "") -> UpstreamError:
        """A line of text that knows more."""
        made = super().__new__(cls, line)
        made.status, made.said = status, said
        return made


class GenerationError(IVGError, RuntimeError):
    """A response that failed while it was streamed (``Completion.error``), or whose stream was closed before its end."""


class NoTokenFault(str):
    """Why no token can be drawn: a request's own settings forbid them all. A text, like every error of a hypothesis."""


def reason(e: BaseException, longest: int = 400) -> str:
    """The first line of what an exception says, and the next where it goes on there; what is too long ends between words."""
    first, *rest = (str(e).strip() or type(e).__name__).splitlines()
    line = f"{first.strip()} {rest[0].strip()}" if first.rstrip().endswith(":") and rest else first.strip()
    if not isinstance(e, OSError | ValueError | RuntimeError | ImportError):  # its words alone may mean nothing: KeyError says 'llama9'
        line = f"{type(e).__name__}: {line}"
    return shortened(line, longest)


def shortened(line: str, longest: int = 400) -> str:
    """``line``, of which at most ``longest`` characters are shown: whole words, and a sign that there were more."""
    return line if len(line) <= longest else f"{line[:longest].rpartition(' ')[0] or line[:longest]} …"


def show_value(value: Any) -> str:
    """A value in an error: its beginning, and JSON's word for nothing."""
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
