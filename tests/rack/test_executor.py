"""RackExecutor under vLLM's engine on one embedded Ray, with a stub for the model (stub_worker.py)."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from tiny_models import write_checkpoint

TESTS = Path(__file__).parents[1]

PRELUDE = """
import os, signal, sys, threading, time
from vllm import LLM, SamplingParams

def engine(directory, **changes):
    options = dict(worker_cls="stub_worker.StubWorker", max_model_len=400, max_num_seqs=8, skip_tokenizer_init=True)
    return LLM(directory, **(options | {"distributed_executor_backend": "ray"} | changes))

def generate(llm, tokens):
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0)
    outputs = llm.generate([{"prompt_token_ids": [7] * n} for n in (5, 16, 40)], params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]

if __name__ == "__main__":
"""

TOKENS = [[3 + (n + i) % 120 for i in range(30)] for n in (5, 16, 40)]

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint("llama", tmp_path_factory.mktemp("model")))


def run(tmp_path: Path, model: str, body: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `body` as a script of its own: Ray, spawned engines and loggers are a process' affair."""
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + textwrap.indent(textwrap.dedent(body), "    "))
    ray_folder = Path("/tmp") / f"pm{os.getpid()}"
    ray_folder.mkdir(exist_ok=True)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_"))}
    environ |= {"PYTHONPATH": str(TESTS / "rack"), "RAY_TMPDIR": str(ray_folder), "MODEL": model, **environment}
    done = subprocess.run([sys.executable, str(script)], env=environ, capture_output=True, text=True, timeout=280)
    print(done.stdout[-8000:], done.stderr[-8000:])
    return done


def test_in_process_engine(tmp_path: Path, model: str) -> None:
    """Tokens, devices, errors of control calls, and the death of the worker, with one start of Ray."""
    done = run(
        tmp_path,
        model,
        """
        import ray
        from pomarium.cluster.executor.codec import WorkerError, WorkerLostError
        llm = engine(os.environ["MODEL"])
        executor = llm.llm_engine.engine_core.engine_core.model_executor
        print("TOKENS", generate(llm, 30))
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        (worker,) = executor.workers
        assert worker.endpoint.address.startswith("127.0.0.1:"), worker
        assert worker.endpoint.pid != os.getpid()
        print("DEVICES", executor.collective_rpc(lambda w: w.worker.devices))
        assert executor.collective_rpc("echo", args=(b"x" * (8 << 20),)) == [b"x" * (8 << 20)]
        assert executor.collective_rpc("echo", args=(1,), non_block=True).result(10) == [1]
        try:
            executor.collective_rpc("raise_value_error")
        except WorkerError as error:
            assert "ValueError: as asked" in str(error) and "raise_value_error" in str(error)
        executor.check_health()
        called = threading.Event()
        executor.register_failure_callback(called.set)
        killed = []
        def kill():
            time.sleep(1)
            killed.append(time.monotonic())
            os.kill(worker.endpoint.pid, signal.SIGKILL)
        threading.Thread(target=kill).start()
        try:
            generate(llm, 350)
        except WorkerLostError as error:
            print("LOST", f"{time.monotonic() - killed[0]:.3f}", str(error))
        assert called.wait(5)
        try:
            executor.check_health()
        except WorkerLostError:
            print("UNHEALTHY")
        executor.shutdown()
        executor.shutdown()
        time.sleep(1)
        print("FREE", ray.available_resources().get("mlx"))
        """,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_STUB_STEP_MS="10",
        VLLM_METAL_VISIBLE_DEVICES="5",
    )
    assert done.returncode == 0
    assert f"TOKENS {TOKENS}" in done.stdout
    assert "DEVICES ['0']" in done.stdout
    assert (done.stdout + done.stderr).count("VLLM_METAL_VISIBLE_DEVICES=5 is overridden") == 1
    lost = next(line for line in done.stdout.splitlines() if line.startswith("LOST"))
    assert float(lost.split()[1]) < 2.0
    assert "worker 0 (pid " in lost
    assert "UNHEALTHY" in done.stdout
    assert "FREE 1.0" in done.stdout


def test_engine_in_its_own_process_leaves_no_orphan_when_killed(tmp_path: Path, model: str) -> None:
    done = run(
        tmp_path,
        model,
        """
        import psutil
        from vllm.v1.engine.exceptions import EngineDeadError
        llm = engine(os.environ["MODEL"])
        print("TOKENS", generate(llm, 30))
        (pid,) = llm.collective_rpc(lambda w: os.getpid())
        core = [p for p in psutil.Process().children() if "EngineCore" in " ".join(p.cmdline())]
        assert len(core) == 1, core
        print("WORKER", pid)
        core[0].kill()
        deadline = time.monotonic() + 15
        while psutil.pid_exists(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        print("GONE", not psutil.pid_exists(pid))
        """,
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
    )
    assert f"TOKENS {TOKENS}" in done.stdout
    worker = next(line for line in done.stdout.splitlines() if line.startswith("WORKER"))
    assert "GONE True" in done.stdout
    assert not psutil.pid_exists(int(worker.split()[1]))


def test_a_users_fault_in_the_worker_reaches_the_user_as_its_sentence(tmp_path: Path, model: str) -> None:
    done = run(
        tmp_path,
        model,
        """
        from pomarium.worker.errors import CheckpointError
        try:
            engine(os.environ["MODEL"])
        except CheckpointError as error:
            print("SENTENCE", error)
        """,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_STUB_FAIL="load_model",
    )
    assert done.returncode == 0
    assert "SENTENCE model.safetensors is truncated: download it again." in done.stdout


def test_a_step_that_raises_ends_generate_with_the_workers_traceback(tmp_path: Path, model: str) -> None:
    done = run(
        tmp_path,
        model,
        """
        from pomarium.cluster.executor.codec import WorkerError
        llm = engine(os.environ["MODEL"])
        try:
            generate(llm, 30)
        except WorkerError as error:
            print("STEP", "the stub fails in its fourth step" in str(error), "stub_worker.py" in str(error))
        """,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_STUB_FAIL="execute_model",
    )
    assert done.returncode == 0
    assert "STEP True True" in done.stdout


def test_a_frozen_worker_is_seen_within_seconds(tmp_path: Path, model: str) -> None:
    done = run(
        tmp_path,
        model,
        """
        from pomarium.cluster.executor.codec import WorkerLostError
        llm = engine(os.environ["MODEL"])
        (worker,) = llm.llm_engine.engine_core.engine_core.model_executor.workers
        frozen = []
        def freeze():
            time.sleep(1)
            frozen.append(time.monotonic())
            os.kill(worker.endpoint.pid, signal.SIGSTOP)
        threading.Thread(target=freeze).start()
        try:
            generate(llm, 350)
        except WorkerLostError as error:
            print("LOST", f"{time.monotonic() - frozen[0]:.3f}", str(error))
        os.kill(worker.endpoint.pid, signal.SIGKILL)
        """,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_STUB_STEP_MS="10",
    )
    assert done.returncode == 0
    lost = next(line for line in done.stdout.splitlines() if line.startswith("LOST"))
    assert 1.0 < float(lost.split()[1]) < 10.0
