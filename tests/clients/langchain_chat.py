"""LangChain's ChatOpenAI over /v1/chat/completions."""

from typing import Any

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import NotFoundError
from told import ASKED, ENDLESS, KEY, MODEL, QUESTION, STORY, TIMEOUT_S, URL, WEATHER, City, run


def model(name: str = MODEL, tokens: int = 40, **more: Any) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=f"{URL}/v1", api_key=KEY, model=name, temperature=0, max_retries=0, timeout=TIMEOUT_S,
        max_completion_tokens=tokens, **more,
    )  # fmt: skip


@tool(args_schema=City)
def weather(city: str) -> str:
    """The weather in a city"""
    return WEATHER


def chat() -> Any:
    return model().invoke(QUESTION).content


def stream() -> str:
    return "".join(str(chunk.content) for chunk in model().stream(QUESTION))


def tools() -> Any:
    asked = HumanMessage(ASKED)
    first: Any = model(tokens=120).bind_tools([weather], tool_choice="required").invoke([asked])
    (call, *_) = first.tool_calls
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    return [call["args"], model().invoke([asked, first, result]).content]


def structured() -> Any:
    found: Any = model().with_structured_output(City, method="json_schema").invoke(QUESTION)
    return found.city


def error() -> str:
    try:
        model("nobody").invoke(QUESTION)
    except NotFoundError as refused:
        return str(refused)
    raise AssertionError


def disconnect() -> int:
    chunks = model(tokens=ENDLESS, extra_body={"ignore_eos": True}).stream(STORY)
    seen = len([next(chunks) for _ in range(3)])
    chunks.close()
    return seen


run(chat=chat, stream=stream, tools=tools, structured=structured, error=error, disconnect=disconnect)
