"""What the ingress decides by itself: keys, models, and what becomes of an engine that is lost."""

import asyncio
import json
import pickle
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from starlette.requests import Request
from starlette.responses import Response
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelPermission

from pomarium.cluster import faults
from pomarium.cluster.endpoint import holding, reasons
from pomarium.cluster.endpoint import ingress as ingress_module
from pomarium.cluster.endpoint.answers import Accepted, CutError
from pomarium.cluster.endpoint.cards import Served
from pomarium.cluster.endpoint.dispatch import Dispatch
from pomarium.cluster.endpoint.holding import State
from pomarium.cluster.endpoint.ingress import Ingress
from pomarium.cluster.endpoint.reasons import Reasons
from pomarium.cluster.endpoint.relay import RefusalError, Relay
from pomarium.cluster.endpoint.routing import NoReplicaError
from pomarium.cluster.http import answer_frames, asgi_bridge, openai_app, openai_errors, protocols
from pomarium.cluster.http.asgi import Message
from pomarium.cluster.http.asgi_bridge import Head
from pomarium.cluster.replica.heartbeat import SilentError
from pomarium.cluster.replica.loss import EngineLostError
from pomarium.cluster.replica.replica import Routing
from pomarium.cluster.replica.serve_plan import Limits

SSE = "text/event-stream"


class Items:
    """What Answers.ask gives for a request: an async iterator with `cancel`."""

    def __init__(self, *items: Any) -> None:
        self._items = self._iterate(items)
        self._unsent = next((item for item in items if isinstance(item, NoReplicaError)), None)
        self.cancelled = False
        self.begun, self.replica, self.resumable = True, "r1", True

    def gained(self) -> int:
        return 1

    async def _iterate(self, items: tuple[Any, ...]) -> AsyncIterator[Any]:
        for item in items:
            if isinstance(item, Exception):
                raise item
            yield item

    def __aiter__(self) -> "Items":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._items)

    def cancel(self) -> None:
        if self._unsent is not None:
            raise self._unsent
        self.cancelled = True


class Handle:
    """A Serve handle whose engine answers with `items`.

    Attributes:
        calls: of the engine. asked: what each was asked, and its body.
    """

    def __init__(self, items: Items) -> None:
        self._items = items
        self.request = self.healthy = self
        self.deployment_name = "engine:m"
        self.calls: list[tuple[Any, ...]] = []
        self.asked: list[tuple[answer_frames.Asked, bytes]] = []

    def remote(self, *arguments: Any) -> None:
        self.calls.append(arguments)

    async def listen(self) -> Any:
        return self

    def ask(
        self,
        call: Callable[[Any], Any],
        asked: answer_frames.Asked,
        body: bytes,
        *,
        patient: bool,
        keeps: bool,
        over: Dispatch | None,
    ) -> Items:
        """Answers.ask."""
        assert (patient, keeps, over) == (False, True, None)
        call("where")
        self.asked.append((asked, body))
        return self._items


def ingress_of(handle: Handle) -> Ingress:
    return Ingress({"m": handle}, listen=handle.listen, limits=Limits(times=0))


def dual(error: Exception) -> Exception:
    """`error` as Ray raises it where a call of another process failed with it."""
    return RayTaskError("request", "Traceback ...", error).as_instanceof_cause()


def request(
    body: bytes = b"", headers: dict[str, str] | None = None, at: str = "/v1/completions", **path: str
) -> Request:
    """Of a client that stays. `at`: what it asks."""
    coming: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if not coming:
            await asyncio.get_running_loop().create_future()
        return coming.pop()

    scope = asgi_bridge.scope("POST", at, list((headers or {}).items()))
    return Request({**scope, "path_params": path}, receive)


async def unsent(message: Message) -> None:
    raise AssertionError(message)


