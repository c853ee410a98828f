"""Pictures in messages: what a content part says of one. Where pictures may come from is decided by who reads them (``models.images``).

Standard library only; a ``PIL.Image`` is taken where one is given.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from ivg.errors import PromptError

IMAGE_PARTS = ("image_url", "image", "input_image")
"""Types of content parts that hold a picture: of chat completions, of transformers, and of OpenAI's Responses API."""
_KEYS = ("image_url", "image", "url", "path", "base64")
_EXPECTED = '{"type": "image_url", "image_url": {"url": …}} or {"type": "image", "path": …} (or "url")'


@dataclass(frozen=True, slots=True)
class Image:
    """One picture of a message.

    Attributes:
        source: a path, an http(s) URL, or a data: URL, which is cut once it was read.
        part: the content part as it was given, as JSON; empty once it was read.
        digest: of the file's content, once it was read: pictures with other content are not equal.
        data: the file's content, once it was read.
    """

    source: str = field(repr=False)
    part: str = field(default="", repr=False, compare=False)
    digest: str = ""
    data: bytes | None = field(default=None, repr=False, compare=False)

    @property
    def kind(self) -> str:
        """``data``, ``url`` or ``path``."""
        start = self.source[:8].lower()
        return "data" if start.startswith("data:") else "url" if start.startswith(("http://", "https://")) else "path"

    @property
    def shown(self) -> str:
        """The source in an error: paths and addresses whole, unless they are very long."""
        longest = 40 if self.kind == "data" else 500
        return self.source if len(self.source) <= longest else f"{self.source[:longest]}…"

    @classmethod
    def of(cls, part: Mapping[str, Any], where: str) -> Image:
        """Read a content part of one of :data:`IMAGE_PARTS`.

        Raises:
            PromptError: no picture in it; names the place.
        """
        given = {key: part[key] for key in _KEYS if part.get(key) is not None}
        value = next(iter(given.values()), None)
        if isinstance(value, Mapping):
            value = value.get("url")
        if "base64" in given and isinstance(value, str):
            value = f"data:;base64,{value}"
        if len(given) != 1 or value is None or (isinstance(value, str) and not value.strip()):
            got = ", ".join(map(str, part)) or "nothing"
            raise PromptError(f"{where} is a picture with {got}\n  expected {_EXPECTED}")
        if isinstance(value, str):
            return cls(_path_of(value), json.dumps(part, ensure_ascii=False))
        source = _data_url(value)
        if source is None:
            raise PromptError(f"{where} is a picture of type {type(value).__name__}\n  expected {_EXPECTED}")
        return cls(source, json.dumps({"type": "image", "url": source}))

    def with_data(self, data: bytes) -> Image:
        """The picture once its content was read."""
        source = "data:" if self.kind == "data" else self.source
        return Image(source, "", hashlib.sha256(data).hexdigest(), data)

    @property
    def plain(self) -> dict[str, Any]:
        """The content part as JSON has it."""
        if self.part:
            found: dict[str, Any] = json.loads(self.part)
            return found
        if self.kind == "data" and self.data is not None:
            return {"type": "image", "url": _data_url(self.data)}
        return {"type": "image", "path" if self.kind == "path" else "url": self.source}


def _path_of(text: str) -> str:
    return unquote(urlsplit(text).path) if text.lower().startswith("file:") else text


def _data_url(value: Any) -> str | None:
    """A picture that is no text as a data: URL; None: it is no picture."""
    if isinstance(value, bytes | bytearray):
        content, kind = bytes(value), ""
    elif hasattr(value, "__fspath__"):
        return str(value)
    elif type(value).__module__.partition(".")[0] == "PIL":
        from PIL import ImageOps

        file = io.BytesIO()
        ImageOps.exif_transpose(value).convert("RGB").save(file, "PNG")
        content, kind = file.getvalue(), "image/png"
    else:
        return None
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
