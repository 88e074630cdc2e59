"""What vLLM leaves open is decided once per engine, and both servers have the guard; what the user set stays."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from pomarium.cluster.engine.intake import defaults, guard
from pomarium.cluster.engine.intake.request_check import check
from pomarium.cluster.engine.platform import PomariumPlatform
from pomarium.cluster.replica.llm_server import engine_kwargs
from pomarium.cluster.replica.serve_plan import ModelPlan


def config(backend: str = "auto", model_type: str = "llama", tokenizer_mode: str = "auto") -> Any:
    return SimpleNamespace(
        structured_outputs_config=SimpleNamespace(backend=backend),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type), tokenizer_mode=tokenizer_mode),
    )


@pytest.mark.parametrize(
    ("given", "backend", "strict"),
    [
        (config(), "guidance", "0"),
        (config(backend="xgrammar"), "xgrammar", None),
        (config(backend="outlines"), "outlines", "0"),
        (config(model_type="gpt_oss"), "xgrammar", None),
        (config(tokenizer_mode="mistral"), "xgrammar", None),
    ],
)
def test_the_compiler_of_an_engine(given: Any, backend: str, strict: str | None) -> None:
    environ: dict[str, str] = {}
    defaults.complete(given, environ)
    assert given.structured_outputs_config.backend == backend
    assert environ.get("VLLM_ENFORCE_STRICT_TOOL_CALLING") == strict
    assert environ["VLLM_MAX_N_SEQUENCES"] == "128"


def test_what_the_user_set_stays() -> None:
    given = {"VLLM_MAX_N_SEQUENCES": "7", "VLLM_ENFORCE_STRICT_TOOL_CALLING": "1"}
    environ = dict(given)
    defaults.complete(config(), environ)
    assert environ == given


def test_vllms_own_server_has_the_guard() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    PomariumPlatform.pre_register_and_update(parser)
    assert parser.parse_args([]).middleware == [guard.PATH]
    assert parser.parse_args(["--middleware", "a.b"]).middleware == [guard.PATH, "a.b"]


def test_our_server_has_the_guard() -> None:
    assert engine_kwargs(ModelPlan("m"), {})["middleware"] == [guard.PATH]
    assert engine_kwargs(ModelPlan("m"), {"VLLM_METAL_USE_MLX": "0"})["middleware"] == [guard.PATH]


@pytest.mark.parametrize(
    ("form", "backend", "fits"),
    [
        ({"choice": ["a"]}, "guidance", True),
        ({"json_object": True}, "guidance", True),
        ({"json": {"$ref": "#"}}, "guidance", False),
        ({"json": {"$ref": "#"}}, "xgrammar", True),  # xgrammar's own check has looked at it
        ({"json": {"type": "array", "minItems": 10**8}}, "xgrammar", False),
    ],
)
def test_requests_that_do_not_come_over_http_are_asked_the_same(form: Any, backend: str, fits: bool) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**form))
    assert params.structured_outputs is not None
    params.structured_outputs._backend = backend
    if fits:
        check(params)
    else:
        with pytest.raises(VLLMValidationError, match="structured_outputs"):
            check(params)
