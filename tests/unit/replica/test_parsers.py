"""Which parsers a model gets: by its template's marks, never one that would take an ordinary answer for thoughts."""

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from pomarium.cluster.replica import parsers
from pomarium.cluster.replica.parsers import CALLS, NO_PARSERS, THINKING, Parsers, arguments, choose, in_force
from pomarium.worker.models.chat_facts import ChatFacts, Opening, opening

THINK = ("<think>", "</think>")
SWITCH = "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
BEGUN = SWITCH.replace("{% endif %}", "{% else %}<think>\n{% endif %}")
SOFT = "{% if '/no_think' in messages[0].content %}<think></think>{% endif %}"
OFF = "{% if enable_thinking %}<think>\n{% else %}<think>\n\n</think>\n\n{% endif %}"
JSON_CALL = '<tool_call>{\\"name\\": N, \\"arguments\\": A}</tool_call>'
XML_CALL = "<tool_call>\\n<function=N>\\n<parameter=P>\\nV\\n</parameter>\\n</function>\\n</tool_call>"
ARG_CALL = "<tool_call>N<arg_key>K</arg_key><arg_value>V</arg_value></tool_call>"
DEEPSEEK = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
LLAMA = 'Answer with {\\"name\\": function name, \\"parameters\\": dictionary of argument name and its value}.'


def template(call: str = "", tail: str = "") -> str:
    """Of a family: how it tells of tools, and how its prompt ends."""
    tools = "{% if tools %}{{ tools | tojson }} " + call.replace("\\n", "\n").replace('\\"', '"') + "{% endif %}"
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    return (
        (tools if call else "") + turns + "{% if add_generation_prompt %}<|im_start|>assistant\n" + tail + "{% endif %}"
    )


def facts(model_type: str, call: str = "", tail: str = "", tokens: tuple[str, ...] = ()) -> ChatFacts:
    text = template(call, tail)
    return ChatFacts(model_type, text, text, frozenset(tokens))


