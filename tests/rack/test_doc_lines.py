"""The command lines of the pages, run as they stand, in order: in a folder like a clone's, on one machine, then on a
rack of three simulated Macs. What stands for something of the reader's own is mapped in `reader`, and nowhere else.
"""

import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import doc_lines
import pytest
import yaml
from doc_lines import PLAN, ROOT, RUN, Line
from gguf import GGMLQuantizationType as Kind
from rack_serving import until
from tiny_gguf import write_gguf
from tiny_models import write_checkpoint

from pomarium.cluster.node import ports

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

READY_S, DONE_S = 400.0, 400.0
REQUEST = {"method": "POST", "url": "/v1/chat/completions"}


@dataclass
class Reader:
    """Somebody who pastes lines into a shell. done: patterns of PLAN that were run."""

    folder: Path
    environ: Mapping[str, str]
    mapped: Mapping[str, str]
    done: set[str] = field(default_factory=set)

    def line(self, page: str, beginning: str) -> str:
        """The page's line, with what its block exports above it, as bash takes it."""
        begins = {line for line in doc_lines.read() if line.page == page and self._begins(line, beginning)}
        (found,) = {line for line in begins if line.text == beginning} or begins
        self.done.update(pattern for pattern, what in PLAN.items() if what == RUN and re.fullmatch(pattern, found.text))
        text = found.text
        for placeholder, own in self.mapped.items():
            text = text.replace(placeholder, own)
        return "\n".join(["set -e", *found.before, text])

    def _begins(self, line: Line, beginning: str) -> bool:
        return line.text == beginning or line.text.startswith(f"{beginning} ")

    def run(self, page: str, beginning: str) -> str:
        """What the line prints. Fails unless it ends well."""
        done = subprocess.run(
            ["bash", "-c", self.line(page, beginning)],
            cwd=self.folder, env=self.environ, capture_output=True, text=True, timeout=DONE_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def serving(self, page: str, beginning: str) -> Iterator[str]:
        """`pomarium serve` of the page until Ctrl-C, once it is ready: what it has printed."""
        output = self.folder / "output"
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-c", self.line(page, beginning).replace("set -e\n", "exec ")],
                cwd=self.folder, env=self.environ, stdout=file, stderr=file, start_new_session=True,
            )  # fmt: skip
        try:
            until(lambda: process.poll() is not None or "ready" in output.read_text(), READY_S, output.read_text)
            assert process.poll() is None, output.read_text()
            yield output.read_text()
            os.killpg(process.pid, signal.SIGINT)
            assert process.wait(60) == 0
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    folder = tmp_path_factory.mktemp("clone")
    for name in (".venv", "deploy"):
        (folder / name).symlink_to(ROOT / name)
    write_checkpoint("llama", folder / "my-mlx-model", max_position_embeddings=512)
    write_gguf("llama", folder / "other.gguf", Kind.Q4_0)
    asked = [{"custom_id": n, "body": {"messages": [{"role": "user", "content": n}], "max_tokens": 4}} for n in "ab"]
    (folder / "in.jsonl").write_text("".join(f"{json.dumps(one | REQUEST)}\n" for one in asked))
    port = ports.free(1)[0]
    mapped = {
        "http://127.0.0.1:8000": f"http://127.0.0.1:{port}",
        "http://HEAD:8000": f"http://127.0.0.1:{port}",
        "pomarium serve ": f"pomarium serve --port {port} ",
    }
    with tempfile.TemporaryDirectory(prefix="pmd", dir="/tmp") as state:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "POMARIUM_"))}
        reader = Reader(folder, environ | {"XDG_STATE_HOME": state, "XDG_CONFIG_HOME": state}, mapped)
        try:
            yield reader
        finally:
            reader.run("README.md", ".venv/bin/pomarium rack down")


def port_of(reader: Reader) -> int:
    return int(reader.mapped["http://HEAD:8000"].rpartition(":")[2])


def test_one_machine(reader: Reader) -> None:
    assert "vllm: " in reader.run("README.md", ".venv/bin/pomarium doctor")
    assert "VLLM_METAL_MEMORY_FRACTION" in reader.run("README.md", ".venv/bin/pomarium env")
    assert "answers end at <|im_end|>" in reader.run("docs/models.md", ".venv/bin/pomarium models show")
    for page in ("README.md", "docs/models.md"):
        assert "smollm2" in reader.run(page, ".venv/bin/pomarium models list")
    with reader.serving("README.md", ".venv/bin/pomarium serve ./my-mlx-model") as told:
        assert "serves my-mlx-model, other;" in told
        listed = json.loads(reader.run("docs/operations.md", "curl http://HEAD:8000/v1/models"))
        assert [model["id"] for model in listed["data"]] == ["my-mlx-model", "other"]


def test_a_rack(reader: Reader) -> None:
    assert "3 simulated Mac(s)" in reader.run("README.md", ".venv/bin/pomarium rack up --simulate 3")
    with reader.serving("README.md", ".venv/bin/pomarium serve --stages 3"):
        answer = json.loads(reader.run("README.md", "curl http://127.0.0.1:8000/v1/chat/completions"))
        assert "Paris" in answer["choices"][0]["message"]["content"]
        assert "Paris" in reader.run("docs/serving.md", 'echo "What is the capital of France?"')
        for page in ("README.md", "docs/distributed.md", "docs/operations.md"):
            assert "3 of 3 Macs alive" in reader.run(page, ".venv/bin/pomarium rack status")
        assert "3 of 3 Macs alive" in reader.run("docs/rack.md", "pomarium rack status")


def test_a_batch(reader: Reader) -> None:
    reader.run("docs/batch.md", ".venv/bin/pomarium batch run")
    results = [json.loads(line) for line in (reader.folder / "out.jsonl").read_text().splitlines()]
    assert sorted(result["custom_id"] for result in results) == ["a", "b"]
    assert [result["response"]["status_code"] for result in results] == [200, 200]


def test_ray_s_own_commands(reader: Reader) -> None:
    page = "docs/operations.md"
    reader.run(page, "cp deploy/serve.example.yaml")
    file = reader.folder / "serve.yaml"
    config = yaml.safe_load(file.read_text())
    args = config["applications"][0]["args"]
    args["port"] = port_of(reader)
    args["models"][0] |= {"source": str(reader.folder / "my-mlx-model")}
    file.write_text(yaml.safe_dump(config))
    reader.run(page, "serve deploy")
    deadline = time.monotonic() + READY_S
    while "status: RUNNING" not in (said := reader.run(page, "serve status")):
        assert time.monotonic() < deadline, said
        assert "DEPLOY_FAILED" not in said, said
        time.sleep(2)
    listed = json.loads(reader.run(page, "curl http://HEAD:8000/v1/models"))
    assert [model["id"] for model in listed["data"]] == ["smollm2"]
    status = reader.run(page, "ray status")
    assert re.search(r"/3\.0 mlx\b", status), status


def test_every_line_that_is_to_be_run_was(reader: Reader) -> None:
    reader.run("README.md", ".venv/bin/pomarium rack down")
    exports = {pattern for pattern in PLAN if pattern.startswith(("export", "eval"))}  # before others of their blocks
    assert {pattern for pattern, what in PLAN.items() if what == RUN} - exports == reader.done - exports
