"""The arithmetic and the tables of benchmarks/; what it measures is run by hand (docs/benchmarks.md)."""

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.worker.command_buffers import DEFAULTS

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark is a script: its modules import each other by their bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_percentile_is_the_nearest_rank() -> None:
    from measure import percentile

    values = [4.0, 1.0, 3.0, 2.0]
    assert [percentile(values, share) for share in (0.25, 0.5, 0.51, 0.99, 1.0)] == [1, 2, 3, 4, 4]


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.01, 1))
def test_at_least_the_share_lies_at_or_below_the_percentile(values: list[float], share: float) -> None:
    from measure import percentile

    found = percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values) - 1e-9


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 0.0), ([1.0], 1.1)])
def test_percentile_refuses_what_has_none(values: list[float], share: float) -> None:
    from measure import percentile

    with pytest.raises(ValueError, match="percentile"):
        percentile(values, share)


def test_gaps_overlap_the_interval_and_never_span_streams() -> None:
    from measure import gaps_of

    streams = [[0.0, 1.0, 9.0, 9.5, 20.0], [4.0, 4.5], [1.0], []]
    assert gaps_of(streams, 9.1, 9.4) == [0.5]
    assert gaps_of(streams, 2.0, 9.2) == [8.0, 0.5, 0.5], "a gap that began before the interval"
    assert gaps_of(streams, 9.2, 10.0) == [0.5, 10.5], "a gap that ends after it"
    assert gaps_of(streams, 30.0, 40.0) == []


def test_the_best_round_is_the_fastest_whatever_the_unit() -> None:
    from measure import Sample
    from report import summaries

    found = summaries(
        {
            "ours": [
                Sample("throughput/8", 50.0, 0.1),
                Sample("throughput/8", 70.0, 0.9),
                Sample("gap/during", 3.0, 0.0),
                Sample("gap/during", 2.0, 0.0),
            ]
        }
    )
    throughput, gap = found["ours", "throughput/8"], found["ours", "gap/during"]
    assert (throughput.best, throughput.low, throughput.high, throughput.others) == (70, 50, 70, 0.9)
    assert gap.best == 2


def test_ratio_and_cell() -> None:
    from report import Summary, cell, ratio

    one, two = Summary(1.0, 1.0, 1.0, 0.0), Summary(2.5, 2.0, 2.5, 0.0)
    assert ratio(two, one) == "2.50x"
    assert ratio(two, None) == ratio(None, one) == ratio(one, Summary(0.0, 0.0, 0.0, 0.0)) == "–"
    assert (cell(one, 1), cell(two, 1), cell(None, 1)) == ("1.0", "2.5 (2.0–2.5)", "–")


def test_tables_put_the_figures_and_ratios_under_their_columns() -> None:
    from measure import Sample
    from report import summaries, tables
    from systems import KV_BYTES

    weights = 100 << 20
    text = tables(
        summaries(
            {
                "ours": [
                    Sample("throughput/1", 9.5, 0.0),
                    Sample("throughput/8", 60.0, 0.25),
                    Sample("first_token/cold", 10.0, 0.0),
                    Sample("first_token/hit", 1.0, 0.0),
                    Sample("memory/peak", float(weights + KV_BYTES + (30 << 20)), 0.0),
                ],
                "mlx-batch": [Sample("throughput/1", 10.0, 0.0), Sample("throughput/8", 50.0, 0.0)],
                "mlx-server": [Sample(f"gap/{name}", 4.0, 0.0) for name in ("before", "during", "first_token")],
            }
        ),
        weights,
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line]
    assert ["Pomarium", "9.5", "0.95x", "60.0", "1.20x", "0.25"] in rows
    assert ["Pomarium", "10.00", "1.00", "0.10x", "0.00"] in rows
    assert ["Pomarium", str(100 + 512 + 30), "100", "512", "30"] in rows
    assert ["mlx-lm server", "2048", "4.00", "4.00", "1.00x", "4.0", "0.00"] in rows
    assert all(len(row) in (5, 6, 7) for row in rows)


def test_nothing_measured_gives_no_table() -> None:
    from report import tables

    assert tables({}, 0) == ""


def test_module_names_are_free() -> None:
    """The bare names must not hide an installed module from the processes that run a benchmark."""
    from importlib.machinery import PathFinder

    elsewhere = [path for path in sys.path if Path(path).resolve() != BENCHMARKS]
    for file in BENCHMARKS.glob("*.py"):
        found = PathFinder.find_spec(file.stem, elsewhere)  # a folder such as tests/engine has no loader and hides none
        assert found is None or found.loader is None, file.stem


