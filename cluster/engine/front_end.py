"""What Pomarium adds to vLLM's front end, wherever it runs: `pomarium serve`, batches, `vllm serve`, `vllm.LLM`.

    model folder --renderer made---> chat_template.json becomes the tokenizer's template, if it has none
                                     the form of calls is closed (call_form.py)
                 --processor made--> end tokens from all sources (worker/models/endings.py), in the log and in force
    request --rendered, processed--> refused if it names a token that the embedding lacks (request_bounds.py)
    image_url --images/connector.py--> a picture of bounded size, or 400
            --generated--> told, and shown again where another engine began it (resumption.py)

vLLM's hook for platforms, `Platform.validate_request`, is told neither of the model nor of the engine (one process may
have several), so methods of vLLM's two classes are replaced; vLLM 0.29. A request is checked when it is rendered,
because a stream's status has been sent when it is processed, and when it is processed, because a program may bring a
rendered one.
"""

import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase
from vllm.config import ModelConfig, VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.renderers.base import BaseRenderer
from vllm.tokenizers import TokenizerLike
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict
from vllm.v1.engine.input_processor import InputProcessor

from pomarium.cluster.engine import resumption
from pomarium.cluster.engine.images import connector
from pomarium.cluster.engine.request_bounds import beyond, refusal, surplus
from pomarium.worker.errors import CheckpointError
from pomarium.worker.models import endings
from pomarium.worker.models.chat_template import FILE as CHAT_TEMPLATE
from pomarium.worker.models.chat_template import template_of

logger = init_logger("vllm.pomarium.front_end")

_SHOWN = 4
"""Tokens beyond the embedding that the log names."""

_init_renderer = BaseRenderer.__init__
_process_tokens, _process_tokens_async = BaseRenderer._process_tokens, BaseRenderer._process_tokens_async
_init_processor, _validate = InputProcessor.__init__, InputProcessor._validate_model_input


def install() -> None:
    """Have vLLM's front ends of this process behave as above. Calling it again changes nothing."""
    BaseRenderer.__init__ = _with_template
    BaseRenderer._process_tokens = _bounded
    BaseRenderer._process_tokens_async = _bounded_async
    InputProcessor.__init__ = _with_endings
    InputProcessor._validate_model_input = _validated
    resumption.install()
    connector.install()


def _with_template(renderer: BaseRenderer, config: VllmConfig, tokenizer: TokenizerLike | None) -> None:
    # They import vLLM's protocols, which the engine itself has no use for.
    from pomarium.cluster.engine import call_form, form_answers

    call_form.install()
    form_answers.install()
    if isinstance(tokenizer, PreTrainedTokenizerBase) and tokenizer.chat_template is None:
        model = config.model_config
        if content := _file(CHAT_TEMPLATE, str(model.tokenizer), model.tokenizer_revision):
            tokenizer.chat_template = template_of(content)
    _init_renderer(renderer, config, tokenizer)


def _bounded(renderer: BaseRenderer, prompt: Mapping[str, Any], **options: Any) -> Any:
    _check(prompt, renderer.model_config)
    return _process_tokens(renderer, prompt, **options)


async def _bounded_async(renderer: BaseRenderer, prompt: Mapping[str, Any], **options: Any) -> Any:
    _check(prompt, renderer.model_config)
    return await _process_tokens_async(renderer, prompt, **options)


def _validated(processor: InputProcessor, prompt: Mapping[str, Any], prompt_type: Any) -> None:
    if prompt["type"] != "embeds":
        _check(prompt, processor.model_config)
    _validate(processor, prompt, prompt_type)


def _check(prompt: Mapping[str, Any], model: ModelConfig) -> None:
    vocab_size = model.get_vocab_size()
    if (token := beyond(prompt["prompt_token_ids"], vocab_size)) is not None:
        raise VLLMValidationError(refusal(token, vocab_size), parameter="prompt", value=token)


def _with_endings(processor: InputProcessor, *args: Any, **kwargs: Any) -> None:
    _init_processor(processor, *args, **kwargs)
    model, tokenizer = processor.model_config, processor.tokenizer
    found = endings.endings_of(
        _generation_config(model),
        _file(endings.CONFIG, model.model, model.revision),
        _facts(tokenizer),
        model.get_vocab_size(),
    )
    processor.generation_config_fields[endings.KEY] = found.token_ids
    logger.info("%s: %s.", model.model, found.described(lambda token: _name(tokenizer, token)))
    if tokenizer is not None and (unknown := surplus(tokenizer.get_vocab(), model.get_vocab_size())):
        logger.warning(
            "%s: its tokenizer has %d tokens more than the model's %d (%s%s); requests that use them are refused.",
            model.model,
            len(unknown),
            model.get_vocab_size(),
            ", ".join(unknown[:_SHOWN]),
            ", ..." if len(unknown) > _SHOWN else "",
        )


def _generation_config(model: ModelConfig) -> Mapping[str, Any]:
    """As `--generation-config` says: of the model, or of a folder named there; its end tokens count in either case."""
    if model.generation_config in ("auto", "vllm"):
        return _file(endings.GENERATION, model.model, model.revision)
    return _file(endings.GENERATION, model.generation_config, None)


def _file(name: str, model: str, revision: str | None) -> Mapping[str, Any]:
    """A JSON file of a folder or of a hub's id; empty if there is none. Raises CheckpointError if it is no object."""
    try:
        content = get_hf_file_to_dict(name, model, revision)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{model}: its {name} is not valid JSON: {error}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise CheckpointError(f"{model}: its {name} does not hold a JSON object.")
    return content


def _facts(tokenizer: TokenizerLike | None) -> endings.TokenizerFacts | None:
    if tokenizer is None:
        return None
    marks = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return endings.TokenizerFacts(tokenizer.eos_token_id, marks)


def _name(tokenizer: TokenizerLike | None, token: int) -> str:
    return "token" if tokenizer is None else str(tokenizer.convert_ids_to_tokens([token])[0])
