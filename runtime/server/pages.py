"""The pages for people: the reference at `/docs`, and the folder of static files.

They load nothing from elsewhere, so they work on a robot without the internet.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

STATIC = Path(__file__).parent / "static"
"""Served at `/static`; `index.html` in it is the page at `/`."""
SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
        "object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


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