def test_shares_of_a_window_count_only_what_lies_in_it() -> None:
    from intervals import COMPUTE, WAITING, Interval, rate, share, window

    found = [Interval(0, COMPUTE, 0.0, 2.0), Interval(1, WAITING, 2.0, 3.0), Interval(1, COMPUTE, 3.0, 6.0)]
    assert share(found, COMPUTE, (1.0, 5.0)) == pytest.approx(0.75)
    assert share(found, WAITING, (1.0, 5.0)) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="empty"):
        share(found, COMPUTE, (1.0, 1.0))
    arrivals = [[1.0, 2.0, 5.0], [1.5, 2.5, 4.5]]
    assert window(arrivals) == (1.5, 4.5)
    assert rate(arrivals, window(arrivals)) == pytest.approx(1.0), "three tokens in three seconds"


def test_the_steps_of_a_picture_are_in_the_middle_of_those_of_all_stages() -> None:
    from intervals import COMPUTE, Interval, steps_between

    def stage(steps: int) -> list[Interval]:
        return [Interval(step, COMPUTE, step, step + 1) for step in range(steps)]

    assert steps_between([stage(20), stage(21)], 10) == range(5, 15)
    assert steps_between([stage(3), stage(21)], 10) == range(3)
    assert steps_between([stage(3), []], 10) == range(0)


def test_a_picture_shows_each_stage_from_the_first_to_the_last_of_the_steps() -> None:
    from xml.etree import ElementTree

    import timeline
    from intervals import COMPUTE, HANDOFF, WAITING, Interval

    first = [Interval(0, COMPUTE, 0, 0.9), Interval(1, COMPUTE, 1, 1.8), Interval(1, HANDOFF, 1.8, 2)]
    second = [Interval(0, COMPUTE, 0.9, 1.5), Interval(1, WAITING, 1.5, 2.1), Interval(1, COMPUTE, 2.1, 3)]
    picture = ElementTree.fromstring(timeline.svg([first, second], range(1, 2), "two <stages"))
    bars = [
        (shape.get("class"), float(shape.get("x", 0)), float(shape.get("width", 0)))
        for shape in picture.findall(".//{*}rect")
        if float(shape.get("height", 0)) == timeline.BAR
    ]
    assert [kind for kind, _, _ in bars] == ["compute odd", "handoff", "compute", "waiting"]
    width = timeline.WIDTH - timeline.LEFT - timeline.RIGHT
    assert bars[0][1:] == pytest.approx((timeline.LEFT, 0.8 * width), abs=0.2)
    assert bars[3][1] + bars[3][2] == pytest.approx(timeline.LEFT + width, abs=0.2), "cut where the picture ends"
    assert picture.findtext("{*}title") == "two <stages"
    with pytest.raises(ValueError, match="none of the steps"):
        timeline.svg([first, second], range(7, 9), "")


def test_settings_of_command_buffers_and_their_table() -> None:
    import command_buffers

    chosen = command_buffers.settings()
    assert chosen["defaults"] == {}
    assert chosen["ours"] == DEFAULTS
    found = {"defaults": [{"1 x 1024, ms": 9.0}, {"1 x 1024, ms": 8.5}], "ours": [{"1 x 1024, ms": 7.0}]}
    assert command_buffers.table(found).splitlines() == [
        "| setting | 1 x 1024, ms |", "|---|---:|", "| defaults | 8.50 to 9.00 |", "| ours | 7.00 |",
    ]  # fmt: skip


def test_a_parts_time_is_not_that_of_what_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    import host_parts

    clock = [0]

    def spend(ns: int) -> None:
        clock[0] += ns

    monkeypatch.setattr(host_parts.time, "thread_time_ns", lambda: clock[0])
    parts = host_parts.Parts()
    inner = parts.of("inner", lambda: spend(5))

    def fail() -> None:
        spend(3)
        inner()
        spend(4)
        raise ValueError

    outer = parts.of("outer", fail)
    for _ in range(2):
        spend(100)
        with pytest.raises(ValueError, match=r"^$"):
            outer()
    assert parts.ns == {"outer": 14, "inner": 10}


def test_threads_that_came_later_are_counted_from_their_birth() -> None:
    from host_parts import used

    assert used({1: 2.0, 2: 5.0}, {1: 3.5, 2: 9.0, 3: 0.25}, frozenset({2})) == 1.75


def test_a_layer_of_llama_launches_what_the_page_on_kernels_says() -> None:
    from step_expected import RELEASES, launches

    (release,) = (release for release in RELEASES if release.name == "Llama 3.1 8B, bf16")
    a_layer = launches(release.config, 3) - launches(release.config, 2)
    page = (BENCHMARKS.parent / "docs" / "kernels.md").read_text()
    assert f"| {release.name} | {a_layer} | {launches(release.config, 2) + 30 * a_layer} |" in page