FAMILIES = [
    # name, its facts, tools, reasoning
    ("Qwen2.5", facts("qwen2", JSON_CALL), "hermes", None),
    ("Qwen3", facts("qwen3", JSON_CALL, SWITCH, THINK), "hermes", "qwen3"),
    ("Qwen3 Instruct 2507", facts("qwen3", JSON_CALL, "", THINK), "hermes", None),
    ("Qwen3 Thinking 2507", facts("qwen3_moe", JSON_CALL, "<think>\n", THINK), "hermes", "deepseek_r1"),
    ("Qwen3-Coder", facts("qwen3_moe", XML_CALL, "", THINK), "qwen3_coder", None),
    ("Qwen3.5", facts("qwen3_5", XML_CALL, BEGUN, THINK), "qwen3_coder", "qwen3"),
    ("Qwen3.5, small", facts("qwen3_5", XML_CALL, OFF, THINK), "qwen3_coder", None),
    ("QwQ", facts("qwen2", JSON_CALL, "<think>\n", THINK), "hermes", "deepseek_r1"),
    ("DeepSeek-R1-Distill", facts("llama", "", "<think>\n", THINK), None, "deepseek_r1"),
    (
        "DeepSeek-V3",
        facts("deepseek_v3", DEEPSEEK[0] + "N\n```json\nA\n```" + DEEPSEEK[1], "", (*DEEPSEEK, *THINK)),
        "deepseek_v3",
        None,
    ),
    (
        "DeepSeek-V3.1",
        facts(
            "deepseek_v3",
            DEEPSEEK[0] + "N<｜tool▁sep｜>A" + DEEPSEEK[1],
            "<｜Assistant｜>{% if thinking %}<think>{% else %}</think>{% endif %}",
            (*DEEPSEEK, *THINK),
        ),
        "deepseek_v31",
        "deepseek_v3",
    ),
    ("Llama 3", facts("llama", LLAMA, "", ("<|python_tag|>",)), "llama3_json", None),
    ("Llama 4", facts("llama4", "<|python_start|>[f(a=1)]<|python_end|>"), "llama4_pythonic", None),
    ("Mistral", facts("mistral", "[TOOL_CALLS]", "", ("[TOOL_CALLS]", "[THINK]", "[/THINK]")), "mistral", None),
    ("Gemma 3", facts("gemma3_text"), None, None),
    (
        "Gemma 4",
        facts(
            "gemma4_text",
            "<|tool_call>call:N{}<tool_call|>",
            "",
            ("<|tool_call>", "<tool_call|>", "<|channel>", "<channel|>"),
        ),
        "gemma4",
        "gemma4",
    ),
    ("FunctionGemma", facts("gemma3_text", "<start_function_call>call:N{}"), "functiongemma", None),
    ("GPT-OSS", facts("gpt_oss", "<|channel|>commentary to=N"), "openai", "openai_gptoss"),
    ("GLM-4.5", facts("glm4_moe", ARG_CALL, SWITCH, THINK), "glm47", "glm45"),
    ("GLM-4.7 Flash", facts("glm4_moe_lite", ARG_CALL, BEGUN, THINK), "glm47", "glm45"),
    ("Laguna", facts("laguna", ARG_CALL), "poolside_v1", None),
    ("Ling 3", facts("bailing_moe_v3", ARG_CALL, SWITCH, THINK), "ling3", "ling3"),
    ("Kimi K2", facts("deepseek_v3", "<|tool_calls_section_begin|>"), "kimi_k2", None),
    (
        "Kimi K2 Thinking",
        facts("kimi_k2", "<|tool_calls_section_begin|><think></think>", "", THINK),
        "kimi_k2",
        "kimi_k2",
    ),
    ("MiniMax M2", facts("minimax", "<minimax:tool_call>", "<think>\n", THINK), "minimax_m2", "minimax_m2"),
    ("LFM2", facts("lfm2", "List of tools", "", ("<|tool_call_start|>", "<|tool_call_end|>")), "lfm2", None),
    ("Seed-OSS", facts("seed_oss", "<seed:tool_call>", "", ("<seed:think>", "</seed:think>")), "seed_oss", "seed_oss"),
    ("Step 3.5", facts("step3p5", XML_CALL, "<think>\n", THINK), "step3p5", "step3p5"),
    ("Nemotron 3", facts("nemotron_h", XML_CALL, BEGUN, THINK), "qwen3_coder", "nemotron_v3"),
    ("LongCat", facts("longcat_flash", "<longcat_tool_call>"), "longcat", None),
    ("MiniCPM5", facts("minicpm", '<function name="N"><param name="P">V</param></function>'), "minicpm5", None),
    ("Granite 3", facts("granite", "<|tool_call|>[]"), "granite", None),
    ("Granite 4", facts("granitemoehybrid", JSON_CALL), "granite4", None),
    ("ERNIE 4.5 Thinking", facts("ernie4_5_moe", JSON_CALL, "<think>\n", THINK), "ernie45", "ernie45"),
    ("OLMo 3", facts("olmo3", "<function_calls>", "<think>"), "olmo3", None),
    ("Hunyuan", facts("hunyuan", "<tool_calls>[]</tool_calls>"), "hunyuan_a13b", None),
    ("Jamba", facts("jamba", "<tool_calls>[]", "", ("<tool_calls>", "</tool_calls>")), "jamba", None),
    ("InternLM", facts("internlm3", "<|action_start|><|plugin|>"), "internlm", None),
    ("Apertus", facts("apertus", "<|tools_prefix|>[]"), "apertus", None),
    ("Phi-4 mini", facts("phi3", "functools[]"), "phi4_mini_json", None),
    ("EXAONE 4", facts("exaone4", JSON_CALL, OFF, THINK), "hermes", None),
    ("Nemotron Nano 2", facts("nemotron_h", "<TOOLCALL>", SOFT + "<think>\n", THINK), None, None),
    ("SmolLM3", facts("smollm3", JSON_CALL, SWITCH, THINK), "hermes", None),
    ("SmolLM2", facts("llama"), None, None),
    ("Phi-3", facts("phi3"), None, None),
]