async def generated(ingress: Ingress, asked: Request) -> tuple[int, str]:
    """Status and text of what `Ingress.generate` sends."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await ingress.generate(asked, send)
    start, *pieces = sent
    assert not pieces[-1].get("more_body", False)
    return start["status"], b"".join(piece["body"] for piece in pieces).decode()


def refusal(call: Callable[[], Any]) -> RefusalError:
    with pytest.raises(RefusalError) as caught:
        asyncio.run(call())
    return caught.value


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic key"}, {"x-api-key": "wrong"}, {"x-api-key": ""}],
)
def test_without_the_key_nobody_is_served(headers: dict[str, str]) -> None:
    handle = Handle(Items())
    ingress = Ingress({"m": handle}, frozenset({"key"}))
    for call in (ingress.models, lambda asked: ingress.generate(asked, unsent), ingress.prometheus):
        error = refusal(lambda call=call: call(request(b"{}", headers)))
        assert (error.status, error.body["error"]["type"]) == (401, "AuthenticationError")
    assert handle.calls == []


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": "Bearer k2"}, {"x-api-key": "k2"}, {"x-api-key": " k1", "Authorization": "Bearer another's"}],
)
def test_with_a_key_the_models_are_shown(headers: dict[str, str]) -> None:
    """Clients of Anthropic's send `x-api-key`, some of them both."""
    ingress = Ingress({"m": Handle(Items())}, frozenset({"k1", "k2"}), served={"m": Served("m", 8)})
    answer = asyncio.run(ingress.models(request(headers=headers)))
    assert [card["id"] for card in json.loads(bytes(answer.body))["data"]] == ["m"]


