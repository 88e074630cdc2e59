"""How the models of a running endpoint are, for `pomarium models list --url` and `show --url`.

/v1/models: name, where it lies --+--states--> ServedModels --of--> the one of a model on this machine
/v1/rack: name, state, reason ----'
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pomarium.cluster.cli.chat import ChatError, client_of, sentence_of


@dataclass(frozen=True)
class ServedModel:
    """A model of an endpoint.

    Attributes:
        name: in requests. root: the path or id that it was served from. state, reason: as /v1/rack has them.
    """

    name: str
    root: str
    state: str
    reason: str | None

    def __str__(self) -> str:
        called = f" as {self.name}" if self.name != self.root else ""
        return f"{self.state}{called}{f': {self.reason}' if self.reason else ''}"


def states(url: str, key: str | None) -> tuple[ServedModel, ...]:
    """Of all models at `url`. Raises ChatError: it does not answer, or is no Pomarium; SettingsError: it is no URL."""
    from openai import APIConnectionError, APIError

    client = client_of(url, key)
    try:
        roots = {model.id: str((model.model_extra or {}).get("root") or model.id) for model in client.models.list()}
        told = client.get("/rack", cast_to=object)
    except APIConnectionError:
        raise ChatError(f"Nothing answers at {url}: start `pomarium serve`, or leave out --url.") from None
    except APIError as error:
        raise ChatError(sentence_of(error)) from None
    if not isinstance(told, dict) or not isinstance(models := told.get("models"), list):
        raise ChatError(f"{url} is no endpoint of Pomarium's: it tells no states of models.")
    return tuple(ServedModel(m["name"], roots.get(m["name"], m["name"]), m["state"], m["reason"]) for m in models)


def of(served: Iterable[ServedModel], name: str, folder: Path) -> ServedModel | None:
    """The one that is the model called `name` at `folder`; None: it is not served."""
    return next((model for model in served if model.root in (name, str(folder))), None)
