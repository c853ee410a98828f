"""What answers in ``ivg chat``: models of this process, or a running server."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ivg.errors import ConfigError, GenerationError, IVGError, ServeError
from ivg.types import Completion, Step, TraceNode, Usage

if TYPE_CHECKING:
    from ivg.model import GuidedModel

Turn = dict[str, Any]
"""One message: role and content."""
KEY_VARIABLES = ("IVG_API_KEY", "OPENAI_API_KEY")
"""Environment variables with the key of a server; the first that is set counts."""
CONNECT_SECONDS = 10.0
READ_SECONDS = 600.0
OPENAI_NAMES = {"max_new_tokens": "max_tokens"} | {
    name: name for name in ("temperature", "top_p", "frequency_penalty", "presence_penalty", "stop", "seed")
}
"""Settings that OpenAI's chat completions have, by our name."""
THINK_END = "</think>"
"""Between the thinking and the answer of a server, which sends them apart."""


@dataclass(frozen=True)
class Backend(ABC):
    """Answers conversations.

    Attributes:
        name: for the greeting.
        methods: that can be asked for.
        chats: it reads conversations; else every message is continued by itself.
    """

    name: str
    methods: tuple[str, ...]
    chats: bool

    @abstractmethod
    def check(self, method: str | None, settings: Mapping[str, Any]) -> None:
        """Raise ConfigError where the settings do not go with the method, as far as that is known before a request."""

    @abstractmethod
    def answer(self, turns: Sequence[Turn], method: str | None, settings: Mapping[str, Any], show: Callable[[str], None]) -> Completion:
        """Answer the last turn; ``show`` gets pieces of text.

        Raises:
            IVGError: it cannot be answered.
        """


@dataclass(frozen=True)
class LocalBackend(Backend):
    """Models of this process."""

    model: GuidedModel

    def check(self, method: str | None, settings: Mapping[str, Any]) -> None:
        """See :meth:`Backend.check`."""
        self.model.request("x", self.model.with_instruction(self.model.get_method(method or "ivg")), **settings)

    def answer(self, turns: Sequence[Turn], method: str | None, settings: Mapping[str, Any], show: Callable[[str], None]) -> Completion:
        """See :meth:`Backend.answer`."""
        prompt = list(turns) if self.chats else turns[-1]["content"]
        with self.model.stream(prompt, method or "ivg", trace=True, **settings) as stream:
            for piece in stream:
                show(piece)
            return stream.read()