async def answered(ingress: Ingress, asked: Request) -> tuple[int, dict[str, Any]]:
    """Status and JSON of what the application answers."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await ingress(asked.scope, asked.receive, send)
    return sent[0]["status"], json.loads(b"".join(message["body"] for message in sent[1:]))


@pytest.mark.parametrize(
    ("headers", "body", "status", "kind"),
    [
        ({}, b"{}", 401, "authentication_error"),
        ({"x-api-key": "key"}, b'{"model": "nobody"}', 404, "not_found_error"),
        ({"x-api-key": "key"}, b"{nope", 400, "invalid_request_error"),
        ({"x-api-key": "key"}, b"{}", 503, "overloaded_error"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_anthropic_s_clients_read_anthropic_s_errors(
    path: str, headers: dict[str, str], body: bytes, status: int, kind: str
) -> None:
    handle = Handle(Items(Accepted(), ActorDiedError()))
    ingress = Ingress({"m": handle}, frozenset({"key"}), listen=handle.listen)
    found, error = asyncio.run(answered(ingress, request(body, headers, at=path)))
    assert (found, error["type"], error["error"]["type"]) == (status, "error", kind)
    assert error["error"]["message"].endswith(".")


def test_a_path_of_anthropic_s_that_there_is_not() -> None:
    status, error = asyncio.run(answered(Ingress({"m": Handle(Items())}), request(at="/v1/messages/batches")))
    assert (status, error["error"]["type"]) == (404, "not_found_error")


@pytest.mark.parametrize("path", sorted(protocols.OTHER_KINDS))
def test_what_takes_a_model_of_another_kind_is_a_400_that_says_so(path: str) -> None:
    ingress = Ingress({"m": Handle(Items())}, frozenset({"key"}))
    assert asyncio.run(answered(ingress, request(b"{}", at=path)))[0] == 401
    headers = {"x-api-key": "key"}
    status, body = asyncio.run(answered(ingress, request(b'{"input": "x"}', headers, at=path)))
    assert (status, body["error"]["param"]) == (400, "model")
    assert "`m` is a model that generates text" in body["error"]["message"]
    assert protocols.OTHER_KINDS[path] in body["error"]["message"]
    assert asyncio.run(answered(ingress, request(b'{"model": "x"}', headers, at=path)))[0] == 404


@pytest.mark.parametrize("path", ["/v1/responses/resp_1", "/v1/responses/resp_1/cancel"])
def test_no_response_is_kept(path: str) -> None:
    status, body = asyncio.run(answered(Ingress({"m": Handle(Items())}), request(at=path)))
    assert (status, "send the whole conversation" in body["error"]["message"]) == (404, True)


def test_the_version_is_vllm_s_and_ours() -> None:
    ingress = Ingress({"m": Handle(Items())}, frozenset({"key"}))
    answer = asyncio.run(ingress.version(request(headers={"x-api-key": "key"})))
    shown = json.loads(bytes(answer.body))
    assert shown.keys() == {"version", "pomarium"}
    assert all(shown.values())
    assert refusal(lambda: ingress.version(request())).status == 401


def test_a_key_may_have_any_letters() -> None:
    ingress = Ingress({"m": Handle(Items())}, frozenset({"clé"}), served={"m": Served("m", 8)})
    as_sent = "clé".encode().decode("latin-1")  # what Starlette makes of the bytes
    assert asyncio.run(ingress.models(request(headers={"Authorization": f"Bearer {as_sent}"}))).status_code == 200


class Asked:
    """A handle whose engine tells its context, or fails to, and how often it was asked."""

    deployment_name = "engine:m"

    def __init__(self, *answers: int | Exception) -> None:
        self.context = self
        self.left = list(answers)

    def remote(self) -> "Asked":
        return self

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        answer = self.left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def shown(ingress: Ingress, path: str | None = None) -> dict[str, Any]:
    """What /v1/models says of the model, or /v1/models/`path`."""
    if path is None:
        (card,) = json.loads(bytes(asyncio.run(ingress.models(request())).body))["data"]
        return card
    return json.loads(bytes(asyncio.run(ingress.model(request(model=path))).body))


def test_a_model_s_card_has_what_vllm_s_has_and_an_engine_is_asked_once() -> None:
    engine = Asked(NoReplicaError(), 512)
    ingress = Ingress({"m": engine}, served={"m": Served("/models/m")})
    assert shown(ingress)["max_model_len"] is None, "there is no engine yet"
    card = shown(ingress)
    expected = ModelCard(id="m", root="/models/m", max_model_len=512, permission=[ModelPermission()], owned_by="us")
    assert card.keys() == expected.model_dump().keys()
    assert card["permission"][0].keys() == expected.permission[0].model_dump().keys()
    assert (card["root"], card["parent"], card["max_model_len"]) == ("/models/m", None, 512)
    assert shown(ingress) == shown(ingress, "m") == card
    assert shown(ingress, "")["data"] == [card], "the list, for a path that ends with the slash"
    assert refusal(lambda: ingress.model(request(model="other"))).status == 404


@pytest.mark.parametrize(("running", "context"), [(0, None), (1, 512)])
def test_a_model_that_sleeps_is_not_asked(running: int, context: int | None) -> None:
    ingress = Ingress({"m": Asked(*[512] * running)}, served={"m": Served("m", sleeps=True)})
    ingress._reasons = Reasons(lambda: {"engine:m": State("", running)})
    assert shown(ingress)["max_model_len"] == context


@pytest.mark.parametrize("name", ["x" * 1_000_000, ["x" * 1_000_000]])
def test_a_long_name_is_not_repeated(name: object) -> None:
    error = refusal(
        lambda: Ingress({"m": Handle(Items())}).generate(request(json.dumps({"model": name}).encode()), unsent)
    )
    assert (error.status, len(error.body["error"]["message"]) < 200) == (404, True)


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"{", 400), (b"[]", 400), (b'{"model": "x"}', 404), (b'{"model": 3}', 404), (b"{}", 400)],
)
def test_requests_without_a_served_model_are_refused(body: bytes, status: int) -> None:
    ingress = Ingress({"a": Handle(Items()), "b": Handle(Items())})
    assert refusal(lambda: ingress.generate(request(body), unsent)).status == status


@pytest.mark.parametrize(
    "body",
    [
        b'{"metadata": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
        b'{"model": "\\ud83d"}',
        b'{"stop": ["\\ud83d"]}',
    ],
)
def test_a_body_that_nothing_behind_it_can_take_is_a_400(body: bytes) -> None:
    error = refusal(lambda: Ingress({"m": Handle(Items())}).generate(request(body), unsent))
    assert error.status == 400
    assert error.body["error"]["message"].startswith("The request body ")


def test_the_only_model_needs_no_name_and_the_body_passes_unread() -> None:
    handle = Handle(Items(Accepted(), Head(400, "application/json"), b'{"a":', b"1}"))
    body = b'{"prompt": "x",  "odd": [1]}'
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}

    assert asyncio.run(generated(ingress_of(handle), request(body, headers))) == (400, '{"a":1}')
    ((asked, sent),) = handle.asked
    expected = answer_frames.Asked("POST", "/v1/completions", (("content-type", "application/json"),), asked.seed)
    assert (asked, sent) == (expected, body)
    ((routing, where),) = handle.calls
    assert (pickle.loads(pickle.dumps(routing)), where) == (Routing(), "where"), "a prompt's keys do not travel"


def test_an_engine_lost_before_its_answer_is_a_503() -> None:
    items = Items(Accepted(), ActorDiedError())
    error = refusal(lambda: ingress_of(Handle(items)).generate(request(b"{}"), unsent))
    assert error.status == 503
    assert "lost" in error.body["error"]["message"]
    assert items.cancelled


def streamed(items: Items, at: str = "/v1/completions") -> str:
    status, sent = asyncio.run(generated(ingress_of(Handle(items)), request(b"{}", at=at)))
    assert status == 200
    return sent


def test_an_engine_lost_in_a_stream_is_a_last_event() -> None:
    items = Items(Accepted(), Head(200, SSE), b"data: 1\n\n", ActorDiedError())

    first, error, end, _ = streamed(items).split("\n\n")
    assert (first, end) == ("data: 1", "data: [DONE]")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == 503
    assert items.cancelled


@pytest.mark.parametrize(("at", "kind"), [("/v1/messages", "overloaded_error"), ("/v1/responses", "ServiceUnav")])
def test_an_engine_lost_in_a_stream_of_named_events_is_one_too(at: str, kind: str) -> None:
    items = Items(Accepted(), Head(200, SSE), b"event: ping\ndata: {}\n\n", EngineLostError("its worker was killed"))

    first, last, nothing = streamed(items, at).split("\n\n")
    assert (first, nothing) == ("event: ping\ndata: {}", "")
    name, data = last.split("\n")
    told = json.loads(data.removeprefix("data: "))
    assert (name, told["type"]) == ("event: error", "error")
    assert told["error"]["type"].startswith(kind)
    assert "its worker was killed" in told["error"]["message"]
    if at == "/v1/responses":
        assert (told["code"], told["message"]) == (503, told["error"]["message"])


@pytest.mark.parametrize(
    "lost", [EngineLostError("its worker was killed"), dual(EngineLostError("its worker was killed"))]
)
def test_what_an_engine_died_of_reaches_the_client(lost: Exception) -> None:
    """Also as Ray hands it on: an exception whose own text is the replica's traceback."""
    expected = "The engine of `m` is not available: it was lost under way: its worker was killed. Try again shortly."
    error = refusal(lambda: ingress_of(Handle(Items(Accepted(), lost))).generate(request(b"{}"), unsent))
    assert (error.status, error.body["error"]["message"]) == (503, expected)

    event = streamed(Items(Accepted(), Head(200, SSE), b"data: 1\n\n", lost)).split("\n\n")[1]
    assert json.loads(event.removeprefix("data: "))["error"]["message"] == expected


