"""What is served, decided from the command line alone."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.cluster.endpoint.app import passed_environment
from pomarium.cluster.replica.serve_plan import REPLICA_CPUS, ModelPlan, ServePlan, served_names
from pomarium.worker import command_buffers
from pomarium.worker.errors import SettingsError


def model(name: str = "m", replicas: int = 1, stages: int | None = 1) -> ModelPlan:
    return ModelPlan(name, f"/models/{name}", {}, replicas, stages)


@given(replicas=st.integers(1, 5), stages=st.integers(1, 6) | st.none())
def test_an_own_ray_has_room_for_every_worker(replicas: int, stages: int | None) -> None:
    plan = ServePlan((model(replicas=replicas, stages=stages),))
    assert plan.workers() == replicas * (stages or 1)
    assert plan.cpus() >= replicas * REPLICA_CPUS + 1


def test_two_models_of_one_name_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"called 'a'.*--served-name"):
        ServePlan((model("a"), model("b"), model("a")))


def test_nothing_to_serve_is_refused() -> None:
    with pytest.raises(SettingsError, match="No model"):
        ServePlan(())


@pytest.mark.parametrize("origin", ["*", "https://chat.example", "http://localhost:3000", "http://[::1]:3000"])
def test_origins_are_as_browsers_send_them(origin: str) -> None:
    assert ServePlan((model(),), origins=(origin,)).origins == (origin,)


@pytest.mark.parametrize("origin", ["", "chat.example", "https://chat.example/", "https://*.example", "null"])
def test_what_no_browser_sends_is_no_origin(origin: str) -> None:
    with pytest.raises(SettingsError, match="is no origin: write it as"):
        ServePlan((model(),), origins=(origin,))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("/models/Llama-8B", "Llama-8B"),
        ("/models/Llama-8B/", "Llama-8B"),
        ("/models/tiny.Q4_1.gguf", "tiny.Q4_1"),
        ("/models/X.GGUF", "X"),
        ("/models/a [1] 模型", "a [1] 模型"),
        ("/", "/"),
        ("org/Model-1.5", "org/Model-1.5"),
        ("a" * 5000, "a" * 5000),
    ],
)
def test_own_name_of_a_model(text: str, name: str) -> None:
    assert served_names([text], []) == (name,)


def test_names_are_those_that_were_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a hub's cache, where each file is a link to one that is called by its hash."""
    blob = tmp_path / "blobs" / ("0f" * 32)
    blob.mkdir(parents=True)
    (blob / "weights").write_text("")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "Tiny-Q4.gguf").symlink_to(blob / "weights")
    (snapshot / "folder").symlink_to(blob)
    (snapshot / "folder.gguf").symlink_to(blob)
    monkeypatch.chdir(snapshot)
    typed = ["Tiny-Q4.gguf", "./Tiny-Q4.gguf", str(snapshot / "folder"), "folder", "folder.gguf", "../snapshot/folder"]
    assert served_names(typed, []) == ("Tiny-Q4", "Tiny-Q4", "folder", "folder", "folder.gguf", "folder")
    assert served_names(["."], []) == ("snapshot",)


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"is not UTF-8.*--served-name"):
        served_names(["/models/caf\udce9"], [])
    with pytest.raises(SettingsError, match="is not UTF-8"):
        served_names(["/models/m"], ["\udce9"])


def test_given_names_must_match_the_models() -> None:
    assert served_names(["a/b", "c/d"], ["x", "y"]) == ("x", "y")
    with pytest.raises(SettingsError, match="1 times for 2 models"):
        served_names(["a/b", "c/d"], ["x"])


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:81"),
        ("10.0.0.7", "http://10.0.0.7:81"),
        ("::", "http://[::1]:81"),
        ("::1", "http://[::1]:81"),
        ("fe80::1%eth0", "http://[fe80::1%25eth0]:81"),
        ("mac.local", "http://mac.local:81"),
    ],
)
def test_url_is_one_that_this_machine_can_open(host: str, url: str) -> None:
    assert ServePlan((model(),), host, 81).url == url


def test_only_settings_travel_to_replicas() -> None:
    assert passed_environment(
        {
            "VLLM_METAL_DEBUG": "1",
            "HF_HOME": "/h",
            "PATH": "/bin",
            "AWS_SECRET": "s",
            "POMARIUM_TLS": "/t",
            "POMARIUM_API_KEY": "k",
            command_buffers.OPERATIONS: "100",
            command_buffers.MEGABYTES: "7",
        }
    ) == {
        command_buffers.MEGABYTES: "7",
        "VLLM_METAL_DEBUG": "1",
        "HF_HOME": "/h",
    }
