"""A rack of four simulated Macs serves the models of a rack file, each with its own stages, behind one endpoint."""

import json
from collections.abc import Iterator

import pytest
from rack_serving import Rack, answer, serving, until
from serve_process import CONTEXT
from tiny_models import write_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

LAYERS = 30


@pytest.fixture(scope="module")
def rack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    folder, config = tmp_path_factory.mktemp("state"), tmp_path_factory.mktemp("config")
    tiny = write_checkpoint("llama", folder / "tiny-model", max_position_embeddings=CONTEXT)
    models = [
        {"name": "smollm2", "source": "smollm2", "stages": 3},
        {"name": "tiny", "source": str(tiny), "stages": 1},
    ]
    macs = [{"name": f"mac-{n}", "address": f"10.0.0.{n}", "memory": "8GiB", "chip": "M1"} for n in range(1, 5)]
    file = folder / "rack.yaml"
    file.write_text(json.dumps({"macs": macs, "head": {"mac": "mac-1"}, "models": models}))  # JSON is YAML
    with serving(folder, config, ["--simulate", "4"], ["--rack", str(file)]) as rack:
        yield rack


def test_each_model_runs_in_its_stages_and_answers_by_its_name(rack: Rack) -> None:
    assert answer(rack) == "The capital of France is Paris."
    tiny = rack.client().completions.create(model="tiny", prompt="abc", max_tokens=4, extra_body={"ignore_eos": True})
    assert tiny.usage is not None
    assert tiny.usage.completion_tokens == 4
    replicas = until(lambda: len(found := rack.status()["replicas"]) == 2 and found, 30)
    spans = {each["model"]: [(stage["first"], stage["end"]) for stage in each["stages"]] for each in replicas}
    assert len(spans["tiny"]) == 1
    assert (len(spans["smollm2"]), spans["smollm2"][0][0], spans["smollm2"][-1][1]) == (3, 0, LAYERS)
    assert all(end == first for (_, end), (first, _) in zip(spans["smollm2"], spans["smollm2"][1:], strict=False))
    macs = [stage["mac"] for each in replicas for stage in each["stages"]]
    assert len(set(macs)) == 4, "two workers share a Mac"
