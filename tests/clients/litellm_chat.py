"""LiteLLM over /v1/chat/completions, with its provider for whatever speaks OpenAI's protocol."""

import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the Internet for prices when it is imported

from typing import Any

import litellm
from told import ASKED, ENDLESS, KEY, MODEL, QUESTION, STORY, TIMEOUT_S, TOOL, URL, WEATHER, City, run

litellm.suppress_debug_info = True


def ask(text: Any, name: str = MODEL, tokens: int = 20, **more: Any) -> Any:
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    return litellm.completion(
        f"openai/{name}", messages, api_base=f"{URL}/v1", api_key=KEY, max_tokens=tokens, timeout=TIMEOUT_S,
        num_retries=0, max_retries=0, **{"temperature": 0} | more,
    )  # fmt: skip


def chat() -> Any:
    return ask(QUESTION).choices[0].message.content


def stream() -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in ask(QUESTION, stream=True))


def tools() -> Any:
    offered = [{"type": "function", "function": TOOL}]
    first = ask(ASKED, tokens=120, tools=offered, tool_choice="required").choices[0].message
    (call, *_) = first.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": WEATHER}
    messages = [{"role": "user", "content": ASKED}, first, result]
    return [call.function.arguments, ask(messages, tools=offered).choices[0].message.content]


def structured() -> str:
    answer = ask(QUESTION, tokens=40, response_format=City)
    return City.model_validate_json(answer.choices[0].message.content).city


def error() -> str:
    try:
        ask(QUESTION, "nobody")
    except litellm.NotFoundError as refused:
        return str(refused)
    raise AssertionError


def disconnect() -> int:
    chunks = ask(STORY, tokens=ENDLESS, stream=True, ignore_eos=True)
    seen = len([next(chunks) for _ in range(3)])
    chunks.completion_stream.close()
    return seen


run(chat=chat, stream=stream, tools=tools, structured=structured, error=error, disconnect=disconnect)
