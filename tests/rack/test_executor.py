"""RackExecutor under vLLM's engine, with a stub for the model (stub_worker.py).

All scripts run in one process (engine_host.py): the first starts its engine, and that engine a Ray, in a process of its
own, the others share one embedded Ray.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from engine_host import END
from tiny_models import write_checkpoint

TESTS = Path(__file__).parents[1]

PRELUDE = """
import os, signal, sys, threading, time
from vllm import LLM, SamplingParams

def engine(directory, **changes):
    options = dict(worker_cls="stub_worker.StubWorker", max_model_len=400, max_num_seqs=8, skip_tokenizer_init=True)
    return LLM(directory, **(options | {"distributed_executor_backend": "ray"} | changes))

def executor_of(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor

def generate(llm, tokens):
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, temperature=0)
    outputs = llm.generate([{"prompt_token_ids": [7] * n} for n in (5, 16, 40)], params, use_tqdm=False)
    return [list(o.outputs[0].token_ids) for o in outputs]

"""

TOKENS = [[3 + (n + i) % 120 for i in range(30)] for n in (5, 16, 40)]

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_checkpoint("llama", tmp_path_factory.mktemp("model")))


Run = Callable[..., str]


@pytest.fixture(scope="module")
def run(model: str) -> Iterator[Run]:
    """Runs a script in the shared process and returns what it printed; AssertionError if it raised."""
    with tempfile.TemporaryDirectory(prefix="pm", dir="/tmp") as ray_folder:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_"))}
        environ |= {"PYTHONPATH": str(TESTS / "rack"), "RAY_TMPDIR": ray_folder, "MODEL": model}
        host = subprocess.Popen(
            [sys.executable, str(TESTS / "engine_host.py")],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert host.stdin is not None
        assert host.stdout is not None

        def execute(body: str, **environment: str) -> str:
            assert host.stdin is not None
            assert host.stdout is not None
            script = {"body": PRELUDE + textwrap.dedent(body), "environment": environment}
            print(json.dumps(script), file=host.stdin, flush=True)
            lines = []
            for line in host.stdout:
                if line.startswith(END):
                    assert line.split()[-1] == "0", "".join(lines)[-8000:]
                    return "".join(lines)
                lines.append(line)
            raise AssertionError("the process ended: " + "".join(lines)[-8000:])

        try:
            yield execute
            host.stdin.close()
            assert host.wait(30) == 0
        finally:
            for process in [*psutil.Process(host.pid).children(recursive=True), host] if host.poll() is None else []:
                process.kill()


def test_engine_in_its_own_process_leaves_no_orphan_when_killed(run: Run) -> None:
    """Its Ray ends with it, but for two agents of Ray's that first try for some 80 s to report that to it."""
    output = run(
        """
        import psutil
        from vllm.v1.engine.exceptions import EngineDeadError
        llm = engine(os.environ["MODEL"])
        print(f"TOKENS {generate(llm, 30)}")
        (pid,) = llm.collective_rpc(lambda w: os.getpid())
        core = [p for p in psutil.Process().children() if "EngineCore" in " ".join(p.cmdline())]
        assert len(core) == 1, core
        all_of_it = core[0].children(recursive=True)
        assert pid in [p.pid for p in all_of_it]
        core[0].kill()
        _, alive = psutil.wait_procs(all_of_it, timeout=15)
        left = {p.cmdline()[0].strip() for p in alive} - {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
        print(f"LEFT {left}")
        """,
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",
    )
    assert f"TOKENS {TOKENS}" in output
    assert "LEFT set()" in output


