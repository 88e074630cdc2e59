"""The command lines of the pages: read from their fenced sh blocks, and for each what becomes of it in the tests.

    page --lines--> Line ... --PLAN--> run by tests/rack/test_doc_lines.py, or the reason why not

A line that PLAN does not know, and a line of PLAN that no page has, is a fault (test_doc_lines.py).
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))
UNREAD = {"docs/benchmarks.md": "its lines measure for minutes and hours"}


@dataclass(frozen=True)
class Line:
    """A command, whole: lines that end in a backslash go on in the next. `before`: what its block exports above it."""

    page: str
    text: str
    before: tuple[str, ...] = ()


def lines(page: str, markdown: str) -> Iterator[Line]:
    """The command lines of a page, without their comments."""
    for block in re.findall(r"^```sh\n(.*?)^```", markdown, re.M | re.S):
        exported: list[str] = []
        for raw in block.replace("\\\n", "").splitlines():
            text = without_comment(raw)
            if text:
                yield Line(page, text, tuple(exported))
            if text.startswith(("export ", "eval ")):
                exported.append(text)


def without_comment(text: str) -> str:
    """`text` up to a # that begins a word outside of quotes."""
    for found in re.finditer(r"(?:^|\s)#", text):
        try:
            shlex.split(text[: found.start()])
        except ValueError:  # within quotes
            continue
        return text[: found.start()].rstrip()
    return text.rstrip()


def read() -> list[Line]:
    """Of all pages."""
    return [
        line for page in PAGES if page not in UNREAD for line in lines(page, (ROOT / page).read_text(encoding="utf-8"))
    ]


MAC = "takes a Mac"
MACS = "takes further machines"
HUB = "takes a network; tests/unit/worker/test_resolve.py has a Hub"
OTHER = "run, word for word or with shorter times, by "

RUN = "run"
PLAN = {
    r"xcode-select --install": MAC,
    r"brew install python@3\.13": MAC,
    r"git clone URL pomarium && cd pomarium": "takes a network",
    r"make install": OTHER + "tests/e2e/test_pure_vllm_serves.py, as a Mac does it",
    r"\.venv/bin/pomarium serve mlx-community/Qwen3-4B-4bit": HUB,
    r"uv tool install --python 3\.13 \.": "takes a network; tests/e2e/test_wheel_serves.py, with another Python",
    r"pomarium setup": OTHER + "tests/e2e/test_wheel_serves.py",
    r"pomarium serve": OTHER + "tests/e2e/test_wheel_serves.py",
    r"brew tap-new local/pomarium": MAC,
    r'cp deploy/homebrew/pomarium\.rb "\$\(brew --repository .*': MAC,
    r"HOMEBREW_POMARIUM_GIT=.* brew install .*": MAC,
    r"make serve": OTHER + "tests/unit/repository/test_setup.py and tests/e2e/test_serve.py, in two",
    r"make test": "is what runs this",
    r"curl http://127\.0\.0\.1:8000/v1/chat/completions .*": RUN,
    r"\.venv/bin/pomarium serve": OTHER + "tests/e2e/test_serve.py",
    r"\.venv/bin/pomarium serve \./my-mlx-model \./other\.gguf": RUN,
    r"\.venv/bin/pomarium serve ORG/NAME --max-model-len 8192": HUB,
    r"(\.venv/bin/)?pomarium serve --models ~/models --on-demand.*": OTHER + "tests/e2e/test_on_demand.py",
    r"\.venv/bin/pomarium models list --url": OTHER + "tests/e2e/test_on_demand.py, with the address",
    r"\.venv/bin/pomarium chat": OTHER + "tests/e2e/test_chat_command.py",
    r'echo ".*" \| \.venv/bin/pomarium chat .*': RUN,
    r"\.venv/bin/pomarium models (list|show)": RUN,
    r"\.venv/bin/pomarium models (pull|remove) ORG/NAME": OTHER
    + "tests/unit/cli/test_cli_models.py, from a Hub of its own",
    r"\.venv/bin/pomarium doctor": RUN,
    r"\.venv/bin/pomarium env": RUN,
    r"\.venv/bin/pomarium selftest": OTHER + "tests/e2e/test_selftest.py",
    r"(\.venv/bin/)?pomarium rack up": MACS + "; tests/rack/test_simulated_rack.py",
    r"\.venv/bin/pomarium rack up --simulate 3": RUN,
    r"\.venv/bin/pomarium serve --stages 3": RUN,
    r"(\.venv/bin/)?pomarium rack status": RUN,
    r"(\.venv/bin/)?pomarium rack down": RUN,
    r"\.venv/bin/pomarium rack up --simulate 2 --sleep 30s": OTHER + "tests/rack/test_rack_asleep.py",
    r"\.venv/bin/pomarium serve --replicas 0-1 --keep 30s": OTHER + "tests/rack/test_rack_asleep.py",
    r"\.venv/bin/pomarium batch run in\.jsonl out\.jsonl": RUN,
    r"git clone URL pomarium && cd pomarium && make install": "takes a network",
    r"\.venv/bin/pomarium rack up --address 10\.0\.5\.1": OTHER + "tests/rack/test_two_macs.py",
    r"\.venv/bin/pomarium rack join 10\.0\.5\.1 --address 10\.0\.5\.2": OTHER + "tests/rack/test_two_macs.py",
    r"\.venv/bin/pomarium rack join HEAD": OTHER + "tests/rack/test_two_macs.py",
    r"\.venv/bin/pomarium serve MODEL --stages 2": OTHER + "tests/rack/test_two_macs.py",
    r"pomarium serve MODEL --stages auto": OTHER + "tests/rack/test_rack_plans.py",
    r"pomarium rack join HEAD --key KEY": MACS,
    r"pomarium rack (drain|undrain) mac-3( --wait 15m)?": OTHER + "tests/rack/test_rack_failover.py",
    r"pomarium rack probe": OTHER + "tests/rack/test_rack_probe.py",
    r"deploy/install\.sh .*": MAC + "; tests/unit/repository/test_deploy.py has stand-ins for its commands",
    r"scp HEAD:.*": MACS,
    r"curl http://HEAD:8000/v1/models": RUN,
    r'export PATH="\$PWD/\.venv/bin:\$PATH"': RUN,
    r'eval "\$\(pomarium rack env\)"': RUN,
    r"cp deploy/serve\.example\.yaml serve\.yaml": RUN,
    r"serve deploy serve\.yaml": RUN,
    r"serve status": RUN,
    r"ray status": RUN,
    r"make chaos ARGS=.*": "takes hours; tests/unit/repository/test_chaos.py has what needs no rack",
    r"sudo pmset .*": MAC,
    r"prometheus --config\.file=.*": OTHER + "tests/rack/test_serve_config.py, with its own address",
}
"""What becomes of each line (a regular expression of the whole): RUN, or the reason why it is not."""


def planned(line: Line) -> str | None:
    """What PLAN says of it; None: nothing."""
    return next((what for pattern, what in PLAN.items() if re.fullmatch(pattern, line.text)), None)
