"""Workers that note their resident memory before they load weights, for vLLM's `worker_cls`.

    load_model: VmRSS --> file named by POMARIUM_BENCHMARK_PROBE        afterwards the parent reads the peak of that pid

The classes are made on import of this module's attributes, each in the process where its base class can be imported.
"""

import json
import os
from pathlib import Path
from typing import Any

VARIABLE = "VLLM_POMARIUM_BENCHMARK_PROBE"
"""Its prefix is one that the executor carries to workers."""


def note() -> None:
    """Write this process' pid and resident memory to the file that VARIABLE names."""
    facts = {"pid": os.getpid(), "rss": _status(os.getpid(), "VmRSS")}
    Path(os.environ[VARIABLE]).write_text(json.dumps(facts))


def peak_above_start(file: Path) -> int:
    """Bytes by which the noted process' peak exceeds what it held when it was noted. Linux; it must still run."""
    facts = json.loads(file.read_text())
    return _status(facts["pid"], "VmHWM") - int(facts["rss"])


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == field:
            return int(rest.split()[0]) << 10
    raise ValueError(f"no {field} in the status of process {pid}")


def __getattr__(name: str) -> Any:
    if name == "ProbedMetalWorker":
        from pomarium.cluster.engine.scheduling.timed_worker import TimedWorker as Base
    elif name == "ProbedCPUWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker as Base
    else:
        raise AttributeError(name)

    class Probed(Base):
        def load_model(self, **kwargs: Any) -> None:
            note()
            super().load_model(**kwargs)

    Probed.__name__ = Probed.__qualname__ = name
    globals()[name] = Probed
    return Probed
