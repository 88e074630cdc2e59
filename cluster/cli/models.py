"""`pomarium models list | pull | remove | show`: the models on this machine, and what is to be said of each.

caches --worker.models.stored--> StoredModel ... --replica.description--> table, JSON, or one model's facts
ORG/NAME --replica.download--> Hugging Face's cache
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pomarium.cluster.cli.chat import URL
from pomarium.cluster.cli.serve_options import KEY_VARIABLE
from pomarium.cluster.machine.units import format_size
from pomarium.worker import settings
from pomarium.worker.errors import CheckpointError, PomariumError, SettingsError
from pomarium.worker.models import look_up

if TYPE_CHECKING:
    from pomarium.cluster.cli.served_states import ServedModel
    from pomarium.cluster.replica.description import Description
    from pomarium.worker.models.stored import StoredModel


class RemovalError(PomariumError):
    """A model cannot be removed; says why."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `models` to the command line."""
    parser = subparsers.add_parser(
        "models",
        help="list, fetch, remove and describe the models on this machine",
        description="The models in Hugging Face's cache, in ModelScope's and among converted GGUF files.",
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    one = actions.add_parser(
        "list",
        help="print each model, its size, kind and context, and whether it runs here",
        description="Prints each model: its size on the disk, kind and context, and what of this machine's memory it "
        "would leave for K and V if nothing else ran.",
    )
    one.add_argument("--json", action="store_true", help="print a JSON array for programs")
    _add_endpoint(one)
    one.set_defaults(run=list_models)
    one = actions.add_parser(
        "pull",
        help="fetch a model of Hugging Face, or the files that an interrupted fetch left out",
        description="Fetches a model into Hugging Face's cache (HF_HOME), if its disk has room; with "
        "VLLM_USE_MODELSCOPE=1 into ModelScope's.",
    )
    one.add_argument("model", metavar="ORG/NAME")
    one.set_defaults(run=pull)
    one = actions.add_parser(
        "remove", help="delete a model from its cache", description="Deletes a model from its cache."
    )
    one.add_argument("model", metavar="MODEL", help="its name, as `pomarium models list` prints it")
    one.add_argument("--yes", action="store_true", help="do not ask")
    one.set_defaults(run=remove)
    one = actions.add_parser(
        "show",
        help="print what is known of one model",
        description="Prints size, kind and context, whether the model runs here, how it samples and where its answers "
        "end, and which parsers read them.",
    )
    one.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="a folder, a GGUF file, or an id that is on this machine; without it the embedded SmolLM2-135M-Instruct",
    )
    one.add_argument("--json", action="store_true", help="print a JSON object for programs")
    _add_endpoint(one)
    one.set_defaults(run=show)


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        nargs="?",
        const=URL,
        help="print also the state at a running endpoint: whether it is loaded there, and why not (without a value: "
        "%(const)s)",
    )
    parser.add_argument("--api-key", metavar="KEY", help=f"a key that it wants (default: {KEY_VARIABLE})")


def _served(args: argparse.Namespace) -> "tuple[ServedModel, ...]":
    """The models at --url; none without it. Raises ChatError, SettingsError."""
    if args.url is None:
        if args.api_key is not None:
            raise SettingsError("--api-key is for an endpoint: give --url with it.")
        return ()
    from pomarium.cluster.cli.served_states import states

    return states(args.url, args.api_key or os.environ.get(KEY_VARIABLE))


def list_models(args: argparse.Namespace) -> int:
    """Print the models: 0. Raises ChatError, SettingsError."""
    from pomarium.cluster.cli.served_states import of
    from pomarium.cluster.replica import description

    served = _served(args)
    found, room = _stored(), description.room_here(os.environ)
    told = [_told(model, description.described(model.folder, room) if model.whole else None) for model in found]
    if args.url is not None:
        there = [of(served, model.name, model.folder) for model in found]
        told = [one | {"served": None if s is None else asdict(s)} for one, s in zip(told, there, strict=True)]
        elsewhere = [model for model in served if model not in there]
    if args.json:
        print(json.dumps(told, indent=2))
    elif told:
        print("\n".join(table(told)))
    else:
        print("no models: `pomarium models pull ORG/NAME` fetches one")
    if args.url is not None and not args.json and elsewhere:
        print(f"\nin no cache, at {args.url}:")
        print("\n".join(f"{model.root}  {model}" for model in elsewhere))
    return 0


def pull(args: argparse.Namespace) -> int:
    """Fetch a model: 0. Raises CheckpointError."""
    if look_up.local(args.model) is not None or args.model in look_up.EMBEDDED:
        raise CheckpointError(f"{args.model} is on this machine: give the id of a model of Hugging Face or ModelScope.")
    values = settings.load(os.environ)
    if values.use_modelscope:
        from pomarium.worker.models.resolve import resolve

        folder = resolve(args.model, use_modelscope=True, modelscope_cache=values.modelscope_cache)
    else:
        from pomarium.cluster.replica import download

        folder = download.fetch(args.model, sys.stderr)
    print(f"{args.model} is in {folder}")
    return 0


