"""Which of vLLM's parsers read a model's answers, where the user does not say: chosen from its chat template.

    ChatFacts --choose--> Parsers(tools, reasoning) --in_force(engine arguments)--> what the engine gets, and a line

A parser is chosen where the template shows the form that it reads, and where the tokenizer has the tokens that it looks
for. Where nothing fits there is none: a wrong one would turn answers wrong. The names are those of vLLM 0.29
(vllm/tool_parsers/__init__.py, vllm/reasoning/__init__.py); the marks are those of mlx-lm (mlx_lm/tokenizer_utils.py,
_infer_tool_parser) and of the parsers themselves.
"""

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from pomarium.worker.models.chat_facts import ChatFacts, Opening, opening

NONE = "none"
"""What the user gives in place of a parser's name, to have none."""

TOOLS, REASONING, AUTO = "tool_call_parser", "reasoning_parser", "enable_auto_tool_choice"
"""vLLM's arguments."""
OUTPUTS = "structured_outputs_config"
TEMPLATE = "chat_template"

HINT = "--tool-call-parser and --reasoning-parser change it"


@dataclass(frozen=True)
class Parsers:
    """Names of vLLM's; None: no parser."""

    tools: str | None = None
    reasoning: str | None = None

    def __str__(self) -> str:
        return f"tools: {self.tools or NONE}, reasoning: {self.reasoning or NONE}"


NO_PARSERS = Parsers()


@dataclass(frozen=True)
class Calls:
    """A form of tool calls.

    Attributes:
        marks: what the template has in it, all of them; a token of the tokenizer counts as well.
        tokens: without which the parser does not start. types: of the models that it is for; empty for all.
    """

    parser: str
    marks: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    types: Set[str] = frozenset()

    def fits(self, facts: ChatFacts, template: str) -> bool:
        """Whether a model's calls have this form."""
        return (
            (not self.types or facts.model_type in self.types)
            and all(mark in template or mark in facts.tokens for mark in self.marks)
            and facts.tokens.issuperset(self.tokens)
        )


