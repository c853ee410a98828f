"""The OpenAPI schema: request bodies, which the application parses itself, and error responses."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from ivg.serving.protocol import ChatRequest, CompletionRequest
from ivg.serving.responses_api.request import ResponsesRequest

ERROR_STATUSES = (400, 401, 404, 408, 413, 415, 429, 500, 502, 503, 504)
_BODIES = (ChatRequest, CompletionRequest, ResponsesRequest)
_REFERENCE = "#/components/schemas/{model}"


def request_body(kind: type[BaseModel]) -> dict[str, Any]:
    """The part of an operation that describes its body."""
    content = {"application/json": {"schema": {"$ref": _REFERENCE.format(model=kind.__name__)}}}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI, model_names: list[str]) -> None:
    """Add bodies, model names and errors to the schema; errors are OpenAI's objects, not FastAPI's 422."""
    fastapi_schema = app.openapi
    shape = {"type": "object", "required": ["error"], "properties": {"error": {"type": "object"}}}
    error = {"description": "An error in OpenAI's format.", "content": {"application/json": {"schema": shape}}}

    def openapi() -> dict[str, Any]:
        schema = fastapi_schema()
        kinds: Any = [(kind, "validation") for kind in _BODIES]
        definitions = models_json_schema(kinds, ref_template=_REFERENCE)[1]["$defs"]
        schema.setdefault("components", {}).setdefault("schemas", {}).update(definitions)
        for kind in _BODIES:
            schema["components"]["schemas"][kind.__name__]["properties"]["model"]["enum"] = model_names
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                if path.endswith(("completions", "responses")):
                    operation["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
                operation["responses"].pop("422", None)
                for status in ERROR_STATUSES:
                    operation["responses"].setdefault(str(status), error)
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
