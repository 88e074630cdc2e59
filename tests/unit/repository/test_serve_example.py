"""Serve takes `deploy/serve.example.yaml`, and each argument of such a file reaches the plan or is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from pomarium.cluster.endpoint import builder
from pomarium.cluster.endpoint.builder import EndpointArgs
from pomarium.cluster.replica import serve_plan
from pomarium.cluster.replica.serve_plan import Limits, ModelPlan, Scaling, ServePlan
from pomarium.worker.errors import SettingsError

DEPLOY = Path(__file__).parents[3] / "deploy"


def endpoint_args(**changes: Any) -> EndpointArgs:
    (application,) = yaml.safe_load((DEPLOY / "serve.example.yaml").read_text())["applications"]
    return builder.parse(application["args"] | changes)


def test_serve_s_example_is_the_endpoint_of_the_embedded_model() -> None:
    plan = builder.plan_of(endpoint_args(), {})
    assert plan == ServePlan((ModelPlan("smollm2", "smollm2", stages=None),), ingresses=serve_plan.RACK_INGRESSES)
    document = yaml.safe_load((DEPLOY / "serve.example.yaml").read_text())
    assert ServeDeploySchema.model_validate(document).proxy_location == "Disabled", "the endpoint listens by itself"
    assert document["applications"][0]["name"] == serve_plan.APP_NAME


def test_every_argument_of_the_file_reaches_the_plan(tmp_path: Path) -> None:
    model = {"source": "/models/a.gguf", "stages": 2, "replicas": 3, "share_macs": True, "max_model_len": 512,
             "streams": 4, "engine_args": ["--max-num-seqs", 8]}  # fmt: skip
    rack = DEPLOY / "rack.example.yaml"
    args = endpoint_args(
        models=[model], api_key_variable="K", host="0.0.0.0", port=81, rack=str(rack), ingresses=3, origins=["*"],
        failovers=1, failover_wait="2m"
    )  # fmt: skip
    plan = builder.plan_of(args, {"K": "sk"})
    (found,) = plan.models
    assert (plan.host, plan.port, plan.api_keys, plan.ingresses) == ("0.0.0.0", 81, frozenset({"sk"}), 3)
    assert (plan.origins, plan.limits) == (("*",), Limits(1, 120.0))
    assert (found.name, found.source, found.stages, found.replicas) == ("a", "/models/a.gguf", 2, 3)
    assert (found.share_macs, found.streams, found.engine_args) == (True, 4, {"max_num_seqs": 8, "max_model_len": 512})
    assert found.network is not None
    assert found.scaling is None


def test_keys_come_from_a_file_and_no_secret_from_the_runtime_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.touch(0o600)
    file.write_text("sk-1\nsk-2\n")
    args = endpoint_args(models=[{"source": "a"}], api_key_file=str(file), api_key_variable="K")
    assert builder.plan_of(args, {"K": "sk"}).api_keys == {"sk", "sk-1", "sk-2"}
    builder.refuse_secrets({"HF_HOME": "/h"})
    with pytest.raises(SettingsError, match=r"runtime_env.env_vars: HF_TOKEN would stand in Ray's logs") as refusal:
        builder.refuse_secrets({"HF_HOME": "/h", "HF_TOKEN": "hf_secret"})
    assert "hf_secret" not in str(refusal.value)


def test_replicas_may_follow_the_load() -> None:
    args = endpoint_args(models=[{"source": "a", "replicas": {"min": 0, "max": 2, "keep": "5m", "load": 4}}])
    (found,) = builder.plan_of(args, {}).models
    assert (found.replicas, found.scaling) == (0, Scaling(0, 2, load=4.0, keep_s=300.0))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"models": []}, "args.models: [] is refused"),
        ({"modles": []}, "args.modles: this argument is unknown."),
        ({"models": [{"name": "a"}]}, "args.models[1].source: this argument is missing."),
        ({"models": [{"source": "a", "stages": "all"}]}, "args.models[1].stages: 'all' is neither `auto` nor a number"),
        ({"models": [{"source": "a", "stages": 0}]}, "args.models[1].stages: 0 is refused"),
        ({"models": [{"source": "a", "replicas": 0}]}, "args.models[1].replicas.max: 0 is refused"),
        ({"models": [{"source": "a", "replicas": {"min": 3, "max": 2}}]}, "the replicas of 'a' have a `min`"),
        ({"models": [{"source": "a"}, {"source": "x/a", "name": "a"}]}, "two models are called 'a'"),
        ({"models": [{"source": "a", "engine_args": ["--no-such"]}]}, "--no-such"),
        ({"models": [{"source": "a", "engine_args": ["--worker-cls", "x"]}]}, "Pomarium brings the worker"),
        ({"port": 0}, "args.port: 0 is refused"),
        ({"ingresses": 0}, "args.ingresses: 0 is refused"),
        ({"api_key_variable": "K"}, "args.api_key_variable: K is not set"),
        ({"api_key_file": "/no/keys"}, "The API key file /no/keys cannot be read"),
        ({"rack": "/no/rack.yaml"}, "The rack file /no/rack.yaml cannot be read"),
    ],
)
def test_a_faulty_argument_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        builder.plan_of(endpoint_args(**changes), {})
    assert sentence in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("key", sorted(builder.ON_DEMAND))
def test_models_on_demand_are_refused_by_their_key_with_what_a_rack_has_instead(key: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        endpoint_args(**{key: True})
    assert str(refusal.value).startswith(f"args.{key}: models are loaded on demand on one machine, by `pomarium serve")
    assert "`replicas: {min: 0, max: 1, keep: 10m}`" in str(refusal.value)
    entry = {"source": "a", "replicas": {"min": 0, "max": 1, "keep": "10m"}}
    (model,) = builder.plan_of(endpoint_args(models=[entry]), {}).models
    assert model.scaling == Scaling(0, 1, keep_s=600.0)
