"""The environment variables: what is accepted, what is refused and how, and that vLLM reads the same."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pomarium.worker.errors import SettingsError
from pomarium.worker.settings import (
    VARIABLES,
    DeviceKind,
    MultimodalMode,
    Settings,
    load,
    normalise,
    parse_all,
    unknown,
    wants_mlx,
)

FRACTION = "VLLM_METAL_MEMORY_FRACTION"
PAGED = "VLLM_METAL_USE_PAGED_ATTENTION"
BOOLEANS = {
    "VLLM_METAL_USE_MLX": "use_mlx",
    PAGED: "paged_attention",
    "VLLM_METAL_DEBUG": "debug",
    "VLLM_USE_MODELSCOPE": "use_modelscope",
    "VLLM_METAL_GDN_LAZY_KERNELS": "gdn_lazy_kernels",
    "VLLM_METAL_MLA_KERNEL": "mla_kernel",
}


def vllm_envs() -> ModuleType:
    """vLLM's own module of variables, without the seconds that importing all of vLLM takes."""
    package = importlib.util.find_spec("vllm")
    assert package is not None
    assert package.submodule_search_locations is not None
    spec = importlib.util.spec_from_file_location("vllm_envs", Path(package.submodule_search_locations[0]) / "envs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VLLM_ENVS = vllm_envs()


def any_case(word: str) -> st.SearchStrategy[str]:
    return st.tuples(*(st.sampled_from([letter.lower(), letter.upper()]) for letter in word)).map("".join)


def test_an_empty_environment_means_the_defaults_of_the_issue() -> None:
    assert load({}) == Settings(
        memory_fraction=None,
        use_mlx=True,
        device=None,
        paged_attention=True,
        debug=False,
        multimodal_mode=MultimodalMode.AUTO,
        use_modelscope=False,
        modelscope_cache=None,
        gdn_lazy_kernels=True,
        mla_kernel=False,
        step_seconds=1.0,
        gap_seconds=0.1,
        visible_devices=None,
    )
    assert load({}).resolved_fraction == 0.9


def test_setting_each_variable_to_its_documented_default_changes_nothing() -> None:
    spelled_out = {
        variable.name: variable.default
        for variable in VARIABLES
        if variable.default not in ("none", "set by the executor")
    }
    settings = load(spelled_out)
    assert settings.device is DeviceKind.GPU, "asked for, which is more than a default"
    assert load({**spelled_out, "VLLM_MLX_DEVICE": "cpu"}).device is DeviceKind.CPU
    assert load({name: value for name, value in spelled_out.items() if name != "VLLM_MLX_DEVICE"}) == load({})


@pytest.mark.parametrize(("name", "field"), BOOLEANS.items())
@given(data=st.data())
def test_booleans_take_every_documented_form_in_any_case(name: str, field: str, data: st.DataObject) -> None:
    word = data.draw(st.sampled_from(["1", "true", "yes", "on", "0", "false", "no", "off"]))
    text = (
        data.draw(st.sampled_from(["", " ", "\t"])) + data.draw(any_case(word)) + data.draw(st.sampled_from(["", "\n"]))
    )
    assert getattr(load({name: text}), field) is (word in ("1", "true", "yes", "on"))


@pytest.mark.parametrize("name", BOOLEANS)
@pytest.mark.parametrize("text", ["", " ", "2", "-1", "00", "01", "t", "y", "enable", '"1"', "'true'", "1.0", "none"])
def test_anything_else_is_refused_with_name_value_and_what_is_accepted(name: str, text: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        load({name: text})
    message = str(refusal.value)
    assert message.startswith(f"{name}={text!r} is not accepted")
    assert "1/0, true/false, yes/no or on/off" in message
    assert message.count(". ") == 0
    assert message.endswith(".")


def test_quotes_in_the_value_are_named() -> None:
    with pytest.raises(SettingsError, match="without quotes"):
        load({"VLLM_MLX_DEVICE": '"cpu"'})


@given(st.floats(min_value=0.0, max_value=1.0, exclude_min=True))
def test_fractions_above_zero_and_at_most_one_are_taken(number: float) -> None:
    assert load({FRACTION: repr(number)}).memory_fraction == number


@given(st.floats().filter(lambda number: not 0.0 < number <= 1.0))
def test_other_numbers_are_refused(number: float) -> None:
    with pytest.raises(SettingsError, match="auto or a number above 0 and at most 1"):
        load({FRACTION: repr(number)})


@pytest.mark.parametrize(
    "text",
    [
        "-1",
        "nan",
        "inf",
        "-inf",
        "0",
        "0.0",
        "1.01",
        "70%",
        "",
        " ",
        "1e-999",
        "0,5",
        "0_1",
        "0x1p-1",
        "١",
        ".",
        "half",
    ],
)
def test_what_is_no_fraction_is_refused(text: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        load({FRACTION: text})
    assert str(refusal.value).startswith(f"{FRACTION}={text!r} ")


@given(st.text(max_size=8))
def test_arbitrary_text_either_gives_a_fraction_in_range_or_is_refused(text: str) -> None:
    values, errors = parse_all({FRACTION: text})
    if "memory_fraction" in errors:
        assert errors["memory_fraction"].startswith(f"{FRACTION}={text!r} ")
        assert "memory_fraction" not in values
    else:
        fraction = values["memory_fraction"]
        assert fraction is None or 0.0 < fraction <= 1.0


@pytest.mark.parametrize("text", ["auto", "AUTO", " Auto "])
def test_auto_goes_with_either_cache(text: str) -> None:
    assert load({FRACTION: text, PAGED: "1"}).memory_fraction is None
    assert load({FRACTION: text, PAGED: "0"}).memory_fraction is None


def test_a_number_without_paging_is_refused_and_names_both_variables() -> None:
    with pytest.raises(SettingsError) as refusal:
        load({FRACTION: "0.5", PAGED: "off"})
    assert FRACTION in str(refusal.value)
    assert PAGED in str(refusal.value)


@pytest.mark.parametrize(("text", "kind"), [("gpu", DeviceKind.GPU), ("CPU", DeviceKind.CPU)])
def test_device(text: str, kind: DeviceKind) -> None:
    assert load({"VLLM_MLX_DEVICE": text}).device is kind


@pytest.mark.parametrize("text", ["", "metal", "gpu0", "0"])
def test_other_devices_are_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"VLLM_MLX_DEVICE=.* set it to gpu or cpu\."):
        load({"VLLM_MLX_DEVICE": text})


@pytest.mark.parametrize("mode", list(MultimodalMode))
def test_multimodal_modes(mode: MultimodalMode) -> None:
    assert load({"VLLM_METAL_MULTIMODAL_MODE": mode.value}).multimodal_mode is mode


def test_another_multimodal_mode_is_refused() -> None:
    with pytest.raises(SettingsError, match="auto, text-only-compat or multimodal-native"):
        load({"VLLM_METAL_MULTIMODAL_MODE": "native"})


@pytest.mark.parametrize("text", ["", "models", "./models", "~/models", "$HOME/models"])
def test_a_relative_modelscope_cache_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="absolute path"):
        load({"VLLM_METAL_MODELSCOPE_CACHE": text})


def test_an_absolute_modelscope_cache_is_taken(tmp_path: Path) -> None:
    assert load({"VLLM_METAL_MODELSCOPE_CACHE": f" {tmp_path} "}).modelscope_cache == tmp_path


@pytest.mark.parametrize("text", ["", "0", "gpu:0"])
def test_a_users_visible_devices_are_never_an_error(text: str) -> None:
    assert load({"VLLM_METAL_VISIBLE_DEVICES": text}).visible_devices == text


@given(st.sets(st.sampled_from([v.name for v in VARIABLES if v.field != "visible_devices"]), min_size=1))
def test_every_invalid_variable_is_reported_once_in_one_message(names: set[str]) -> None:
    with pytest.raises(SettingsError) as refusal:
        load(dict.fromkeys(names, "no such value"))
    message = str(refusal.value)
    assert all(message.count(f"{name}='no such value' is not accepted") == 1 for name in names)
    assert message.count("is not accepted") == len(names)
    assert "\n" not in message


@given(st.text())
def test_wants_mlx_never_raises_and_leaves_the_refusal_to_load(text: str) -> None:
    environ = {"VLLM_METAL_USE_MLX": text}
    try:
        wanted = load(environ).use_mlx
    except SettingsError:
        wanted = True
    assert wants_mlx(environ) is wanted


def test_wants_mlx_reads_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_METAL_USE_MLX", raising=False)
    assert wants_mlx()
    monkeypatch.setenv("VLLM_METAL_USE_MLX", "Off")
    assert not wants_mlx()


@pytest.mark.parametrize("text", ["1", "TRUE", "yes", " on ", "0", "false", "No", "OFF", None])
def test_vllm_and_we_agree_on_the_registry(text: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if text is None:
        monkeypatch.delenv("VLLM_USE_MODELSCOPE", raising=False)
    else:
        monkeypatch.setenv("VLLM_USE_MODELSCOPE", text)
    normalise()
    assert VLLM_ENVS.environment_variables["VLLM_USE_MODELSCOPE"]() is load(os.environ).use_modelscope


def test_normalise_leaves_an_invalid_registry_for_load_to_refuse() -> None:
    environ = {"VLLM_USE_MODELSCOPE": "maybe"}
    normalise(environ)
    assert environ == {"VLLM_USE_MODELSCOPE": "maybe"}


def test_a_misspelt_variable_is_pointed_out() -> None:
    (sentence,) = unknown({"VLLM_METAL_MEMORY_FRACTON": "1", "VLLM_METAL_DEBUG": "1", "VLLM_PORT": "1"})
    assert sentence.startswith("VLLM_METAL_MEMORY_FRACTON ")
    assert sentence.endswith(f"did you mean {FRACTION}?")


def test_the_module_imports_nothing_heavy() -> None:
    code = "import sys, pomarium.worker.settings; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"mlx", "mlx.core", "numpy", "vllm", "ray", "torch"} & set(modules)


def test_every_field_of_settings_has_one_variable() -> None:
    assert sorted(variable.field for variable in VARIABLES) == sorted(Settings.__dataclass_fields__)
    assert len({variable.name for variable in VARIABLES}) == len(VARIABLES)


@pytest.mark.parametrize(("text", "seconds"), [("0", 0.0), ("0.25", 0.25), (" 3 ", 3.0), ("1e2", 100.0)])
def test_seconds_of_a_step(text: str, seconds: float) -> None:
    assert load({"POMARIUM_STEP_SECONDS": text}).step_seconds == seconds
    assert load({"POMARIUM_GAP_SECONDS": text}).gap_seconds == seconds


@pytest.mark.parametrize("text", ["", "-1", "1 s", "nan", "inf", "1e400", "auto", "'1'"])
def test_what_is_no_number_of_seconds_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match=r"POMARIUM_STEP_SECONDS=.* is not accepted: set it to a number of seconds"):
        load({"POMARIUM_STEP_SECONDS": text})