def test_a_503_says_when_to_try_again() -> None:
    for status, names in ((503, ["Retry-After"]), (500, []), (401, [])):
        assert list(openai_errors.headers(status)) == names
    answer = openai_app.response(request(), RefusalError(*openai_errors.engine_unavailable("m", "x")))
    assert int(answer.headers["retry-after"]) > 0


MISSING = "model needs 12.3 GiB more memory: add a Mac"


def reasons_of(message: str) -> Reasons:
    return Reasons(lambda: {"engine:m": State(message)})


def relayed(*items: Any) -> Relay:
    return Relay("m", "/v1/completions", Items(*items), lambda: reasons_of("").why("engine:m"))


def test_a_request_without_a_replica_is_refused_with_the_reason() -> None:
    message = f"A replica failed to start with exception. Retrying. Error:\n{faults.StartError(MISSING)}"
    ingress = ingress_of(Handle(Items(NoReplicaError())))
    ingress._reasons = reasons_of(message)
    error = refusal(lambda: ingress.generate(request(b"{}"), unsent))
    assert (error.status, MISSING in error.body["error"]["message"]) == (503, True)


@pytest.mark.parametrize("before", [(), (Accepted(),)])
@pytest.mark.parametrize(("fault", "says"), [(SilentError(), "has not answered"), (CutError(), "lost under way")])
def test_an_engine_that_is_given_up_is_a_503(before: tuple[Any, ...], fault: Exception, says: str) -> None:
    error = refusal(lambda: relayed(*before, fault).head())
    assert (error.status, says in error.body["error"]["message"]) == (503, True)


@pytest.mark.parametrize(("fault", "says"), [(SilentError(), "has not answered"), (CutError(), "lost under way")])
def test_an_engine_that_is_given_up_in_a_stream_is_a_last_event(fault: Exception, says: str) -> None:
    items = Items(Accepted(), Head(200, SSE), b"data: 1\n\n", fault)

    first, error, end, _ = streamed(items).split("\n\n")
    assert (first, end) == ("data: 1", "data: [DONE]")
    assert says in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert items.cancelled


class Health:
    """A handle whose `healthy` raises `fault`, answers a word, or never answers."""

    deployment_name = "engine:m"

    def __init__(self, fault: Exception | str | None) -> None:
        self._fault = fault
        self.healthy = self

    def remote(self) -> "Health":
        return self

    def __await__(self) -> Any:
        if self._fault is None:
            yield from asyncio.sleep(60).__await__()
        if isinstance(self._fault, str):
            yield from asyncio.sleep(0).__await__()
            return self._fault
        raise self._fault or AssertionError

    def cancel(self) -> None:
        """Serve's call is given up."""


