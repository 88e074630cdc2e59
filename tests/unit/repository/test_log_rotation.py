"""`deploy/rotate_logs.sh` bounds what jobs log, and keeps what may be in use."""

import os
import subprocess
import time
from pathlib import Path

DEPLOY = Path(__file__).parents[3] / "deploy"


def rotate(*folders: Path, most_bytes: int = 1000) -> None:
    environ = os.environ | {"POMARIUM_LOG_BYTES": str(most_bytes)}
    subprocess.run([DEPLOY / "rotate_logs.sh", *folders], env=environ, check=True, timeout=30)


def test_a_log_is_bounded_while_it_is_written(tmp_path: Path) -> None:
    log = tmp_path / "head.log"
    with log.open("a") as writer:
        for number in range(8):
            writer.write(f"{number}" * 1100 + "\n")
            writer.flush()
            rotate(tmp_path)
            assert log.stat().st_size == 0
        writer.write("after\n")
    rotate(tmp_path)
    assert log.read_text() == "after\n"
    copies = sorted(path.name for path in tmp_path.glob("*.gz"))
    assert copies == [f"head.log.{number}.gz" for number in range(1, 6)]
    newest = subprocess.run(["gzip", "-dc", tmp_path / "head.log.1.gz"], capture_output=True, text=True, check=True)
    assert newest.stdout == "7" * 1100 + "\n"


def test_old_logs_go_but_never_the_one_that_may_be_in_use(tmp_path: Path) -> None:
    names = ["serve-20250101-000000-1.log", "serve-20250201-000000-2.log", "batch-20250101-000000-3.log", "head.log",
             "head.log.1.gz", "rack.json", "serve-20260101-000000-4.log"]  # fmt: skip
    for name in names:
        (tmp_path / name).write_text("x")
        os.utime(tmp_path / name, (time.time() - 40 * 86400,) * 2)
    (tmp_path / "serve-20250101-000000-9.log").write_text("new")
    rotate(tmp_path, tmp_path / "nowhere")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"serve-20250101-000000-9.log", "batch-20250101-000000-3.log", "head.log", "rack.json",
                    "serve-20260101-000000-4.log"}  # fmt: skip