@dataclass(frozen=True)
class ServerBackend(Backend):
    """A server that runs ``ivg serve``, or any that has OpenAI's chat completions.

    Attributes:
        url: of the server, without ``/v1``.
        model: its name there.
        is_ivg: it lists methods.
    """

    url: str
    model: str
    is_ivg: bool

    @classmethod
    def connect(cls, url: str) -> ServerBackend:
        """Ask the server for its models.

        Raises:
            ConfigError: not reachable, or it lists no models.
        """
        url = url.rstrip("/").removesuffix("/v1")
        try:
            with _open(f"{url}/v1/models", timeout=CONNECT_SECONDS) as response:
                listed = [entry for entry in json.load(response)["data"] if isinstance(entry["id"], str)]
                model = listed[0]["id"]
        except IVGError:
            raise
        except (ValueError, KeyError, TypeError, IndexError):
            raise ConfigError(
                f"{url}/v1/models lists no models\n  expected the address of ivg serve, such as http://localhost:8000"
            ) from None
        methods = tuple(dict.fromkeys(e["ivg"]["method"] for e in listed if "ivg" in e))
        return cls(f"{model} at {url}", methods, chats=True, url=url, model=model, is_ivg=bool(methods))

    def check(self, method: str | None, settings: Mapping[str, Any]) -> None:
        """The server checks settings itself."""
        if method is not None and self.is_ivg and method not in (*self.methods, "custom"):
            raise ConfigError(f"unknown method {method!r}\n  the server has: {', '.join(self.methods)}")
        others = [*(["method"] if method is not None else []), *(name for name in settings if name not in OPENAI_NAMES)]
        if not self.is_ivg and others:
            raise ConfigError(f"this server is not ivg's: it has no {', '.join(others)}\n  expected some of: {', '.join(OPENAI_NAMES)}")

    def answer(self, turns: Sequence[Turn], method: str | None, settings: Mapping[str, Any], show: Callable[[str], None]) -> Completion:
        """See :meth:`Backend.answer`."""
        thinking, content, finish, own, begun = "", "", None, dict[str, Any](), time.monotonic()
        usage, steps = dict[str, Any](), list[Step]()
        for name, data in self._events(self._body(turns, method, settings)):
            if error := data.get("error"):
                raise GenerationError(str(error.get("message", error) if isinstance(error, Mapping) else error))
            if name == "ivg.beams":
                steps.append(_step(data))
                continue
            usage, own = data.get("usage") or usage, data.get("ivg") or own
            for choice in data.get("choices") or ():
                delta = choice.get("delta") or {}
                thought, piece = delta.get("reasoning_content") or "", delta.get("content") or ""
                ends_thinking = bool(piece) and not content and bool(thinking + thought)
                if shown := thought + (THINK_END if ends_thinking else "") + piece:
                    show(shown)
                thinking, content, finish = thinking + thought, content + piece, choice.get("finish_reason") or finish
        if finish is None:
            raise GenerationError(f"{self.url} ended the answer in the middle")
        seconds = own.get("seconds", time.monotonic() - begun)
        cost = Usage(own.get("usage", {}), usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), seconds)
        text, marker = (thinking + (THINK_END if content else "") + content, THINK_END) if thinking else (content, None)
        notes = tuple(own.get("notes", ()))
        return Completion(text, (), own.get("score"), finish, cost, trace=tuple(steps), notes=notes, guide_after=marker)

    def _body(self, turns: Sequence[Turn], method: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The request: settings of sampling under OpenAI's names, those of the search in ``guidance``."""
        body: dict[str, Any] = {OPENAI_NAMES[name]: value for name, value in settings.items() if name in OPENAI_NAMES}
        guidance = {name: value for name, value in settings.items() if name not in OPENAI_NAMES} | ({"method": method} if method else {})
        body |= {"guidance": guidance} if guidance else {}
        options = {"include_usage": True} | ({"include_beams": True} if self.is_ivg else {})
        return body | {"model": self.model, "messages": list(turns), "stream": True, "stream_options": options}

    def _events(self, body: dict[str, Any]) -> Iterator[tuple[str | None, dict[str, Any]]]:
        """(name, data) of the server-sent events of an answer.

        Raises:
            GenerationError: the connection breaks, or something else is sent.
        """
        name = None
        with _open(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), READ_SECONDS) as response:
            try:
                for raw in response:
                    line = raw.decode().rstrip("\r\n")
                    if line.startswith("event: "):
                        name = line[7:]
                    elif line.startswith("data: ") and line != "data: [DONE]":
                        yield name, json.loads(line[6:])
                    elif not line:
                        name = None
            except (OSError, ValueError, http.client.HTTPException) as e:
                raise GenerationError(f"{self.url} ended the answer in the middle: {e}") from None


def _open(url: str, body: bytes | None = None, timeout: float = READ_SECONDS) -> Any:
    """An HTTP response of the server.

    Raises:
        ConfigError: it is not reachable.
        ServeError: it refuses the request; has its message.
    """
    key = _key()
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=timeout)
    except urllib.error.HTTPError as e:
        try:
            message = json.load(e)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"{url} answered {e.code} {e.reason}"
        hint = f"\n  set {KEY_VARIABLES[0]}" if e.code == 401 else ""
        raise ServeError(f"{message}{hint}", e.code) from None
    except (OSError, ValueError) as e:
        reason = getattr(e, "reason", None) or e
        raise ConfigError(f"cannot reach {url}: {reason}\n  expected the address of ivg serve, such as http://localhost:8000") from None


def _key() -> str | None:
    """The key of the server.

    Raises:
        ConfigError: it has characters that no HTTP header may have; they are not shown.
    """
    for name in KEY_VARIABLES:
        if key := os.environ.get(name, "").strip():  # a file's last line break, Windows' too
            if not key.isascii() or not key.isprintable():
                raise ConfigError(f"{name} cannot be sent\n  expected ASCII characters in one line")
            return key
    return None


def _step(data: Mapping[str, Any]) -> Step:
    kept, dropped = (tuple(_node(beam, kept=mark) for beam in data[name]) for name, mark in (("kept", True), ("dropped", False)))
    return Step(0, kept, dropped, data["committed"])


def _node(beam: Mapping[str, Any], *, kept: bool) -> TraceNode:
    tokens, shift = tuple(beam["tokens"]), tuple(beam["shift"])
    return TraceNode(beam["key"], beam["parent"], beam["text"], tokens, shift, beam["score"], kept, beam["finish"])


def without_trace(completion: Completion) -> dict[str, Any]:
    """A completion as JSON has it; what a server does not send is left out."""
    out = replace(completion, trace=()).to_dict()
    if not completion.token_ids:
        del out["token_ids"]
    return out
