"""docs/configuration.md carries the table of worker/settings.py, no more, no less and in its order."""

from pathlib import Path

from pomarium.cluster.cli import env
from pomarium.worker.blas import THREADS_VARIABLE
from pomarium.worker.settings import VARIABLES

PAGE = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text(encoding="utf-8")


def test_the_table_is_the_modules() -> None:
    rows = [line for line in PAGE.splitlines() if line.startswith("| ")]
    header, *rows = [tuple(cell.strip() for cell in row.strip("|").split(" | ")) for row in rows]
    assert header == ("variable", "default", "meaning")
    assert rows == [(variable.name, variable.default, variable.meaning) for variable in VARIABLES]


def test_the_page_names_the_variable_of_the_blas() -> None:
    assert f"`{THREADS_VARIABLE}`" in PAGE


def test_what_the_command_prints_as_default_is_what_the_page_says() -> None:
    assert all(row.value in PAGE for row in env.resolve({}, None))