@pytest.mark.parametrize(("known", "tools", "reasoning"), [f[1:] for f in FAMILIES], ids=[f[0] for f in FAMILIES])
def test_a_familys_parsers(known: ChatFacts, tools: str | None, reasoning: str | None) -> None:
    assert choose(known) == Parsers(tools, reasoning)


def test_every_row_of_the_tables_is_some_familys() -> None:
    assert {row.parser for row in CALLS} == {family[2] for family in FAMILIES} - {None}
    assert {row.parser for row in THINKING} == {family[3] for family in FAMILIES} - {None}


def test_a_model_without_a_template_has_none() -> None:
    assert choose(ChatFacts("qwen3", None, None, frozenset(THINK))) == NO_PARSERS


def test_marks_without_a_place_for_tools_are_no_form_of_calls() -> None:
    mentioned = "<tool_call> arguments" + template()
    assert choose(ChatFacts("llama", mentioned, mentioned, frozenset())) == NO_PARSERS


@pytest.mark.parametrize(
    ("known", "found"),
    [
        (facts("llama", LLAMA), NO_PARSERS),
        (facts("qwen3", JSON_CALL, SWITCH), Parsers("hermes", None)),
        (facts("mistral", "[TOOL_CALLS]"), NO_PARSERS),
    ],
)
def test_a_parser_whose_tokens_are_missing_is_not_chosen(known: ChatFacts, found: Parsers) -> None:
    assert choose(known) == found


@dataclass
class Tokenizer:
    """What parsers ask of a tokenizer when they are made."""

    tokens: frozenset[str]
    vocabulary: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.vocabulary = {token: place for place, token in enumerate(sorted(self.tokens))}

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary

    def encode(self, text: str, **_: Any) -> list[int]:
        return [len(self.vocabulary) + ord(letter) for letter in text]

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, ids))

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.vocabulary.get(token)

    @property
    def all_special_tokens(self) -> list[str]:
        return list(self.vocabulary)

    @property
    def all_special_ids(self) -> list[int]:
        return list(self.vocabulary.values())

    @property
    def vocab(self) -> dict[str, int]:
        return self.vocabulary


@pytest.mark.parametrize("family", FAMILIES, ids=[f[0] for f in FAMILIES])
def test_vllm_has_a_familys_parsers_and_they_start_with_its_tokens(family: tuple[str, ChatFacts, str, str]) -> None:
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    _, known, tools, reasoning = family
    tokenizer = Tokenizer(known.tokens)
    if tools is not None:
        ToolParserManager.get_tool_parser(tools)(tokenizer, [])
    if reasoning is not None:
        ReasoningParserManager.get_reasoning_parser(reasoning)(tokenizer)


CHOSEN = Parsers("hermes", "qwen3")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, CHOSEN),
        ({"tool_call_parser": "mistral"}, Parsers("mistral", "qwen3")),
        ({"tool_call_parser": "none"}, Parsers(None, "qwen3")),
        ({"enable_auto_tool_choice": False}, Parsers(None, "qwen3")),
        ({"enable_auto_tool_choice": True}, CHOSEN),
        ({"reasoning_parser": "none"}, Parsers("hermes", None)),
        ({"reasoning_parser": ""}, Parsers("hermes", None)),
        ({"reasoning_parser": "glm45"}, Parsers("hermes", "glm45")),
        ({"structured_outputs_config": SimpleNamespace(reasoning_parser="glm45")}, Parsers("hermes", "glm45")),
        ({"structured_outputs_config": SimpleNamespace(reasoning_parser="")}, CHOSEN),
        ({"chat_template": "other.jinja"}, NO_PARSERS),
        ({"chat_template": "other.jinja", "tool_call_parser": "hermes"}, Parsers("hermes", None)),
    ],
)
def test_what_the_user_says_goes_before_what_was_chosen(given: dict[str, Any], found: Parsers) -> None:
    assert in_force(CHOSEN, given) == found


