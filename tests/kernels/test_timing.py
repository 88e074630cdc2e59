"""What `pomarium selftest` times runs: every workload, small, on the emulator."""

from emulator.launcher import EmulatedLauncher

from pomarium.kernels import timing
from pomarium.kernels.gpu_family import Family, Gpu
from pomarium.kernels.timing import Sizes, Timing

SMALL = Sizes(4, 2, 64, 2, 32, 16, 8, 2, 2, 16, 1 << 10)


def test_every_workload_runs_and_has_a_rate() -> None:
    measured = timing.measure(EmulatedLauncher(), Gpu(Family.APPLE, 1), SMALL, rounds=1)
    assert [each.name.partition(",")[0] for each in measured] == [
        "copy",
        "reshape_and_cache",
        "paged_attention_decode",
        "paged_attention_decode",
        "paged_attention_prefill",
        "mla_decode",
        "gdn_recurrent_decode",
    ]
    assert all(each.rate > 0 for each in measured)


def test_bytes_are_those_that_have_to_move() -> None:
    """One decode step reads all K and V once; states are read and written."""
    by_name = {each.name: each.nbytes for each in timing.workloads(EmulatedLauncher(), Gpu(Family.APPLE, 1), SMALL)}
    assert by_name["paged_attention_decode, 2 x 32 keys"] == 2 * 32 * 2 * 64 * 2 * 2
    assert by_name["gdn_recurrent_decode, 2 states"] == 2 * 2 * 16 * 16 * 4 * 2


def test_the_table() -> None:
    assert timing.text([Timing("copy", 2.0, 10**9)]).splitlines()[-1] == "| copy | 2.000 | 500 |"