CALLS = (
    Calls("openai", types=frozenset({"gpt_oss"})),
    Calls("minimax_m2", ("<minimax:tool_call>",)),
    Calls("gemma4", ("<|tool_call>", "<tool_call|>"), ("<|tool_call>", "<tool_call|>")),
    Calls("functiongemma", ("<start_function_call>",)),
    Calls("longcat", ("<longcat_tool_call>",)),
    Calls("poolside_v1", ("<arg_key>",), types=frozenset({"laguna"})),
    Calls("ling3", ("<arg_key>",), types=frozenset({"bailing_moe_v3"})),
    Calls("glm47", ("<arg_key>",)),
    Calls("lfm2", ("<|tool_call_start|>",), ("<|tool_call_start|>", "<|tool_call_end|>")),
    Calls("seed_oss", ("<seed:tool_call>",)),
    Calls("step3p5", ("<tool_call>", "<function="), types=frozenset({"step3p5"})),
    Calls("qwen3_coder", ("<tool_call>", "<function=")),
    Calls("kimi_k2", ("<|tool_calls_section_begin|>",)),
    Calls("minicpm5", ('<function name="', '<param name="')),
    Calls(
        "deepseek_v3",
        ("<｜tool▁calls▁begin｜>", "```json"),
        ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    Calls("deepseek_v31", ("<｜tool▁calls▁begin｜>",), ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")),
    Calls("mistral", ("[TOOL_CALLS]",), ("[TOOL_CALLS]",)),
    Calls("jamba", ("<tool_calls>",), ("<tool_calls>", "</tool_calls>"), frozenset({"jamba"})),
    Calls("hunyuan_a13b", ("<tool_calls>",), types=frozenset({"hunyuan", "hunyuan_v1_moe", "hunyuan_v1_dense"})),
    Calls("apertus", ("<|tools_prefix|>",)),
    Calls("internlm", ("<|action_start|>", "<|plugin|>"), types=frozenset({"internlm2", "internlm3"})),
    Calls("granite", ("<|tool_call|>",), types=frozenset({"granite", "granitemoe"})),
    Calls("granite4", ("<tool_call>",), types=frozenset({"granite", "granitemoe", "granitemoehybrid"})),
    Calls("ernie45", ("<tool_call>",), types=frozenset({"ernie4_5", "ernie4_5_moe"})),
    Calls("olmo3", ("<function_calls>",), types=frozenset({"olmo3"})),
    Calls("llama4_pythonic", ("<|python_start|>",), types=frozenset({"llama4", "llama4_text"})),
    Calls("phi4_mini_json", ("functools[",)),
    Calls("llama3_json", ("dictionary of argument name and its value",), ("<|python_tag|>",)),
    Calls("hermes", ("<tool_call>", "arguments")),
)
"""The first that fits is taken."""


@dataclass(frozen=True)
class Thinking:
    """A form of thinking.

    Attributes:
        start, end: the tokens that enclose it; empty where the parser knows by itself.
        openings: how the prompt may leave it for the parser to be right of an answer to a request that says nothing of
            thinking.
        marks: what the template has in it. types: of the models that it is for; empty for all.
    """

    parser: str
    start: str
    end: str
    openings: Set[Opening]
    marks: tuple[str, ...] = ()
    types: Set[str] = frozenset()

    def fits(self, facts: ChatFacts, template: str) -> bool:
        """Whether a model thinks in this form."""
        return (
            (not self.types or facts.model_type in self.types)
            and SOFT_SWITCH not in template
            and all(mark in template for mark in self.marks)
            and (
                not self.start
                or (
                    facts.tokens.issuperset({self.start, self.end})
                    and opening(template, self.start, self.end) in self.openings
                )
            )
        )


SOFT_SWITCH = "/no_think"
"""A template that reads this in messages ends thinking where a parser is not told of it (SmolLM3, Nemotron Nano 2)."""

_THINK = ("<think>", "</think>")
_ANY = frozenset(Opening)
_OPEN = frozenset({Opening.OPEN})
_NOT_CLOSED = frozenset({Opening.OPEN, Opening.FREE})
_QWEN3 = frozenset({
    "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_vl",
    "qwen3_vl_moe",
})  # fmt: skip

THINKING = (
    Thinking("openai_gptoss", "", "", _ANY, types=frozenset({"gpt_oss"})),
    Thinking("gemma4", "<|channel>", "<channel|>", _ANY),
    Thinking("seed_oss", "<seed:think>", "</seed:think>", _NOT_CLOSED, types=frozenset({"seed_oss"})),
    Thinking(
        "deepseek_v3", *_THINK, frozenset({Opening.CLOSED}), marks=("<｜Assistant｜>", "thinking"),
        types=frozenset({"deepseek_v3", "deepseek_v32"}),
    ),
    Thinking("minimax_m2", *_THINK, _OPEN, marks=("<minimax:tool_call>",)),
    Thinking("kimi_k2", *_THINK, _NOT_CLOSED, marks=("<|tool_calls_section_begin|>", "<think>")),
    Thinking("glm45", *_THINK, _NOT_CLOSED, types=frozenset({"glm4_moe", "glm4_moe_lite", "glm_moe_dsa"})),
    Thinking("ling3", *_THINK, _NOT_CLOSED, types=frozenset({"bailing_moe_v3"})),
    Thinking("nemotron_v3", *_THINK, _OPEN, marks=("enable_thinking",), types=frozenset({"nemotron_h"})),
    Thinking("step3p5", *_THINK, _OPEN, types=frozenset({"step3p5"})),
    Thinking("ernie45", *_THINK, _OPEN, types=frozenset({"ernie4_5_moe"})),
    Thinking("qwen3", *_THINK, _NOT_CLOSED, marks=("enable_thinking",), types=_QWEN3),
    Thinking("qwen3", *_THINK, _OPEN, marks=("enable_thinking",)),
    Thinking("deepseek_r1", *_THINK, _OPEN),
)  # fmt: skip
"""The first that fits is taken. Where the model itself decides whether it thinks, only families are believed of which
it is known that they do: without an end of thinking, their parsers take the whole answer for thoughts."""


def choose(facts: ChatFacts) -> Parsers:
    """The parsers of a model. Pure."""
    tools = reasoning = None
    if facts.tool_template is not None and re.search(r"\btools\b", facts.tool_template):
        tools = next((form.parser for form in CALLS if form.fits(facts, facts.tool_template)), None)
    if facts.template is not None:
        reasoning = next((form.parser for form in THINKING if form.fits(facts, facts.template)), None)
    return Parsers(tools, reasoning)


def in_force(chosen: Parsers, engine_args: Mapping[str, Any]) -> Parsers:
    """What reads the answers: what the user says, else what was chosen. Another chat template than the model's own
    may ask for other forms, so nothing is chosen then."""
    own = NO_PARSERS if engine_args.get(TEMPLATE) else chosen
    tools = _named(engine_args[TOOLS]) if TOOLS in engine_args else own.tools
    if engine_args.get(AUTO) is False:
        tools = None
    outputs = engine_args.get(OUTPUTS)
    if REASONING in engine_args:
        reasoning = _named(engine_args[REASONING])
    elif outputs is not None and outputs.reasoning_parser:
        reasoning = str(outputs.reasoning_parser)
    else:
        reasoning = own.reasoning
    return Parsers(tools, reasoning)


def arguments(parsers: Parsers, engine_args: Mapping[str, Any]) -> dict[str, Any]:
    """`engine_args` for an engine whose answers `parsers` read, as `in_force` gave them. With a parser of tool calls
    the model decides whether it calls one."""
    given = {name: value for name, value in engine_args.items() if name not in (TOOLS, REASONING)}
    if parsers.tools is not None:
        given |= {TOOLS: parsers.tools, AUTO: True}
    if parsers.reasoning is not None:
        given[REASONING] = parsers.reasoning
    return given


def _named(name: str) -> str | None:
    return None if name in ("", NONE) else name
