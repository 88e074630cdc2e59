"""OpenAI's Python SDK over /v1/responses."""

import json
from typing import Any

from openai import NotFoundError, OpenAI
from told import ASKED, ENDLESS, KEY, MODEL, QUESTION, STORY, TIMEOUT_S, TOOL, URL, WEATHER, City, run

client = OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=TIMEOUT_S)
TOOLS: Any = [{"type": "function", **TOOL}]


def chat() -> str:
    return client.responses.create(model=MODEL, input=QUESTION, max_output_tokens=20, temperature=0).output_text


def stream() -> str:
    events = client.responses.create(
        model=MODEL, input=QUESTION, instructions="Be brief.", max_output_tokens=20, temperature=0, stream=True
    )
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def tools() -> Any:
    items: list[Any] = [{"role": "user", "content": ASKED}]
    with client.responses.stream(
        model=MODEL, input=items, tools=TOOLS, tool_choice="required", max_output_tokens=120, temperature=0
    ) as events:
        first = events.get_final_response()
    (call,) = [item for item in first.output if item.type == "function_call"]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": json.dumps(WEATHER)}
    items += [*(item.model_dump(exclude={"parsed_arguments"}) for item in first.output), result]
    second = client.responses.create(model=MODEL, input=items, tools=TOOLS, max_output_tokens=20)
    return [call.arguments, second.output_text]


def structured() -> Any:
    answer = client.responses.parse(model=MODEL, input=QUESTION, text_format=City, max_output_tokens=40, temperature=0)
    return answer.output_parsed and answer.output_parsed.city


def error() -> str:
    try:
        client.responses.create(model="nobody", input=QUESTION)
    except NotFoundError as refused:
        return str(refused.message)
    raise AssertionError


def disconnect() -> int:
    with client.responses.create(
        model=MODEL, input=STORY, max_output_tokens=ENDLESS, stream=True, extra_body={"ignore_eos": True}
    ) as events:
        return len([next(iter(events)) for _ in range(6)])


run(chat=chat, stream=stream, tools=tools, structured=structured, error=error, disconnect=disconnect)
