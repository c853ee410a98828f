"""Hooks of the documentation site (mkdocs.yml)."""

import os.path
import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]*)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links to files outside docs/ lead to the repository; without its address (IVG_REPOSITORY_URL) only their text is left."""

    def link(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = os.path.normpath(os.path.join("docs", os.path.dirname(page.file.src_uri), target))  # noqa: PTH118, PTH120
        if path.startswith("docs/"):
            return match[0]
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})" if config.repo_url else text

    return LINK.sub(link, markdown)
