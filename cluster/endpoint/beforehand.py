"""What can be known of models before Ray is started: whether they can be there, and whether their context is as long
as is asked for. The whole check (replica/model_check.py) takes seconds more, and runs while Ray starts.
"""

from collections.abc import Mapping, Sequence

from pomarium.cluster.placement import context_length
from pomarium.cluster.provision.kernels import require_cpu_backend
from pomarium.cluster.replica.serve_plan import ModelPlan
from pomarium.worker import settings
from pomarium.worker.errors import PomariumError
from pomarium.worker.models import look_up

EMBEDDED_CONTEXT = 8192
"""Tokens; of the embedded model, which is pinned."""


def check(models: Sequence[ModelPlan], environ: Mapping[str, str]) -> dict[str, str]:
    """Look the models up; ids are asked of their hub, unless they are on this machine. What is wrong with optional
    ones, a sentence by name.

    Raises, for the others:
        CheckpointError: there is certainly no such model, or it cannot be fetched now.
        SettingsError: --max-model-len is more than a model can take.
        UnsupportedError: vLLM's own backend is asked for, and not there.
    """
    values = settings.load(environ)
    if not values.use_mlx:
        require_cpu_backend()
    left_out = {}
    for model in models:
        try:
            _check(model, values.use_modelscope, environ)
        except PomariumError as error:
            if not model.optional:
                raise
            left_out[model.name] = str(error)
    return left_out


def _check(model: ModelPlan, use_modelscope: bool, environ: Mapping[str, str]) -> None:
    config = look_up.look_up(model.source, use_modelscope=use_modelscope)
    tokens = model.engine_args.get("max_model_len")
    if not isinstance(tokens, int):
        return
    if model.source is None or model.source in look_up.EMBEDDED:
        context_length.require(model.name, tokens, EMBEDDED_CONTEXT, environ)
    elif config is not None:
        context_length.require(model.source, tokens, context_length.read(config), environ)
