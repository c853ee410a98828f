"""Reads the pictures of a prompt: files, data: URLs, and http(s) URLs of hosts that are allowed, within limits.

Must not depend on networks or processors (``models.image_prompts``).
"""

from __future__ import annotations

import base64
import binascii
import io
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from typing_extensions import override

from ivg.errors import MissingDependencyError, PromptError, reason
from ivg.settings.images import ImagesConfig
from ivg.types import Image, Prompt

_ADVICE = "give a file or a data: URL, or allow the host (images.allowed_media_domains)"


class ImageReader:
    """Turns the pictures of prompts into their content.

    Args:
        limits: where they may come from, and how large they may be.
        local: files that may be read: True: any; else those in ``limits.allowed_local_media_path``.
    """

    def __init__(self, limits: ImagesConfig | None = None, *, local: bool = True) -> None:
        self.limits, self.local = limits or ImagesConfig(), local

    def read(self, prompt: Prompt) -> Prompt:
        """``prompt`` with the content of all its pictures; those that have it already are not read again.

        Raises:
            PromptError: too many, not allowed, not found, too large.
        """
        if len(prompt.images) > self.limits.max_images:
            raise PromptError(
                f"the prompt has {len(prompt.images)} pictures\n  expected at most {self.limits.max_images} (images.max_images)"
            )
        if isinstance(prompt.content, str) or all(image.data is not None for image in prompt.images):
            return prompt
        turns = [
            replace(turn, parts=tuple(self._with_data(part) if isinstance(part, Image) else part for part in turn.parts))
            for turn in prompt.content
        ]
        return replace(prompt, content=tuple(turns))

    def _with_data(self, image: Image) -> Image:
        if image.data is not None:
            return image
        data = {"data": self._from_data_url, "url": self._from_url, "path": self._from_file}[image.kind](image)
        if len(data) > self.limits.max_bytes:
            raise self._too_large(image)
        return image.with_data(data)

    def _from_data_url(self, image: Image) -> bytes:
        head, comma, body = image.source.partition(",")
        if len(body) > 4 * self.limits.max_bytes:
            raise self._too_large(image)
        try:
            if not comma:
                raise ValueError
            if not head.lower().endswith(";base64"):
                return unquote_to_bytes(body)
            return base64.b64decode("".join(unquote_to_bytes(body).decode("ascii").split()), validate=True)
        except (ValueError, binascii.Error):
            raise PromptError(f"the picture {image.shown} is no data: URL\n  expected data:image/png;base64,…") from None

    def _from_file(self, image: Image) -> bytes:
        path = Path(image.source)
        if not self.local:
            allowed = self.limits.allowed_local_media_path
            path = path.resolve()
            if allowed is None or not path.is_relative_to(Path(allowed).resolve()):
                raise PromptError(
                    f"the picture {image.shown} is a file of this server, which clients may not read\n"
                    "  send its content as a data: URL (or start the server with --allowed-local-media-path)"
                )
        try:
            size = path.stat().st_size if path.is_file() else None
            content = path.read_bytes() if size is not None and size <= self.limits.max_bytes else b""
        except (OSError, ValueError) as e:  # a path with a null byte is a ValueError
            raise PromptError(f"cannot read the picture {image.shown}: {reason(e)}") from None
        if size is None:
            raise PromptError(f"no picture at {image.shown}\n  expected a file, a data: URL or an http(s) URL")
        if size > self.limits.max_bytes:
            raise self._too_large(image)
        return content

    def _from_url(self, image: Image) -> bytes:
        self._check_host(image.source)
        opener = urllib.request.build_opener(_Redirects(self))
        request = urllib.request.Request(image.source, headers={"User-Agent": "ivg"})
        ends = time.monotonic() + self.limits.timeout
        content = bytearray()
        try:
            with opener.open(request, timeout=self.limits.timeout) as response:
                while piece := response.read1(1 << 16):
                    content += piece
                    if len(content) > self.limits.max_bytes:
                        raise self._too_large(image)
                    if time.monotonic() > ends:
                        raise TimeoutError("it took too long")
        except (OSError, ValueError) as e:  # urllib's errors are OSErrors
            if isinstance(e, PromptError):
                raise
            raise PromptError(f"cannot fetch the picture {image.shown}: {reason(e)}\n  {_ADVICE}") from None
        return bytes(content)

    def _check_host(self, url: str) -> None:
        host, allowed = urlsplit(url).hostname, self.limits.allowed_media_domains
        if not host or ("*" not in allowed and host.lower() not in {name.lower() for name in allowed}):
            raise PromptError(f"pictures from {host or url[:80]} are not allowed here\n  {_ADVICE}")

    def _too_large(self, image: Image) -> PromptError:
        return PromptError(f"the picture {image.shown} is larger than {self.limits.max_bytes} bytes (images.max_bytes)")

    def decode(self, image: Image) -> Any:
        """The picture as a ``PIL.Image`` in RGB, upright, as transformers reads it.

        Raises:
            PromptError: no picture, or one of too many pixels.
            MissingDependencyError: Pillow is not installed.
        """
        try:
            from PIL import Image as Pillow
            from PIL import ImageOps
        except ModuleNotFoundError:
            raise MissingDependencyError(
                "pictures in prompts need the package Pillow, which is not installed\n  pip install 'ivg[images]'"
            ) from None
        try:
            found = Pillow.open(io.BytesIO(self._with_data(image).data or b""))
            if found.width * found.height > self.limits.max_pixels:
                raise PromptError(
                    f"the picture {image.shown} has {found.width} x {found.height} pixels"
                    f"\n  expected at most {self.limits.max_pixels} (images.max_pixels)"
                )
            return ImageOps.exif_transpose(found).convert("RGB")
        except PromptError:
            raise
        except Exception:  # decoders raise anything for broken files
            raise PromptError(f"{image.shown} is no picture that Pillow can read\n  expected PNG, JPEG, WebP …") from None


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to hosts that are allowed, alone."""

    def __init__(self, reader: ImageReader) -> None:
        self.reader = reader

    @override
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith(("http://", "https://")):
            raise PromptError(f"a picture's URL leads to {newurl[:80]}\n  {_ADVICE}")
        self.reader._check_host(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)
