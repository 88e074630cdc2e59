"""What a model on demand takes of a machine, which models of a folder there are, and who is left out."""

from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import write_checkpoint

from pomarium.cluster.placement.profile import read_profiles
from pomarium.cluster.replica.model_check import Found, Room
from pomarium.cluster.replica.model_folder import models_in
from pomarium.cluster.replica.model_need import KV_ARGUMENT, KV_BYTES, PROCESS_BYTES, need, settled
from pomarium.cluster.replica.serve_plan import ModelPlan, OnDemandPlan, ServePlan
from pomarium.worker.errors import CheckpointError, SettingsError

GIB = 1 << 30
BLOCK_TOKENS = 16


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = write_checkpoint("llama", tmp_path_factory.mktemp("need") / "m")
    return Found(folder, read_profiles(str(folder)))


def test_k_and_v_are_for_one_sequence_at_least_and_for_no_more_than_can_run(found: Found) -> None:
    token = sum(layer.kv_bytes for layer in found.profiles.stored.model.layers)
    plan = ModelPlan("m")
    one = need(replace(plan, engine_args={"max_num_seqs": 1}), found.profiles.stored)
    assert (512 + BLOCK_TOKENS) * token <= one.kv <= 1.2 * (512 + BLOCK_TOKENS) * token
    many = need(plan, found.profiles.stored)
    assert many.kv == (256 * 512 + BLOCK_TOKENS) * token < KV_BYTES
    long = need(replace(plan, engine_args={"max_model_len": 1 << 20}), found.profiles.stored)
    assert long.kv == KV_BYTES
    longer = need(replace(plan, engine_args={"max_model_len": 1 << 24}), found.profiles.stored)
    assert longer.kv > (1 << 24) * token
    assert need(replace(plan, engine_args={KV_ARGUMENT: 12345}), found.profiles.stored).kv == 12345
    assert many.all == many.model + many.kv + PROCESS_BYTES
    assert many.model > found.profiles.stored.stored_bytes


def plan(*names: str, **more: object) -> ServePlan:
    models = tuple(ModelPlan(name, on_demand=True, optional=True) for name in names)
    return ServePlan(models, on_demand=OnDemandPlan(**more))  # type: ignore[arg-type]


def test_a_faulty_model_is_left_out_and_the_others_get_their_memory(found: Found) -> None:
    made, kept, lines = settled(plan("a", "b"), [found, "Its weights are torn."], Room(8 * GIB, False))
    assert lines == ("b is left out: Its weights are torn.",)
    assert [model.name for model in made.models] == ["a"]
    assert kept == (found,)
    assert made.on_demand is not None
    assert made.on_demand.memory == 8 * GIB
    asked = need(ModelPlan("a"), found.profiles.stored)
    assert made.on_demand.sizes == {"a": asked.all}
    assert made.models[0].engine_args[KV_ARGUMENT] == asked.kv


def test_weights_count_as_they_lie_in_memory(found: Found) -> None:
    smaller = replace(found, profiles=replace(found.profiles, stored=found.profiles.dense))
    told = [settled(plan("a"), [smaller], Room(GIB, dense))[0].on_demand for dense in (False, True)]
    assert told[0] == told[1]


def test_what_cannot_be_is_one_sentence(found: Found) -> None:
    with pytest.raises(CheckpointError, match=r"No model is left to serve\. a is left out: torn"):
        settled(plan("a"), ["torn."], Room(GIB, False))
    with pytest.raises(SettingsError, match=r"--pin b: no such model is served; there are a"):
        settled(plan("a", "b", pins=frozenset("b")), [found, "torn."], Room(8 * GIB, False))
    with pytest.raises(SettingsError, match=r"--pin: a, b take .* together, and this machine has 2 GiB"):
        settled(plan("a", "b", pins=frozenset("ab"), memory=2 * GIB), [found, found], Room(64 * GIB, False))


def test_models_of_a_folder_are_named_by_where_they_lie(tmp_path: Path) -> None:
    for folder in ("plain", "org/inner", "org/deeper/inmost", "a/b/c/too-deep", ".hidden"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "config.json").write_text("{}")
    for file in ("one.gguf", "org/two.GGUF", "org/pub/three.gguf", "notes.txt"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "plain")
    found = models_in(str(tmp_path))
    assert list(found) == ["link", "one", "org/deeper/inmost", "org/inner", "org/pub/three", "org/two", "plain"]
    assert found["org/two"] == tmp_path / "org/two.GGUF"


def test_a_folder_without_models_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--models .*/nowhere is no folder"):
        models_in(str(tmp_path / "nowhere"))
    with pytest.raises(SettingsError, match=r"--models names no folder"):
        models_in("")
    with pytest.raises(SettingsError, match=r"has no models: none of what is in it"):
        models_in(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SettingsError, match=r"It is a model itself: `pomarium serve FOLDER` serves it\."):
        models_in(str(tmp_path))