def health(fault: Exception | str | None, read: Callable[[], dict[str, State]]) -> tuple[int, dict[str, Any], float]:
    async def ask() -> tuple[int, dict[str, Any], float]:
        ingress = Ingress({"m": Health(fault)}, head_answers=lambda: True, shortage=lambda: None)
        ingress._reasons = Reasons(read)
        began = time.monotonic()
        answer = await ingress.health(request())
        return answer.status_code, json.loads(bytes(answer.body)), time.monotonic() - began

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (f"Retrying. Error:\n{faults.StartError(MISSING)}\n", MISSING),
        ("A replica's health check failed. This deployment will be UNHEALTHY.", f"{reasons.LOST}; {reasons.ANOTHER}"),
        ("Deploying,\n since 3 s.", "no engine answers; Serve says: Deploying, since 3 s."),
        ("", reasons.UNKNOWN),
    ],
)
@pytest.mark.parametrize("fault", [NoReplicaError(), ActorDiedError()])
def test_health_tells_the_reason(fault: Exception, message: str, reason: str) -> None:
    status, body, _ = health(fault, lambda: {"engine:m": State(message)})
    assert (status, body) == (503, {"status": "unavailable", "models": {"m": reason}})


def test_health_says_what_an_engine_says_of_its_steps() -> None:
    for word in ("ok", "ok, but no step of its engine has ended for 12 s"):
        status, body, _ = health(word, dict)
        assert (status, body) == (200, {"status": "ok", "models": {"m": word}})


def test_health_is_bounded_whatever_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ingress_module.HEALTH_S + reasons.READ_S <= 2
    monkeypatch.setattr(ingress_module, "HEALTH_S", 0.2)
    monkeypatch.setattr(reasons, "READ_S", 0.1)

    def hang() -> dict[str, State]:
        time.sleep(1.5)
        return {}

    status, body, took = health(None, hang)
    assert (status, body["models"]) == (503, {"m": holding.SILENT})
    assert took < 1


def test_a_controller_that_hangs_holds_one_thread() -> None:
    calls = []

    def hang() -> dict[str, State]:
        calls.append(1)
        time.sleep(1.5)
        return {"engine:m": State("late")}

    async def ask() -> list[str]:
        known = Reasons(hang)
        early = await asyncio.gather(*(known.why("engine:m") for _ in range(5)))
        await asyncio.sleep(1.2)
        return [*early, await known.why("engine:m")]

    answers = asyncio.run(ask())
    assert answers == [reasons.UNKNOWN] * 5 + ["no engine answers; Serve says: late"]
    assert len(calls) == 1


def test_health_tells_that_rays_head_has_ended() -> None:
    async def ask() -> Response:
        return await Ingress({}, head_answers=lambda: False).health(request())

    answer = asyncio.run(ask())
    assert answer.status_code == 503
    assert json.loads(bytes(answer.body))["reason"].startswith("Ray's head process (GCS) has ended")


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (
            State("A replica's health check failed. Deploy again.", lost="its worker was killed"),
            "(its worker was killed)",
        ),
        (State("", lost="its worker was killed"), "(its worker was killed)"),
        (State(f"Error:\n{faults.StartError(MISSING)}", lost="its worker was killed"), MISSING),
        (State("has taken more than 30 s to start", lost="its worker was killed"), "(its worker was killed)"),
    ],
)
def test_what_an_engine_was_lost_of_is_told(state: State, expected: str) -> None:
    assert expected in reasons.explain(state, "nothing")


def test_a_health_check_that_meets_a_dead_engine_tells_of_what() -> None:
    status, body, _ = health(dual(EngineLostError("its worker was killed")), dict)
    assert (status, body["models"]["m"]) == (503, f"{reasons.LOST} (its worker was killed); {reasons.ANOTHER}")


@pytest.mark.parametrize("fault", [None, NoReplicaError()])
def test_health_names_a_full_disk(fault: Exception | None) -> None:
    class Well(Health):
        def __await__(self) -> Any:
            yield from asyncio.sleep(0).__await__()
            if self._fault is not None:
                raise self._fault
            return True

    async def ask() -> Response:
        ingress = Ingress({"m": Well(fault)}, head_answers=lambda: True, shortage=lambda: "The disk is full.")
        ingress._reasons = reasons_of("")
        return await ingress.health(request())

    answer = asyncio.run(ask())
    assert answer.status_code == (200 if fault is None else 503)
    assert json.loads(bytes(answer.body))["disk"] == "The disk is full."
