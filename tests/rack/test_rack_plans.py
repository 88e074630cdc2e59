"""What a replica takes of a simulated rack by itself: as many Macs as the model needs, other ones after a loss; and
several models of one rack.yaml, each in its own way.
"""

from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from rack_serving import Rack, answer, served_again, serving, until
from tiny_models import write_checkpoint

pytestmark = [pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(600)]

TEXT = "The capital of France is Paris."
LAYERS = 30


def macs_of(rack: Rack) -> list[str]:
    return [stage["mac"] for stage in rack.stages()]


def test_three_stages_where_each_mac_is_too_small_for_more(tmp_path: Path) -> None:
    """SmolLM2 over three raylets."""
    with serving(tmp_path, tmp_path, ["--simulate", "3", "--memory", "1860MiB"], []) as rack:
        assert answer(rack) == TEXT
        assert sorted(macs_of(rack)) == ["mac-1", "mac-2", "mac-3"]
        stages = rack.stages()
        assert [stages[0]["first"], stages[-1]["end"]] == [0, LAYERS]
        assert all(one["end"] == other["first"] for one, other in pairwise(stages))


def test_one_mac_that_holds_all_and_two_after_its_loss(tmp_path: Path) -> None:
    with serving(tmp_path, tmp_path, ["--simulate", "3", "--memory", "2006MiB,2006MiB,2400MiB"], []) as rack:
        assert answer(rack) == TEXT
        assert macs_of(rack) == ["mac-3"]
        rack.simulated.kill("mac-3")
        until(lambda: rack.health()[0] == 503, 20)
        served_again(rack)
        assert sorted(macs_of(rack)) == ["mac-1", "mac-2"]
        assert answer(rack) == TEXT


def test_two_models_of_a_rack_file(tmp_path: Path) -> None:
    tiny = write_checkpoint("llama", tmp_path / "tiny")
    macs = [
        {
            "name": f"mac-{n}",
            "address": f"127.0.0.{n + 1}",
            "memory": "6GiB",
            "bandwidth": "10GB/s",
            "flops": "100GFLOPS",
        }
        for n in (1, 2, 3)
    ]
    models = [
        {"name": "assistant", "source": "smollm2", "stages": 2},
        {"name": "tiny", "source": str(tiny), "stages": 1},
    ]
    file = tmp_path / "rack.yaml"
    file.write_text(yaml.safe_dump({"macs": macs, "head": {"address": "127.0.0.254"}, "models": models}))
    with serving(tmp_path, tmp_path, ["--simulate", "3"], ["--rack", str(file), "--max-model-len", "256"]) as rack:
        client = rack.client()
        assert sorted(model.id for model in client.models.list()) == ["assistant", "tiny"]
        question = [{"role": "user", "content": "What is the capital of France?"}]
        done = client.chat.completions.create(model="assistant", messages=question, temperature=0, max_tokens=16)
        assert done.choices[0].message.content == TEXT
        tokens = client.completions.create(model="tiny", prompt=[5, 6, 7], max_tokens=4, temperature=0)
        assert tokens.usage is not None
        assert tokens.usage.completion_tokens == 4
        replicas = until(lambda: len(rack.status()["replicas"]) == 2 and rack.status()["replicas"], 60)
        by_model = {replica["model"]: replica["stages"] for replica in replicas}
        assert [len(by_model[name]) for name in ("assistant", "tiny")] == [2, 1]
        assert len({stage["mac"] for stages in by_model.values() for stage in stages}) == 3
