"""Names of models in Serve's deployments and in metrics' tags: ASCII, short, one for each model, whatever they are."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pomarium.cluster.node.ray_names import check, deployment_name, label
from pomarium.cluster.replica.serve_plan import ModelPlan, ServePlan
from pomarium.worker.errors import SettingsError

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=400)
near = st.text("ab/-.#~ é", min_size=1, max_size=5)


@given(names)
@example("modèle")
@example("pomme d'Adèle \U0001f34e #1/x")
@example("m" * 300)
def test_what_ray_is_given_is_short_ascii(name: str) -> None:
    assert re.fullmatch(r"engine:[A-Za-z0-9._~-]{1,120}", deployment_name(name), re.ASCII)
    assert label(name).isascii()
    assert label(name).isprintable()


@given(st.tuples(near, near) | st.tuples(names, names))
@example(("a/b", "a--b"))
@example(("a-/b", "a/-b"))
@example(("a#b", "a-b"))
def test_two_models_are_two_deployments(pair: tuple[str, str]) -> None:
    first, second = pair
    assert (deployment_name(first) == deployment_name(second)) == (first == second)


@pytest.mark.parametrize(
    ("name", "expected"), [("org/Model-1.5", "engine:org--Model-1.5"), ("smollm2", "engine:smollm2")]
)
def test_plain_names_can_be_foretold(name: str, expected: str) -> None:
    """They stand in serve.yaml under `deployments`."""
    assert deployment_name(name) == expected
    assert label(name) == name


def test_a_label_can_be_read_back() -> None:
    assert label("modèle 100%") == "mod%C3%A8le 100%25"


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a\x00", "a\x1b[2J", "a\udce8b"])
def test_what_no_request_could_name_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="--served-name") as caught:
        ServePlan((ModelPlan(name),))
    assert str(caught.value).isascii()


@pytest.mark.parametrize("name", ["modèle", "a b", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "'\"#/%"])
def test_names_of_any_alphabet_are_not(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", ["modèle", "m\u200bx"])
def test_ray_takes_a_label(name: str) -> None:
    """Ray's own encoder (ray._raylet.Metric), which raises for the name itself."""
    from ray._raylet import Gauge

    gauge = Gauge("pomarium_test_names", "", ("model_name",))
    with pytest.raises(UnicodeEncodeError):
        gauge.record(1.0, {"model_name": name})
    gauge.record(1.0, {"model_name": label(name)})
