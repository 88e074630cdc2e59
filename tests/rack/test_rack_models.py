"""A rack of four simulated Macs serves the models of a rack file, each with its own stages, behind one endpoint.

One of the models has a name that neither Serve nor Ray's metrics take, and lies in a folder with such a name.
"""

import json
import re
from collections.abc import Iterator

import httpx
import pytest
from openai import NotFoundError
from rack_serving import Rack, SharedRack, answer, served, until
from serve_process import CONTEXT
from tiny_models import write_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

LAYERS = 30
TINY = "pomme d'Adèle \U0001f34e #1/" + "é" * 300


@pytest.fixture(scope="module")
def rack(four_macs: SharedRack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rack]:
    folder = tmp_path_factory.mktemp("models")
    tiny = write_checkpoint("llama", folder / "modèle \U0001f34e #1", max_position_embeddings=CONTEXT)
    models = [
        {"name": "smollm2", "source": "smollm2", "stages": 3},
        {"name": TINY, "source": str(tiny), "stages": 1},
    ]
    macs = [{"name": f"mac-{n}", "address": f"10.0.0.{n}", "memory": "8GiB", "chip": "M1"} for n in range(1, 5)]
    file = folder / "rack.yaml"
    described = {"macs": macs, "head": {"mac": "mac-1"}, "models": models}
    file.write_text(json.dumps(described, ensure_ascii=False))  # JSON is YAML
    four_macs.ensure()
    with served(four_macs.environ, four_macs.folder, ["--rack", str(file)]) as rack:
        yield rack


def test_each_model_runs_in_its_stages_and_answers_by_its_name(rack: Rack) -> None:
    assert answer(rack) == "The capital of France is Paris."
    tiny = rack.client().completions.create(model=TINY, prompt="abc", max_tokens=4, extra_body={"ignore_eos": True})
    assert tiny.usage is not None
    assert tiny.usage.completion_tokens == 4
    replicas = until(lambda: len(found := rack.status()["replicas"]) == 2 and found, 30)
    spans = {each["model"]: [(stage["first"], stage["end"]) for stage in each["stages"]] for each in replicas}
    assert len(spans[TINY]) == 1
    assert (len(spans["smollm2"]), spans["smollm2"][0][0], spans["smollm2"][-1][1]) == (3, 0, LAYERS)
    assert all(end == first for (_, end), (first, _) in zip(spans["smollm2"], spans["smollm2"][1:], strict=False))
    macs = [stage["mac"] for each in replicas for stage in each["stages"]]
    assert len(set(macs)) == 4, "two workers share a Mac"


def test_any_name_is_the_model_s_own_to_clients_and_encoded_in_metrics(rack: Rack) -> None:
    assert {model.id for model in rack.client().models.list()} == {"smollm2", TINY}
    assert rack.client().models.retrieve(TINY).id == TINY
    with pytest.raises(NotFoundError, match="Adèle"):
        rack.client().completions.create(model="Adèle", prompt="a")
    assert httpx.get(f"{rack.server.url}/modèle", timeout=20).status_code == 404
    assert json.loads(rack.health()[1])["models"][TINY] == "ok"
    encoded = re.compile("d'Ad%C3%A8le|d-Ad-le")
    for series in ("ray_vllm_generation_tokens_total", "ray_pomarium_sampled_tokens_total", "ray_serve_deployment"):
        rack.until(lambda series=series: any(encoded.search(line) for line in page(rack, series)), 60)
    assert "UnicodeEncodeError" not in rack.server.log()


def page(rack: Rack, series: str) -> list[str]:
    rack.client().completions.create(model=TINY, prompt="abc", max_tokens=4, extra_body={"ignore_eos": True})
    text = httpx.get(f"{rack.server.url}/metrics", timeout=30).text
    return [line for line in text.splitlines() if line.startswith(series)]
