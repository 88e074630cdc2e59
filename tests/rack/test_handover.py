"""Workers started ahead of their engine, with a stub for the model (stub_worker.py): adopted, lost, orphaned."""

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from tiny_models import write_checkpoint

PRELUDE = """
import os, sys, time
import psutil
from pomarium.cluster.executor import handover, launch, ray_connection
from pomarium.cluster.executor.staging import Ask
from pomarium.cluster.executor.team import assemble
ray_connection.ensure_connected()

def started():
    team = assemble(Ask(os.environ["MODEL"]))
    return team, psutil.Process(team.members[0].contact.endpoint.pid)

team, worker = started()

def engine():
    from vllm import LLM
    return LLM(os.environ["MODEL"], worker_cls="stub_worker.StubWorker", max_model_len=400, skip_tokenizer_init=True,
               distributed_executor_backend="ray", disable_log_stats=True)
"""

LOST = """
worker.kill()
worker.wait(15)
from pomarium.cluster.executor.codec import WorkerLostError
try:
    launch.connect(team.members, lambda rank, error: None)
except WorkerLostError as error:
    print(f"LOST {error}")
team.dissolve()
team, worker = started()
"""

ADOPTED = """
with handover.offer(team.members, os.environ):
    llm = engine()
from vllm import SamplingParams
params = SamplingParams(max_tokens=8, ignore_eos=True, detokenize=False, temperature=0)
(output,) = llm.generate([{"prompt_token_ids": [7] * 5}], params, use_tqdm=False)
print(f"TOKENS {list(output.outputs[0].token_ids)}")  # in one piece: Ray prints beside it
found = llm.collective_rpc(lambda w: (os.getpid(), w.worker.devices))
print(f"ADOPTED {found == [(worker.pid, '0')]}")
(core,) = [p for p in psutil.Process().children() if "EngineCore" in " ".join(p.cmdline())]
core.kill()
print(f"ENDED {not psutil.wait_procs([worker], timeout=15)[1]}")
"""

ORPHANED = """
print(f"WORKER {worker.pid} {worker.create_time()}", flush=True)
os.kill(os.getpid(), 9)
"""

pytestmark = pytest.mark.e2e


def run(body: str, tmp_path: Path, code: int = 0) -> str:
    with tempfile.TemporaryDirectory(prefix="pm", dir="/tmp") as ray_folder:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_"))}
        environ |= {
            "PYTHONPATH": str(Path(__file__).parent),
            "RAY_TMPDIR": ray_folder,
            "MODEL": str(write_checkpoint("llama", tmp_path / "model")),
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        }
        script = tmp_path / "script.py"
        # EngineCore is spawned and imports the script once more.
        script.write_text("if __name__ == '__main__':\n" + textwrap.indent(PRELUDE + body, "    "))
        result = subprocess.run([sys.executable, str(script)], env=environ, capture_output=True, text=True, timeout=240)
        assert result.returncode == code, (result.stdout + result.stderr)[-8000:]
        return result.stdout


def test_a_worker_lost_before_its_adoption_is_named_and_the_next_is_adopted_and_ends_with_its_engine(
    tmp_path: Path,
) -> None:
    output = run(LOST + ADOPTED, tmp_path)
    assert "LOST worker 0 (pid " in output
    assert f"TOKENS {list(range(8, 16))}" in output
    assert "ADOPTED True" in output
    assert "ENDED True" in output


def test_a_worker_that_nobody_adopted_ends_with_who_started_it(tmp_path: Path) -> None:
    (line,) = [text for text in run(ORPHANED, tmp_path, -signal.SIGKILL).splitlines() if text.startswith("WORKER")]
    pid, created = int(line.split()[1]), float(line.split()[2])
    deadline = time.monotonic() + 15
    while psutil.pid_exists(pid) and psutil.Process(pid).create_time() == created:
        assert time.monotonic() < deadline
        time.sleep(0.1)
