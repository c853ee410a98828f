"""Pictures in prompts: where they may come from, and how large they may be."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ivg.settings import rules as r
from ivg.settings.schema import Setting
from ivg.settings.tables import Table

_COUNT = r.count(1)


class ImagesConfig(Table):
    """Pictures in prompts (docs/how-to/images.md)."""

    enabled: Annotated[
        bool,
        Setting(
            "Load the base so that it reads pictures, where its checkpoint can also be loaded for text alone (Llama 4, Qwen 3.5).",
            flags=("--images",),
        ),
    ] = False
    allowed_media_domains: Annotated[
        tuple[str, ...],
        Field(strict=False),
        Setting(
            "Host from which pictures may be fetched by http or https, or * for any; may be repeated.",
            flags=("--allowed-media-domains",),
            unset="none",
        ),
    ] = ()
    allowed_local_media_path: Annotated[
        str | None,
        Setting(
            "Folder whose files HTTP clients may name as pictures.",
            flags=("--allowed-local-media-path",),
            unset="none; library and command line read any file",
        ),
    ] = None
    max_images: Annotated[int, Setting("Maximum number of pictures of one prompt.", _COUNT)] = 16
    max_bytes: Annotated[int, Setting("Maximum size of a picture's file in bytes.", r.count(1024))] = 20 << 20
    max_pixels: Annotated[int, Setting("Maximum size of a picture in pixels.", _COUNT)] = 1 << 26
    timeout: Annotated[float, Setting("Seconds to fetch one picture.", r.POSITIVE)] = 10.0
