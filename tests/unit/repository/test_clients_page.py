"""docs/clients.md's table is what the programs of tests/clients do, at the versions that are pinned for them."""

import re

import client_programs
from client_programs import FOLDER, PROGRAMS, node_pins, python_pins, saved, table


def test_the_page_has_the_table() -> None:
    """Otherwise: python tests/client_programs.py"""
    assert saved() == table()


def test_every_program_takes_every_step_and_is_in_the_table() -> None:
    programs = {path.name for path in FOLDER.glob("*.*") if path.suffix in (".py", ".mjs")} - {"told.py", "told.mjs"}
    assert programs == {program.file for program in PROGRAMS}
    for program in PROGRAMS:
        (taken,) = re.findall(r"^(?:await )?run\(\{?(.*?)\}?\)$", (FOLDER / program.file).read_text(), re.MULTILINE)
        steps = tuple(step.partition("=")[0].strip() for step in taken.split(","))
        assert steps == client_programs.STEPS, program.file


def test_pins_are_exact() -> None:
    assert all(re.fullmatch(r"[\w.+-]+", version) for version in python_pins().values())
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in node_pins().values())