def remove(args: argparse.Namespace) -> int:
    """Delete a model: 0, or 1 if the user would not. Raises CheckpointError, RemovalError, SettingsError."""
    from pomarium.worker.models import stored

    named = [model for model in _stored() if model.name == args.model]
    if not named:
        raise CheckpointError(
            f"No cache has a model {args.model!r}: `pomarium models list` prints those that there are."
        )
    for model in named:
        what = f"{model.name}, {format_size(model.size)} in {model.root}"
        if not args.yes and not _confirmed(what):
            return 1
        try:
            stored.remove(model)
        except OSError as error:
            raise RemovalError(f"{model.root} cannot be removed: {error.strerror}.") from error
        print(f"removed {what}")
    return 0


def show(args: argparse.Namespace) -> int:
    """Print one model's facts: 0. Raises ChatError, CheckpointError, SettingsError, UnsupportedError."""
    from pomarium.cluster.cli.served_states import of
    from pomarium.cluster.replica import description

    served = _served(args)
    name = args.model or look_up.EMBEDDED[0]
    folder = _folder_of(name)
    found = description.described(folder, description.room_here(os.environ))
    try:
        talk = description.conversation(folder, found.family or "")
    except CheckpointError as error:
        raise CheckpointError(found.refusal or str(error)) from error
    told: dict[str, Any] = {
        "name": name,
        "folder": str(folder),
        "bytes": sum(path.stat().st_size for path in folder.iterdir() if path.is_file()),
        **asdict(found),
        "chat_template": talk.template,
        "tools": talk.parsers.tools,
        "reasoning": talk.parsers.reasoning,
        "endings": talk.endings,
        "sampling": dict(talk.sampling),
    }
    if args.url is not None:
        state = of(served, name, folder)
        told["served"] = None if state is None else asdict(state)
    print(json.dumps(told, indent=2) if args.json else "\n".join(lines(told)))
    return 0


def table(told: Sequence[Mapping[str, Any]]) -> list[str]:
    """What `list` prints, a line for each model."""
    states = any("served" in model for model in told)
    rows = [("MODEL", "CACHE", "SIZE", "KIND", "CONTEXT", *["STATE"] * states, "RUNS HERE")]
    for model in told:
        kind = ", ".join(filter(None, (model["family"], model["weights"]))) or "-"
        context = "-" if model["context"] is None else str(model["context"])
        state = [_state(model)] if states else []
        rows.append((model["name"], model["cache"], format_size(model["bytes"]), kind, context, *state, _runs(model)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def lines(told: Mapping[str, Any]) -> list[str]:
    """What `show` prints."""
    sampling = ", ".join(f"{name} {value}" for name, value in told["sampling"].items())
    facts = {
        "model": told["name"],
        "folder": f"{told['folder']}, {format_size(told['bytes'])}",
        "kind": ", ".join(filter(None, (told["family"], told["weights"]))) or "-",
        "context": "not said" if told["context"] is None else f"{told['context']} tokens",
        "runs here": _runs(told),
        "template": "a chat template" if told["chat_template"] else "none: /v1/completions, or --chat-template FILE",
        "parsers": f"tools: {told['tools'] or 'none'}, reasoning: {told['reasoning'] or 'none'}",
        "sampling": f"{sampling} (generation_config.json)" if sampling else "vLLM's defaults",
        "endings": told["endings"],
    } | ({"state": _state(told)} if "served" in told else {})
    return [f"{name:<10} {value}" for name, value in facts.items()]


def _state(told: Mapping[str, Any]) -> str:
    """At the endpoint that was asked."""
    if told["served"] is None:
        return "not served"
    from pomarium.cluster.cli.served_states import ServedModel

    return str(ServedModel(**told["served"]))


def _runs(told: Mapping[str, Any]) -> str:
    if told["refusal"] is not None:
        return f"no: {told['refusal']}"
    short = told["context"] is not None and told["fits"] < told["context"]
    shorter = f", with --max-model-len {told['fits']}" if short else ""
    return f"yes{shorter}: {format_size(told['kv_bytes'])} left for K and V"


def _told(model: "StoredModel", found: "Description | None") -> dict[str, Any]:
    """found: None for what is no whole model."""
    from pomarium.cluster.replica.description import Description

    if found is None:
        files = model.gguf_files()
        refusal = f"Serve a GGUF file of it by its path, such as {files[0]}." if files else _unfinished(model)
        found = Description("GGUF" if files else None, None, None, refusal)
    whole = {"name": model.name, "cache": model.cache.value, "folder": str(model.folder), "bytes": model.size}
    return whole | {"whole": model.whole} | asdict(found)


def _unfinished(model: "StoredModel") -> str:
    return (
        f"Its config.json or weights (model*.safetensors) are not all here: `pomarium models pull {model.name}` "
        "fetches those that there are."
    )


def _folder_of(name: str) -> Path:
    """A model's folder on this machine; a GGUF file is converted."""
    from pomarium.worker.models.resolve import resolve

    if name in look_up.EMBEDDED or look_up.local(name) is not None:
        return resolve(name)
    for model in _stored():
        if model.name == name and model.whole:
            return model.folder
    raise CheckpointError(f"{name} is not on this machine, or not whole: `pomarium models pull {name}` fetches it.")


def _stored() -> "list[StoredModel]":
    from pomarium.worker.models import stored

    return stored.stored(settings.load(os.environ).modelscope_cache)


def _confirmed(what: str) -> bool:
    """Raises SettingsError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise SettingsError("Standard input is no terminal, so nobody can be asked: give --yes.")
    return input(f"Remove {what}? [y/N] ").strip().lower() in ("y", "yes")
