"""OpenAI's Python SDK over /v1/chat/completions."""

from typing import Any

from openai import NotFoundError, OpenAI
from told import ASKED, ENDLESS, KEY, MODEL, QUESTION, STORY, TIMEOUT_S, TOOL, URL, WEATHER, City, run

client = OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=TIMEOUT_S)
TOOLS: Any = [{"type": "function", "function": TOOL}]


def said(text: str) -> Any:
    return {"role": "user", "content": text}


def chat() -> str | None:
    answer = client.chat.completions.create(model=MODEL, messages=[said(QUESTION)], max_tokens=20, temperature=0)
    return answer.choices[0].message.content


def stream() -> str:
    chunks = client.chat.completions.create(
        model=MODEL, messages=[said(QUESTION)], max_tokens=20, temperature=0, stream=True
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def tools() -> Any:
    messages = [said(ASKED)]
    first = client.chat.completions.create(
        model=MODEL, messages=messages, tools=TOOLS, tool_choice="required", max_tokens=120, temperature=0
    )
    message = first.choices[0].message
    (call, *_) = message.tool_calls or []
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": WEATHER}]
    second = client.chat.completions.create(model=MODEL, messages=messages, tools=TOOLS, max_tokens=20)
    return [call.function.arguments, second.choices[0].message.content]


def structured() -> Any:
    answer = client.chat.completions.parse(
        model=MODEL, messages=[said(QUESTION)], response_format=City, max_tokens=40, temperature=0
    )
    parsed = answer.choices[0].message.parsed
    return parsed and parsed.city


def error() -> str:
    try:
        client.chat.completions.create(model="nobody", messages=[said(QUESTION)])
    except NotFoundError as refused:
        return str(refused.message)
    raise AssertionError


def disconnect() -> int:
    with client.chat.completions.create(
        model=MODEL, messages=[said(STORY)], max_tokens=ENDLESS, stream=True, extra_body={"ignore_eos": True}
    ) as chunks:
        return len([next(iter(chunks)) for _ in range(2)])


run(chat=chat, stream=stream, tools=tools, structured=structured, error=error, disconnect=disconnect)
