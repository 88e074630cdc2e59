"""docs/architecture.md names what is there: files, functions, folders, floors. Links of all pages lead somewhere."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

FILE_AND_NAMES = re.compile(r"`([\w/]+\.py)`\s+(?:\(|\| )(`[\w.]+`(?:,\s`[\w.]+`)*)")
"""`file.py` (`function`, `Class.method`), or a row of a table with the file in one cell and the names in the next."""


def section(title: str) -> str:
    """What stands below a heading, up to the next one."""
    _, found, below = PAGE.partition(f"\n## {title}\n")
    assert found, f"no section {title!r}"
    return below.partition("\n## ")[0]


def named(text: str) -> list[tuple[str, str]]:
    """(file, function or class) pairs of `text`."""
    return [(file, name) for file, names in FILE_AND_NAMES.findall(text) for name in re.findall(r"`([\w.]+)`", names)]


def defined(tree: ast.AST, within: str = "") -> set[str]:
    """Qualified names of the functions and classes of a module, and of the methods in them."""
    names = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names |= {within + node.name} | defined(node, f"{within}{node.name}.")
    return names


STEPS = re.split(r"^\d+\. ", section("The life of one request").partition("\n\nThe processes")[0], flags=re.MULTILINE)[
    1:
]


def test_a_request_lives_through_eight_steps() -> None:
    assert len(STEPS) == 8


@pytest.mark.parametrize("step", STEPS)
def test_each_step_names_a_file_and_a_function(step: str) -> None:
    assert named(step)


def test_every_path_is_there() -> None:
    paths = re.findall(r"`(\w[\w.-]*/[\w./-]*)`", PAGE)
    assert len(paths) > 50
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_function_is_in_its_file() -> None:
    pairs = named(PAGE)
    assert len(pairs) > 25
    missing = [(file, name) for file, name in pairs if name not in defined(ast.parse((ROOT / file).read_text()))]
    assert missing == []


def test_the_reading_list_is_short() -> None:
    files = re.findall(r"^\| \d+ \| `([\w/]+\.py)` \|", section("Ten files to read"), re.MULTILINE)
    assert len(files) == 10
    assert 1000 <= sum(len((ROOT / file).read_text().splitlines()) for file in files) <= 2200


@pytest.mark.parametrize("layer", ["cluster", "worker"])
def test_the_tables_name_all_folders(layer: str) -> None:
    rows = re.findall(rf"^\| `{layer}/(\w+)/` \|", section("Folders"), re.MULTILINE)
    folders = {path.parent.relative_to(ROOT / layer).parts[0] for path in (ROOT / layer).glob("*/**/*.py")}
    assert sorted(rows) == sorted(folders)


def test_the_floors_are_those_that_the_linter_holds() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract.get("containers") == ["pomarium.cluster"]]
    block = section("Floors").split("```")[3]
    assert re.split(r"\s*>\s*", block.strip()) == layers


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 120
    prose = re.sub(r"```.*?```", "", "\n".join(lines), flags=re.DOTALL).splitlines()
    assert [line for line in prose if len(line) > 135 and not line.startswith("|")] == []


def test_what_was_not_run_stands_in_one_place() -> None:
    headings = [
        f"{page.name}: {line}"
        for page in PAGES
        for line in page.read_text(encoding="utf-8").splitlines()
        if re.match(r"#+ .*was (not )?run", line)
    ]
    assert headings == []
    assert all("(status.md)" in (ROOT / "docs" / f"{name}.md").read_text() for name in
               ("autoscaling", "distributed", "handoff", "macos", "operations", "placement", "rack"))  # fmt: skip
