"""What OpenAPI says of the requests, which the routes read by themselves."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from pipeline.serving.service import Service

REF = "#/components/schemas/{model}"
MOST_QUERIES = 16
FILES: dict[str, Any] = {
    "type": "array",
    "items": {"type": "string", "format": "binary", "contentMediaType": "application/octet-stream"},
    "description": "Pictures and masks (jpg, png, webp) that the recipe counts from 0.",
}


def multipart(
    properties: dict[str, Any], required: list[str], json_field: str | None = None
) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }
    content: dict[str, Any] = {"schema": schema}
    if json_field:
        content["encoding"] = {json_field: {"contentType": "application/json"}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": content}}}


def describe(app: FastAPI, service: Service, with_token: bool) -> None:
    """OpenAPI with the recipe's model, which the route reads out of a form field by itself."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            found = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            recipe = service.recipe.model_json_schema(ref_template=REF)
            found["components"]["schemas"] |= recipe.pop("$defs", {})
            found["components"]["schemas"]["Recipe"] = recipe
            if with_token:
                found["components"]["securitySchemes"] = {
                    "token": {"type": "http", "scheme": "bearer"}
                }
                found["security"] = [{"token": []}]
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