def test_an_engine_gets_its_parsers_and_auto_choice_with_them() -> None:
    given = {"max_num_seqs": 8, "tool_call_parser": "none", "reasoning_parser": "none"}
    assert arguments(NO_PARSERS, given) == {"max_num_seqs": 8}
    assert arguments(CHOSEN, {"max_num_seqs": 8}) == {
        "max_num_seqs": 8,
        "tool_call_parser": "hermes",
        "enable_auto_tool_choice": True,
        "reasoning_parser": "qwen3",
    }


def test_a_line_says_both() -> None:
    assert str(CHOSEN) == "tools: hermes, reasoning: qwen3"
    assert str(NO_PARSERS) == "tools: none, reasoning: none"
    assert all(f"--{name.replace('_', '-')}" in parsers.HINT for name in (parsers.TOOLS, parsers.REASONING))


REASONING = [family for family in FAMILIES if family[3] not in (None, "openai_gptoss")]


@pytest.mark.parametrize("family", REASONING, ids=[f[0] for f in REASONING])
def test_an_ordinary_answer_is_told_from_its_thoughts(family: tuple[str, ChatFacts, str, str]) -> None:
    """What a model writes after a prompt of its template, read by vLLM's parser."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.reasoning import ReasoningParserManager

    _, known, _, name = family
    row = next(row for row in THINKING if row.parser == name)
    assert known.template is not None
    left = opening(known.template, row.start, row.end)
    thoughts = {Opening.OPEN: f"because{row.end}", Opening.FREE: f"{row.start}because{row.end}", Opening.CLOSED: ""}
    if name == "gemma4":  # it decides by its prompt's system turn, which asks for none
        thoughts[Opening.FREE] = ""
    parser = ReasoningParserManager.get_reasoning_parser(name)(Tokenizer(known.tokens))
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "?"}])
    reasoning, content = parser.extract_reasoning(f"{thoughts[left]}It is Paris.", request)
    assert (content or "").strip() == "It is Paris."
    assert (reasoning or "").strip() == ("because" if thoughts[left] else "")


@pytest.mark.parametrize(
    ("family", "written"),
    [
        ("Qwen2.5", '<tool_call>\n{"name": "look_up", "arguments": {"city": "Paris"}}\n</tool_call>'),
        (
            "Qwen3-Coder",
            "<tool_call>\n<function=look_up>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        ),
        ("GLM-4.5", "<tool_call>look_up\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"),
        ("Llama 3", '{"name": "look_up", "parameters": {"city": "Paris"}}'),
        ("Mistral", '[TOOL_CALLS] [{"name": "look_up", "arguments": {"city": "Paris"}}]'),
        ("LFM2", "<|tool_call_start|>[look_up(city='Paris')]<|tool_call_end|>"),
        ("Granite 4", '<tool_call>{"name": "look_up", "arguments": {"city": "Paris"}}</tool_call>'),
        (
            "MiniMax M2",
            '<minimax:tool_call>\n<invoke name="look_up">\n<parameter name="city">Paris</parameter>\n</invoke>\n'
            "</minimax:tool_call>",
        ),
        (
            "Seed-OSS",
            "<seed:tool_call>\n<function=look_up>\n<parameter=city>Paris</parameter>\n</function>\n</seed:tool_call>",
        ),
        ("Gemma 4", '<|tool_call>call:look_up{city:<|"|>Paris<|"|>}<tool_call|>'),
    ],
)
def test_a_call_in_a_familys_form_is_read(family: str, written: str) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    schema = {"type": "object", "properties": {"city": {"type": "string"}}}
    tools: Any = [{"type": "function", "function": {"name": "look_up", "parameters": schema}}]
    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "?"}], tools=tools)
    known, name = next((f[1], f[2]) for f in FAMILIES if f[0] == family)
    assert name is not None
    parser = ToolParserManager.get_tool_parser(name)(Tokenizer(known.tokens), request.tools)
    found = parser.extract_tool_calls(written, request)
    assert [call.function.name for call in found.tool_calls] == ["look_up"]
    assert json.loads(found.tool_calls[0].function.arguments) == {"city": "Paris"}
