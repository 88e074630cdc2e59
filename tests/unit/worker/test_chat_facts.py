"""What a folder says of conversations: the template that counts, its tokens, how its prompts leave thinking."""

import json
from pathlib import Path
from typing import Any

import pytest

from pomarium.worker.errors import CheckpointError
from pomarium.worker.models.chat_facts import ChatFacts, Opening, opening, read

START, END = "<think>", "</think>"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def write(file: Path, content: Any) -> None:
    file.write_text(content if isinstance(content, str) else json.dumps(content))


def asked(text: str) -> str:
    return TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n" + text + "{% endif %}"


def test_a_folder_without_a_template(tmp_path: Path) -> None:
    assert read(tmp_path, "llama") == ChatFacts("llama", None, None, frozenset())


def test_a_jinja_file_goes_before_the_tokenizers_configuration_and_that_before_chat_template_json(
    tmp_path: Path,
) -> None:
    found = []
    for file, content in (
        ("chat_template.json", {"chat_template": "third"}),
        ("tokenizer_config.json", {"chat_template": "second"}),
        ("chat_template.jinja", "first"),
    ):
        write(tmp_path / file, content)
        found.append(read(tmp_path, "llama").template)
    assert found == ["third", "second", "first"]


def test_several_templates_by_name(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    write(tmp_path / "tokenizer_config.json", {"chat_template": named})
    facts = read(tmp_path, "cohere")
    assert (facts.template, facts.tool_template) == ("plain", "with tools")
    write(tmp_path / "tokenizer_config.json", {"chat_template": named[:1]})
    assert read(tmp_path, "cohere").tool_template == "plain"


def test_tokens_are_those_of_both_files(tmp_path: Path) -> None:
    write(tmp_path / "tokenizer.json", {"added_tokens": [{"id": 7, "content": "<a>"}]})
    write(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"8": {"content": "<b>"}}})
    assert read(tmp_path, "llama").tokens == {"<a>", "<b>"}


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_is_named(file: str, content: str, tmp_path: Path) -> None:
    write(tmp_path / file, content)
    with pytest.raises(CheckpointError, match=file):
        read(tmp_path, "llama")


@pytest.mark.parametrize(
    ("template", "found"),
    [
        (asked(""), Opening.FREE),
        (asked("<think>\n"), Opening.OPEN),
        (asked("<think>\n\n</think>\n\n"), Opening.CLOSED),
        (asked("</think>"), Opening.CLOSED),
        (asked("{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"), Opening.FREE),
        (asked("{% if enable_thinking %}<think>{% else %}<think></think>{% endif %}"), Opening.CLOSED),
        ("Write thoughts as <think> ... </think>.\n" + asked(""), Opening.FREE),
        ("{{ raise_exception('tools only') }}", None),
        ("{{ bos_token + messages[1].content }}", None),
        ("{% if", None),
        ("{% if add_generation_prompt %}<think>{% else %}no{% endif %}", None),
    ],
)
def test_how_a_prompt_leaves_thinking(template: str, found: Opening | None) -> None:
    assert opening(template, START, END) is found
