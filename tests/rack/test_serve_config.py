"""Simulated Macs, and on them the endpoint of deploy/serve.example.yaml, deployed by Ray's own command with a tiny
model in two stages and a key: it answers, a real Prometheus gets every series that dashboard and alarms ask for, and a
faulty file changes nothing.

The tests run in order on one rack and one deployment.
"""

import json
import math
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from monitoring import alarms, dashboard_queries, prometheus, undecided
from openai import APIError, AuthenticationError, OpenAI
from openai.types import Completion
from rack_serving import SharedRack, command, until
from serve_process import CONTEXT
from tiny_models import write_checkpoint

from pomarium.cluster.rack import current

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

EXAMPLE = Path(__file__).parents[2] / "deploy/serve.example.yaml"
KEY = "sk-of-the-test"
DEPLOY_S = 240.0
SEEN_S = 90.0
"""By when each series is there, with a value: agents are told every 10 s, and a rate takes two values."""

MAY_BE_EMPTY = {
    "MacSetAside": "only a rack with sleep.idle sets Macs aside, and this one has none",
    "RequestsRefused": "nobody asks for more than can be done",
}
"""Alarms that have nothing to look at here, and why."""


@dataclass
class Deployed:
    """The rack, and what is deployed on it. `config`: as written to `file`."""

    environ: dict[str, str]
    jobs: str
    file: Path
    config: dict[str, Any]

    @property
    def address(self) -> str:
        args = self.config["applications"][0]["args"]
        return f"{args['host']}:{args['port']}"

    def serve(self, *arguments: str) -> str:
        """Ray's `serve ARGUMENTS`: what it prints."""
        done = subprocess.run(
            [sys.executable, "-m", "ray.serve.scripts", *arguments, "--address", self.jobs],
            env=self.environ, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deploy(self, args: dict[str, Any]) -> None:
        """The file, with these `args`."""
        (application,) = self.config["applications"]
        self.file.write_text(yaml.safe_dump(self.config | {"applications": [application | {"args": args}]}))
        self.serve("deploy", str(self.file))

    def status(self) -> dict[str, Any]:
        """Of the application."""
        token = {"Authorization": f"Bearer {self.environ['RAY_AUTH_TOKEN']}"}
        answer = httpx.get(f"{self.jobs}/api/serve/applications/", headers=token, timeout=30)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()["applications"]["pomarium"]
        return found

    def healthy(self) -> bool:
        try:
            return httpx.get(f"http://{self.address}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def client(self, key: str = KEY) -> OpenAI:
        return OpenAI(base_url=f"http://{self.address}/v1", api_key=key, max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def deployed(four_macs: SharedRack, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    folder = tmp_path_factory.mktemp("deployed")
    ray = current.for_ray_commands(four_macs.ensure().current)
    tiny = write_checkpoint("llama", folder / "tiny", max_position_embeddings=CONTEXT)
    keys = folder / "api_keys"
    keys.touch(0o600)
    keys.write_text(f"{KEY}\n")
    config = configured(yaml.safe_load(EXAMPLE.read_text()), str(tiny), keys)
    found = Deployed(four_macs.environ | ray, ray["RAY_API_SERVER_ADDRESS"], folder / "serve.yaml", config)
    found.deploy(config["applications"][0]["args"])
    until(lambda: found.healthy() or told_of_failure(found), DEPLOY_S)
    assert found.healthy(), found.status()["message"]
    return found


def configured(example: dict[str, Any], model: str, keys: Path) -> dict[str, Any]:
    """The example with another port, model and file of keys."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (application,) = example["applications"]
    (entry,) = application["args"]["models"]
    args = application["args"] | {
        "port": port,
        "api_key_file": str(keys),
        "models": [entry | {"source": model, "name": "tiny", "stages": 2, "engine_args": ["--max-num-seqs", 8]}],
    }
    ingress, engine = application["deployments"]
    changed = application | {
        "args": args,
        "deployments": [ingress, engine | {"name": "engine:tiny"}],
    }
    return example | {"applications": [changed]}


def told_of_failure(deployed: Deployed) -> bool:
    return bool(deployed.status()["status"] == "DEPLOY_FAILED")


def begin(client: OpenAI, tokens: int) -> Iterator[Completion]:
    """A streamed answer of so many tokens; the last piece says how many there were."""
    return client.completions.create(
        model="tiny",
        prompt="abc" * 30,
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )


def finish(stream: Iterator[Completion], tokens: int) -> None:
    """Fails unless the answer comes whole."""
    *_, last = stream
    assert last.usage is not None
    assert last.usage.completion_tokens == tokens


def complete(client: OpenAI, tokens: int = 24) -> None:
    """A whole answer."""
    finish(begin(client, tokens), tokens)


def test_it_answers_whoever_has_the_key(deployed: Deployed) -> None:
    complete(deployed.client())
    with pytest.raises(AuthenticationError):
        complete(deployed.client("another"))


def test_serve_s_own_paths_are_not_there(deployed: Deployed) -> None:
    answer = httpx.get(f"http://{deployed.address}/-/routes", timeout=30)
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")


def test_its_two_stages_are_on_two_macs(deployed: Deployed) -> None:
    (replica,) = until(lambda: json.loads(command(deployed.environ, "status", "--json"))["replicas"], 30)
    assert len({stage["mac"] for stage in replica["stages"]}) == 2


@dataclass
class Outcomes:
    """Of many requests. refused: before they had begun. broken: after that."""

    answered: int = 0
    refused: int = 0
    broken: list[str] = field(default_factory=list)

    def ask(self, client: OpenAI, tokens: int) -> None:
        """One more."""
        try:
            stream = begin(client, tokens)
        except APIError:
            self.refused += 1
            time.sleep(0.5)
            return
        try:
            finish(stream, tokens)
            self.answered += 1
        except (APIError, httpx.HTTPError, AssertionError) as error:
            self.broken.append(repr(error))


@contextmanager
def traffic(deployed: Deployed, tokens: int = 24) -> Iterator[Outcomes]:
    """Requests, three at a time, while the context is open."""
    over, outcomes = threading.Event(), Outcomes()

    def ask() -> None:
        client = deployed.client()
        while not over.is_set():
            outcomes.ask(client, tokens)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield outcomes
    finally:
        over.set()
        for thread in threads:
            thread.join(60)


def test_prometheus_gets_every_series_of_dashboard_and_alarms(deployed: Deployed, tmp_path: Path) -> None:
    queries = dashboard_queries() | {name: undecided(expression) for name, expression in alarms().items()}
    assert len(queries) > 40
    with prometheus(tmp_path, deployed.address, KEY) as asked, traffic(deployed):
        deadline = time.monotonic() + SEEN_S
        missing = set(queries)
        while missing - MAY_BE_EMPTY.keys() and time.monotonic() < deadline:
            time.sleep(1)
            missing = {name for name in missing if not any(map(math.isfinite, asked.query(queries[name])))}
        targets = asked.targets()
        assert [(target["health"], target["lastError"]) for target in targets] == [("up", "")]
        assert missing == MAY_BE_EMPTY.keys(), {name: queries[name] for name in missing}
        assert asked.query('sum(pomarium_macs{state="awake"})') == [4.0]
        assert asked.query(alarms()["EndpointDown"]) == [], "an alarm while all is well"


def test_a_faulty_file_is_refused_in_a_sentence_and_the_endpoint_goes_on(deployed: Deployed) -> None:
    args = deployed.config["applications"][0]["args"]
    deployed.deploy(args | {"models": [{"source": "smollm2", "replica": 2}]})
    status = until(lambda: (now := deployed.status())["status"] == "DEPLOY_FAILED" and now, 90)
    last = status["message"].strip().splitlines()[-1]
    assert last.endswith("SettingsError: args.models[1].replica: this argument is unknown.")
    complete(deployed.client(), 4)


@pytest.mark.full
def test_a_changed_file_replaces_the_engine_after_its_last_answer(deployed: Deployed) -> None:
    (application,) = deployed.config["applications"]
    (model,) = application["args"]["models"]
    before = replicas(deployed)
    with traffic(deployed, 400) as outcomes:
        until(lambda: outcomes.answered, DEPLOY_S)
        deployed.deploy(application["args"] | {"models": [model | {"engine_args": ["--max-num-seqs", 6]}]})
        until(lambda: replicas(deployed) and not replicas(deployed) & before, DEPLOY_S)
        until(deployed.healthy, DEPLOY_S)
        since = outcomes.answered
        until(lambda: outcomes.answered > since, DEPLOY_S)
    assert outcomes.broken == []


def replicas(deployed: Deployed) -> set[str]:
    """Engines that serve; none is told of while Serve builds the application."""
    found = deployed.status()["deployments"].get("engine:tiny", {"replicas": []})
    return {replica["replica_id"] for replica in found["replicas"] if replica["state"] == "RUNNING"}


def test_shutdown_removes_it(deployed: Deployed) -> None:
    deployed.serve("shutdown", "-y")
    until(lambda: not deployed.healthy(), 30)
