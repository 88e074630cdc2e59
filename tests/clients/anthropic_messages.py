"""Anthropic's Python SDK over /v1/messages; its key goes as `x-api-key`."""

from typing import Any

from anthropic import Anthropic, NotFoundError
from told import ASKED, ENDLESS, KEY, MODEL, QUESTION, SCHEMA, STORY, TIMEOUT_S, TOOL, URL, WEATHER, City, run

client = Anthropic(base_url=URL, api_key=KEY, max_retries=0, timeout=TIMEOUT_S)
COLD: Any = {"temperature": 0}
TOOLS: Any = [{"name": TOOL["name"], "description": TOOL["description"], "input_schema": SCHEMA}]


def said(content: Any) -> Any:
    return {"role": "user", "content": content}


def text(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def form(schema: Any) -> Any:
    return {"format": {"type": "json_schema", "schema": schema}}


def chat() -> str:
    asked = client.messages.count_tokens(model=MODEL, messages=[said(QUESTION)])
    answer = client.messages.create(model=MODEL, messages=[said(QUESTION)], max_tokens=20, extra_body=COLD)
    used = answer.usage
    total = used.input_tokens + (used.cache_read_input_tokens or 0) + (used.cache_creation_input_tokens or 0)
    assert total == asked.input_tokens, (used, asked)
    return text(answer)


def stream() -> str:
    with client.messages.stream(
        model=MODEL, system="Be brief.", messages=[said(QUESTION)], max_tokens=20, extra_body=COLD
    ) as events:
        pieces = list(events.text_stream)
        assert text(events.get_final_message()) == "".join(pieces)
    return "".join(pieces)


def tools() -> Any:
    messages = [said(ASKED)]
    with client.messages.stream(
        model=MODEL, messages=messages, tools=TOOLS, tool_choice={"type": "any"}, max_tokens=120, extra_body=COLD
    ) as events:
        first = events.get_final_message()
    assert first.stop_reason == "tool_use"
    (call,) = [block for block in first.content if block.type == "tool_use"]
    blocks = [block.model_dump(exclude_none=True) for block in first.content]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": WEATHER}
    messages += [{"role": "assistant", "content": blocks}, said([result])]
    return [call.input, text(client.messages.create(model=MODEL, messages=messages, tools=TOOLS, max_tokens=20))]


def structured() -> str:
    answer = client.messages.create(
        model=MODEL, messages=[said(QUESTION)], max_tokens=40, output_config=form(SCHEMA), extra_body=COLD
    )
    return City.model_validate_json(text(answer)).city


def error() -> str:
    try:
        client.messages.create(model="nobody", messages=[said(QUESTION)], max_tokens=2)
    except NotFoundError as refused:
        body: Any = refused.body
        assert body["error"]["type"] == "not_found_error"
        return str(body["error"]["message"])
    raise AssertionError


def disconnect() -> int:
    endless = form({"type": "string", "minLength": 20 * ENDLESS})  # this protocol has no `ignore_eos`
    with client.messages.stream(
        model=MODEL, messages=[said(STORY)], max_tokens=ENDLESS, output_config=endless
    ) as events:
        return len([next(iter(events.text_stream)) for _ in range(2)])


run(chat=chat, stream=stream, tools=tools, structured=structured, error=error, disconnect=disconnect)
