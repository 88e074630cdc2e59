"""What becomes of a section's process is a row; and a report is written as it grows, wherever that can be."""

import os
from pathlib import Path

import pytest
import selftest_faults
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.selftest import machine, process, sections
from pomarium.cluster.selftest.process import Section
from pomarium.cluster.selftest.report import Report
from pomarium.worker.selftest_rows import Begin, Row, Verdict, fact, failure, from_json, to_json

SILENCE_S = 10.0


def test_a_section_that_hangs_is_ended_and_told_of(tmp_path: Path) -> None:
    environ = os.environ | selftest_faults.preload(tmp_path, "hang")
    rows = list(process.run(Section(sections.TIME), environ, SILENCE_S))
    assert rows == [
        fact("a row", "before"),
        Row("a kernel", Verdict.FAILED, "told nothing more and was ended: it hangs"),
    ]


def test_a_python_that_cannot_start_is_told_of(tmp_path: Path) -> None:
    (row,) = process.run(Section(sections.TIME), {"PYTHONHOME": str(tmp_path)})
    assert row.failed
    assert "its process ended with" in row.text
    assert row.detail


texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.builds(Begin, texts) | st.builds(Row, texts, st.sampled_from(Verdict), texts, st.tuples(texts, texts)))
def test_an_event_is_one_line(event: Begin | Row) -> None:
    line = to_json(event)
    assert "\n" not in line
    assert from_json(line) == event


def test_a_compilers_log_is_cut_to_its_errors() -> None:
    log = "[metal::Device] Unable to build metal library\nnote: here\nprogram_source:3:1: error: no such word\n\n"
    try:
        raise RuntimeError(log)
    except RuntimeError as error:
        row = failure("k", error)
    assert row.text == "RuntimeError: [metal::Device] Unable to build metal library"
    assert row.detail[0] == "program_source:3:1: error: no such word"
    assert row.detail[1].startswith("raised in test_a_compilers_log")


def test_rows_are_written_at_once_and_failures_counted(tmp_path: Path) -> None:
    path = tmp_path / "report"
    with path.open("wb") as file:
        report = Report(file.fileno())
        report.add(Row("a", Verdict.OK, "1"))
        assert path.read_text().endswith("  1\n") or path.read_text().split()[-1] == "1"
        report.add(Row("b", Verdict.WRONG, "2", ("below",)))
        assert path.read_text().splitlines()[-1].strip() == "below"
    assert report.summary() == "selftest: FAILED (1 of 2 rows): b"


def test_where_stdout_cannot_be_written_stderr_is(capfd: pytest.CaptureFixture[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        report = Report(full.fileno())
        report.say("one")
        report.say("two")
    assert capfd.readouterr().err == "one\ntwo\n"


SW_VERS = "ProductName:\t\tmacOS\nProductVersion:\t\t15.6.1\nBuildVersion:\t\t24G90\n"


def test_a_macs_facts() -> None:
    answers = {"sw_vers": SW_VERS, "machdep.cpu.brand_string": "Apple M4 Pro\n"}
    rows = {
        row.name: row.text for row in machine.rows({"VLLM_X": "secret"}, "darwin", lambda c: answers.get(c[-1], ""))
    }
    assert rows["sw_vers"] == "ProductName macOS, ProductVersion 15.6.1, BuildVersion 24G90"
    assert rows["machdep.cpu.brand_string"] == "Apple M4 Pro"
    assert rows["hw.model"] == "not known"
    assert rows["variables that are set"] == "VLLM_X", "names only"
    assert "mlx 0" in rows["versions"]
