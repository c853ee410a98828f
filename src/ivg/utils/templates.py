"""Pages from Jinja templates (``templates/*.jinja`` of a package); text is escaped in HTML."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from ivg.utils.jsonl import to_json


def render(package: str, template: str, **values: Any) -> str:
    """Fill a template.

    Args:
        package: that has the folder ``templates``.
        template: file name such as ``report.html.jinja``; HTML is escaped automatically.
        values: variables of the template.
    """
    escape = select_autoescape(["html.jinja"], default=False)
    environment = Environment(
        loader=PackageLoader(package), autoescape=escape, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_function"] = lambda value, **_: to_json(value)
    return environment.get_template(template).render(**values)