def test_in_process_engine(run: Run) -> None:
    """Tokens, devices, errors of control calls, and the death of the worker, with one start of Ray."""
    output = run(
        """
        import ray
        from pomarium.cluster.executor.codec import WorkerError, WorkerLostError
        llm = engine(os.environ["MODEL"])
        executor = executor_of(llm)
        print(f"TOKENS {generate(llm, 30)}")
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        (worker,) = executor.workers
        assert worker.member.contact.endpoint.address.startswith("127.0.0.1:"), worker
        assert worker.member.contact.endpoint.pid != os.getpid()
        print(f"DEVICES {executor.collective_rpc(lambda w: w.worker.devices)}")
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
            os.kill(worker.member.contact.endpoint.pid, signal.SIGKILL)
        threading.Thread(target=kill).start()
        try:
            generate(llm, 350)
        except WorkerLostError as error:
            print(f"LOST {time.monotonic() - killed[0]:.3f} {error}")
        assert called.wait(5)
        try:
            executor.check_health()
        except WorkerLostError:
            print("UNHEALTHY")
        executor.shutdown()
        executor.shutdown()
        deadline = time.monotonic() + 20
        while not ray.available_resources().get("mlx") and time.monotonic() < deadline:
            time.sleep(0.1)
        print(f"FREE {ray.available_resources().get('mlx')}")
        """,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_STUB_STEP_MS="10",
        VLLM_METAL_VISIBLE_DEVICES="5",
    )
    assert f"TOKENS {TOKENS}" in output
    assert "DEVICES ['0']" in output
    assert output.count("VLLM_METAL_VISIBLE_DEVICES=5 is overridden") == 1
    lost = re.search(r"LOST (\S+) (.*)", output)  # a line of a log may stand before it
    assert lost is not None, output
    assert float(lost[1]) < 2.0
    assert "worker 0 (pid " in lost[2]
    assert "UNHEALTHY" in output
    assert "FREE 1.0" in output


def test_tokens_that_are_read_late_are_the_same(run: Run) -> None:
    """The real worker, told to leave its tokens on the device as on a GPU: the next step comes before they are read."""
    output = run(
        """
        llm = engine(os.environ["MODEL"], worker_cls="auto")
        waited = generate(llm, 30)

        def read_late(worker):
            runner, queue, worker.late_steps = worker.worker.runner, worker.worker.runner._queue, 0
            def counted(*arguments):
                worker.late_steps += 1
                return queue(*arguments)
            runner._ahead, runner._queue = True, counted

        executor_of(llm).collective_rpc(read_late)
        assert generate(llm, 30) == waited
        assert len(set(map(tuple, waited))) == 3
        (steps,) = executor_of(llm).collective_rpc(lambda worker: worker.late_steps)
        print(f"LATE {steps}")
        executor_of(llm).shutdown()
        """,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    assert int(output.split("LATE ")[1].split()[0]) >= 29


def test_a_users_fault_in_the_worker_reaches_the_user_as_its_sentence(run: Run) -> None:
    output = run(
        """
        from pomarium.worker.errors import CheckpointError
        try:
            engine(os.environ["MODEL"])
        except CheckpointError as error:
            print(f"SENTENCE {error}")
        """,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_STUB_FAIL="load_model",
    )
    assert "SENTENCE model.safetensors is truncated: download it again." in output


def test_a_step_that_raises_ends_generate_with_the_workers_traceback(run: Run) -> None:
    output = run(
        """
        from pomarium.cluster.executor.codec import WorkerError
        llm = engine(os.environ["MODEL"])
        try:
            generate(llm, 30)
        except WorkerError as error:
            # One text: the log's lines come from another thread.
            print(f"STEP {'the stub fails in its fourth step' in str(error)} {'stub_worker.py' in str(error)}")
        executor_of(llm).shutdown()
        """,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_STUB_FAIL="execute_model",
    )
    assert "STEP True True" in output


def test_a_frozen_worker_is_seen_within_seconds(run: Run) -> None:
    output = run(
        """
        from pomarium.cluster.executor.codec import WorkerLostError
        llm = engine(os.environ["MODEL"])
        (worker,) = executor_of(llm).workers
        frozen = []
        def freeze():
            time.sleep(1)
            frozen.append(time.monotonic())
            os.kill(worker.member.contact.endpoint.pid, signal.SIGSTOP)
        threading.Thread(target=freeze).start()
        try:
            generate(llm, 350)
        except WorkerLostError as error:
            print(f"LOST {time.monotonic() - frozen[0]:.3f} {error}")
        os.kill(worker.member.contact.endpoint.pid, signal.SIGKILL)
        executor_of(llm).shutdown()
        """,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_STUB_STEP_MS="10",
    )
    lost = re.search(r"LOST (\S+) ", output)
    assert lost is not None, output
    assert 1.0 < float(lost[1]) < 10.0
