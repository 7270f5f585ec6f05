"""The requests that lmms-eval and VLMEvalKit send, rebuilt from their source, on a small task.

lmms-eval: `lmms_eval/models/simple/openai.py`, class `OpenAICompatible`, `generate_until`.
VLMEvalKit: `vlmeval/api/gpt.py`, class `OpenAIWrapper`, `prepare_itlist` and `generate_inner`.
"""

from __future__ import annotations

import base64
import io
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import requests
from PIL import Image

from tests.runtime.server.conftest import Served, questions

TASK = questions()[::126]
ENOUGH = 0.75
"""Share of right answers; the model's own, with 64 tokens, is 0.95 on all questions."""


def lmms_eval_payload(model: str, context: str, visual: Image.Image) -> dict[str, Any]:
    output_buffer = io.BytesIO()
    visual.save(output_buffer, format="PNG")
    img = base64.b64encode(output_buffer.getvalue()).decode("utf-8")
    payload: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": []}],
        "max_tokens": min(4096, 1024),
        "temperature": 0,
    }
    content = payload["messages"][0]["content"]
    content.append({"type": "text", "text": context})
    content.append({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{img}"}})
    return payload


def reasoning_payload(payload: dict[str, Any]) -> dict[str, Any]:
    """What lmms-eval makes of it for a model whose name has o1 in it."""
    payload = dict(payload)
    payload.pop("temperature")
    payload["reasoning_effort"] = "medium"
    payload["response_format"] = {"type": "text"}
    payload["max_completion_tokens"] = payload.pop("max_tokens")
    return payload


def test_lmms_eval(server: Served) -> None:
    """Its client repeats failed requests; 32 of them are sent at once."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=5)

    def ask(item: tuple[Path, str, str]) -> bool:
        file, question, answer = item
        payload = lmms_eval_payload("pocket-llava", question, Image.open(file).convert("RGB"))
        first = client.chat.completions.create(**payload).choices[0].message.content
        second = client.chat.completions.create(**reasoning_payload(payload))
        assert second.choices[0].message.content == first
        return first == answer

    with ThreadPoolExecutor(max_workers=32) as executor:
        right = list(executor.map(ask, TASK))
    assert len(right) == 21
    assert sum(right) / len(right) >= ENOUGH


def vlmevalkit_request(
    model: str, system: str | None, inputs: list[dict[str, str]], key: str
) -> tuple[dict[str, str], str]:
    content_list: list[dict[str, Any]] = []
    for msg in inputs:
        if msg["type"] == "text":
            content_list.append({"type": "text", "text": msg["value"]})
        else:
            buffer = io.BytesIO()
            Image.open(msg["value"]).convert("RGB").save(buffer, format="JPEG")
            b64 = base64.b64encode(buffer.getvalue()).decode("utf-8")
            img_struct = {"url": f"data:image/jpeg;base64,{b64}", "detail": "low"}
            content_list.append({"type": "image_url", "image_url": img_struct})
    messages: list[dict[str, Any]] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    messages.append({"role": "user", "content": content_list})
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    payload = {"model": model, "messages": messages, "n": 1, "temperature": 0, "max_tokens": 2048}
    return headers, json.dumps(payload)


def test_vlmevalkit(server: Served) -> None:
    right = 0
    for number, (file, question, answer) in enumerate(TASK):
        inputs = [{"type": "image", "value": str(file)}, {"type": "text", "value": question}]
        system = "answer the question" if number == 0 else None
        headers, data = vlmevalkit_request("pocket-llava", system, inputs, "sk-none")
        response = requests.post(
            f"{server.url}/v1/chat/completions", headers=headers, data=data, timeout=66
        )
        assert response.status_code == 200
        said = json.loads(response.text)["choices"][0]["message"]["content"].strip()
        right += said == answer
    assert right / len(TASK) >= ENOUGH
