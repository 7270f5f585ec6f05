"""The pages for people: the live page at `/`, the reference at `/docs`, and their static files.

They load nothing from elsewhere, so they work on a robot without the internet.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles

STATIC = Path(__file__).parent / "static"
"""Served at `/static`; `index.html` in it is the live page."""
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class PageFiles(StaticFiles):
    """The static files; a browser asks each time whether they are still the same."""

    def __init__(self) -> None:
        super().__init__(directory=STATIC)

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """Return a file with the headers of a page."""
        response = super().file_response(*args, **kwargs)
        response.headers.update(SECURITY_HEADERS)
        return response


def live_page() -> Response:
    """Return the page at `/`."""
    return FileResponse(STATIC / "index.html", headers=SECURITY_HEADERS)


def reference_page(openapi: dict[str, Any]) -> str:
    """Return the OpenAPI document as a page."""
    title = escape(openapi["info"]["title"])
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        '<meta name=viewport content="width=device-width">'
        '<link rel=stylesheet href="/static/reference.css">'
        f"<main><h1>{title}</h1><p>{escape(openapi['info'].get('description', ''))}</p>"
        '<p>As a document for programs: <a href="/openapi.json">openapi.json</a></p>'
    ]
    for path, methods in openapi["paths"].items():
        parts += [_operation(path, method, told) for method, told in methods.items()]
    parts.append("<h2>Schemas</h2>")
    for name, schema in openapi.get("components", {}).get("schemas", {}).items():
        parts.append(f"<h3 id={escape(name)}>{escape(name)}</h3>{_pre(schema)}")
    return "".join([*parts, "</main></html>"])


def _operation(path: str, method: str, told: dict[str, Any]) -> str:
    rows = [
        f"<li><code>{escape(one['name'])}</code> ({escape(one['in'])}): "
        f"{escape(one.get('description', ''))}</li>"
        for one in told.get("parameters", [])
    ]
    text = escape(told.get("description", "")).replace("\n\n", "<p>")
    body = ""
    for kind, content in told.get("requestBody", {}).get("content", {}).items():
        body += f"<p>Body: <code>{escape(kind)}</code>{_pre(content.get('schema', {}))}"
    return (
        f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{text}</p>"
        f"<ul>{''.join(rows)}</ul>{body}"
    )


def _pre(schema: dict[str, Any]) -> str:
    return f"<pre>{escape(json.dumps(schema, indent=2))}</pre>"
