"""`pomarium serve` up to the point where something would start: each mistake is one line and a non-zero exit."""

import argparse
import json
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_checkpoint

from pomarium.cluster.cli import main as cli
from pomarium.cluster.cli import serve
from pomarium.cluster.endpoint.app import passed_environment
from pomarium.cluster.node.worker_environment import worker_environment
from pomarium.cluster.replica.engine_args import parse
from pomarium.cluster.replica.model_check import Check, Found
from pomarium.cluster.replica.parsers import Parsers
from pomarium.cluster.replica.serve_plan import Limits, ModelPlan, OnDemandPlan, ServePlan
from pomarium.worker.errors import PomariumError, SettingsError
from pomarium.worker.models import embedded
from pomarium.worker.settings import Wire, load

words = st.text("abcdefghij/.", min_size=1, max_size=8)
options = st.text("abcdefghij", min_size=3, max_size=8).map(lambda w: f"--x{w}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "broken"
    folder.mkdir()
    return folder


@given(models=st.lists(words, max_size=3), pairs=st.lists(st.tuples(options, words), max_size=4))
def test_models_and_engine_arguments_are_told_apart(models: list[str], pairs: list[tuple[str, str]]) -> None:
    tokens = [token for pair in pairs for token in pair]
    args = cli.parse(["serve", *models, "--port", "81", *tokens])
    assert (args.port, serve.split_extra(args.extra)) == (81, (models, tokens))


def test_options_may_come_before_the_models() -> None:
    args = cli.parse(["serve", "--replicas", "2", "a/b", "c/d"])
    assert (args.replicas, serve.split_extra(args.extra)) == ("2", (["a/b", "c/d"], []))


def test_no_argument_is_taken_for_another_by_its_beginning() -> None:
    assert cli.parse(["serve", "--max-model", "8"]).extra == ["--max-model", "8"]


@pytest.mark.parametrize("choice", list(Wire))
def test_what_is_wired_travels_to_the_workers_as_a_setting(choice: Wire) -> None:
    environ = {"POMARIUM_WIRE": "off"}
    serve.choose_wire(cli.parse(["serve"]), environ)
    assert environ == {"POMARIUM_WIRE": "off"}
    serve.choose_wire(cli.parse(["serve", "--wire", choice.value]), environ)
    assert load(environ).wire is choice
    assert worker_environment(passed_environment(environ), 0)["POMARIUM_WIRE"] == choice.value


def test_another_word_for_what_is_wired_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(["serve", "--wire", "all"])
    assert "--wire" in capsys.readouterr().err
    with pytest.raises(SettingsError, match=r"POMARIUM_WIRE='all' is not accepted: set it to off or pool\."):
        load({"POMARIUM_WIRE": "all"})


def test_other_commands_take_no_unknown_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.parse(["doctor", "--nonsense"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["chat", "a", "b"], ["models", "list", "--jsn"], ["rack", "status", "x"]])
def test_what_a_command_does_not_know_is_told_with_its_own_usage(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.parse(words)
    command = " ".join(["pomarium", *[word for word in words if word in ("chat", "models", "list", "rack", "status")]])
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.startswith(f"usage: {command} ")
    assert f"{command}: error: unrecognized arguments: {words[-1]}" in told


def plan(tokens: list[str], environ: dict[str, str] | None = None) -> ServePlan:
    args = cli.parse(["serve", "--port", str(free_port()), *tokens])
    return serve.plan_of(args, environ or {})


@pytest.mark.parametrize(
    ("tokens", "environ", "sentence"),
    [
        (["--replicas", "0"], {}, "--replicas 0"),
        (["--max-model-len", "0"], {}, "--max-model-len 0"),
        (["--port", "70000"], {}, "--port 70000 is not a port"),
        (["--ingresses", "0"], {}, "--ingresses 0 is not a number from 1 to "),
        (["--host", "no.such.host.invalid"], {}, "no.such.host.invalid is no address"),
        ([], {"VLLM_METAL_MEMORY_FRACTION": "70%"}, "VLLM_METAL_MEMORY_FRACTION"),
        (["/no/such/model"], {}, "/no/such/model"),
        (["--served-name", "a", "--served-name", "b"], {}, "more than once"),
    ],
)
def test_mistakes_are_found_before_anything_starts(tokens: list[str], environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(PomariumError) as caught:
        plan(tokens, environ)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "environ", "sentence"),
    [
        (["--pin", "smollm2"], {}, "--pin is for models that come and go: give --on-demand"),
        (["--memory", "8GiB"], {}, "--memory is for models that come and go: give --on-demand"),
        (["--on-demand", "--memory", "8"], {}, "--memory: "),
        (["--on-demand", "--memory", "0GiB"], {}, "--memory 0GiB leaves nothing for models"),
        (["--on-demand", "--keep", "soon"], {}, "--keep: "),
        (["--on-demand", "--pin", "x"], {}, "--pin x: no such model; there are smollm2"),
        (["--on-demand", "--replicas", "2"], {}, "leave out --replicas and --stages"),
        (["--on-demand", "--stages", "2", "--share-macs"], {}, "leave out --replicas and --stages"),
        (["--on-demand", "--ingresses", "2"], {}, "leave out --ingresses"),
        (["--on-demand"], {"RAY_ADDRESS": "10.0.0.1:6379"}, "--on-demand is for one machine"),
        (["--on-demand"], {"VLLM_METAL_USE_MLX": "0"}, "leave out VLLM_METAL_USE_MLX=0"),
        (["smollm2", "--models", "/tmp"], {}, "leave out smollm2"),
        (["--models", "/tmp", "--served-name", "a"], {}, "--served-name has no place with --models"),
        (["--models", "/no/such/folder"], {}, "--models /no/such/folder is no folder"),
        (["--keep", "5m"], {}, "--keep is for engines that come and go"),
    ],
)
def test_wrong_uses_of_models_on_demand(tokens: list[str], environ: dict[str, str], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        plan(tokens, environ)
    assert sentence in str(caught.value)


def test_models_on_demand(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    made = plan(["--models", str(tmp_path), "--on-demand", "--pin", "b", "--keep", "1m", "--memory", "4GiB"])
    assert [(m.name, m.source, m.replicas, m.on_demand, m.optional) for m in made.models] == [
        ("a", str(tmp_path / "a"), 0, True, True),
        ("b", str(tmp_path / "b"), 1, True, True),
    ]
    assert made.on_demand == OnDemandPlan(60.0, frozenset("b"), 4 << 30)
    assert made.workers() == 2, "as many as may be there at once"
    listed = plan(["smollm2", str(tmp_path / "a"), "--on-demand"])
    assert [m.optional for m in listed.models] == [False, False]
    everything = plan(["--models", str(tmp_path)])
    assert everything.on_demand is None
    assert [m.replicas for m in everything.models] == [1, 1]
    assert "serves a, b when they are asked for;" in serve.welcome(made)


def test_pages_of_other_origins_are_let_in_by_name() -> None:
    assert plan([], {}).origins == ()
    assert plan(["--allow-origin", "https://a.example", "--allow-origin", "*"], {}).origins == (
        "https://a.example",
        "*",
    )


def test_how_often_and_how_long_answers_go_on() -> None:
    assert plan([], {}).limits == Limits(5, 120.0)
    assert plan(["--failovers", "0", "--failover-wait", "1m30s"], {}).limits == Limits(0, 90.0)
    with pytest.raises(SettingsError, match=r"--failover-wait: .*a duration such as"):
        plan(["--failover-wait", "soon"], {})
    with pytest.raises(SettingsError, match="--failovers -1 is less than none"):
        plan(["--failovers", "-1"], {})


def test_a_rack_has_two_ingresses_unless_told_otherwise() -> None:
    rack = {"RAY_ADDRESS": "10.0.0.1:6379"}
    assert [plan([], environ).ingresses for environ in ({}, rack)] == [1, 2]
    assert [plan(["--ingresses", "3"], environ).ingresses for environ in ({}, rack)] == [3, 3]


def test_a_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=f"Cannot listen on 127.0.0.1:{port}.*--port"):
            serve.check_port("127.0.0.1", port)


def test_a_folder_without_config_is_refused(model_folder: Path) -> None:
    with pytest.raises(PomariumError, match=r"holds no config\.json"):
        plan([str(model_folder)])


@pytest.mark.e2e
def test_truncated_weights_are_refused(model_folder: Path) -> None:
    (model_folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    (model_folder / "model.safetensors").write_bytes((10_000).to_bytes(8, "little") + b'{"a":')
    with pytest.raises(PomariumError, match=r"model\.safetensors"):
        Check([str(model_folder)]).found()


@pytest.mark.e2e
def test_the_embedded_model_is_found_and_sound() -> None:
    (found,) = Check([None]).found()
    assert (found.folder / "config.json").is_file()
    assert found.profiles.dense.model.weight_bytes > found.profiles.stored.model.weight_bytes


@pytest.mark.e2e
def test_quantised_weights_are_refused_for_vllm_s_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_METAL_USE_MLX", "0")
    with pytest.raises(PomariumError, match=r"VLLM_METAL_USE_MLX=0.*the embedded model.*dense checkpoint"):
        Check([None]).found()


@pytest.mark.e2e
def test_a_folder_that_is_a_pattern_is_refused_for_vllm_s_cpu_backend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint("llama", tmp_path / "[1]")
    assert [found.folder for found in Check([str(folder)]).found()] == [folder]
    monkeypatch.setenv("VLLM_METAL_USE_MLX", "0")
    with pytest.raises(PomariumError, match=r"VLLM_METAL_USE_MLX=0.*\[1\].*rename the folder"):
        Check([str(folder)]).found()


def test_an_abandoned_check_is_gone() -> None:
    check = Check([None])
    check.abandon()
    with pytest.raises(RuntimeError, match="code -9"):
        check.found()


def test_a_mistake_is_one_line_and_exit_code_1(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert cli.main(["serve", "--port", "0"]) == 1
    out, err = capfd.readouterr()
    assert err == "pomarium: --port 0 is not a port: give one from 1 to 65535.\n"
    assert out == ""


def test_the_embedded_models_name_is_its_own() -> None:
    assert embedded.NAME == serve.EMBEDDED_NAME
    assert [(m.name, m.source) for m in plan([]).models] == [(embedded.NAME, None)]


def test_keys_come_from_the_arguments_and_the_environment() -> None:
    args = argparse.Namespace(api_key=["k1"], api_key_file=None)
    assert serve.api_keys(args, {serve.KEY_VARIABLE: "k2"}) == {"k1", "k2"}
    assert serve.api_keys(argparse.Namespace(api_key=[], api_key_file=None), {}) == frozenset()


def test_keys_come_from_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    args = argparse.Namespace(api_key=["k1"], api_key_file=file)
    file.write_text("k2\n\n  k3 \n")
    file.chmod(0o644)
    with pytest.raises(SettingsError, match="can be opened by others: run `chmod 600"):
        serve.api_keys(args, {})
    file.chmod(0o600)
    assert serve.api_keys(args, {}) == {"k1", "k2", "k3"}
    file.write_text("\n")
    with pytest.raises(SettingsError, match="is empty"):
        serve.api_keys(args, {})
    file.unlink()
    with pytest.raises(SettingsError, match="cannot be read"):
        serve.api_keys(args, {})


def test_welcome_shows_a_request_that_fits() -> None:
    text = serve.welcome(ServePlan((ModelPlan("org/m"),), "0.0.0.0", 81, frozenset({"k"})))
    assert "curl http://127.0.0.1:81/v1/chat/completions" in text
    body = json.loads(text.rsplit("-d '", 1)[1].removesuffix("'"))
    readme = (Path(__file__).parents[3] / "README.md").read_text()
    asked = json.loads(re.findall(r"'(\{.*\})'", readme)[0])
    assert body == asked | {"model": "org/m"}
    assert 0 < body["max_tokens"] <= 200
    assert "$KEY" in text
    assert '"k"' not in text


def test_welcome_says_what_reads_the_answers_of_each_model() -> None:
    found = [Found(Path("/a"), None, Parsers("hermes", "qwen3")), Found(Path("/b"), None)]
    plans = (ModelPlan("a"), ModelPlan("b", engine_args={"reasoning_parser": "glm45"}))
    change = "--tool-call-parser and --reasoning-parser change it"
    assert serve.welcome(ServePlan(plans), found).splitlines()[:2] == [
        f"a: tools: hermes, reasoning: qwen3; {change}",
        f"b: tools: none, reasoning: glm45; {change}",
    ]
    assert serve.welcome(ServePlan(plans[:1]), found[:1]).startswith("tools: hermes, reasoning: qwen3; ")


def test_only_given_engine_arguments_are_passed_on() -> None:
    fields = parse(["--max-num-seqs", "8", "--no-enable-prefix-caching", "--tool-call-parser", "hermes"])
    assert fields == {"max_num_seqs": 8, "enable_prefix_caching": False, "tool_call_parser": "hermes"}


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (["--max-num-sequences", "8"], "--max-num-sequences"),
        (["--max-num-seqs", "many"], "many"),
        (["--model", "x"], "first argument"),
        (["--distributed-executor-backend", "mp"], "places the workers"),
    ],
)
def test_wrong_engine_arguments_are_one_sentence(tokens: list[str], sentence: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(tokens)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
