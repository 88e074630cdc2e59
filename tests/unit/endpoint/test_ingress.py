"""What the ingress decides by itself: keys, models, and which requests are refused before an engine has them."""

import asyncio
import json
import pickle

import pytest
from ingress_requests import Handle, Items, answered, generated, ingress_of, refusal, request, unsent
from ray.exceptions import ActorDiedError

from pomarium.cluster.endpoint.answers import Accepted
from pomarium.cluster.endpoint.cards import Served
from pomarium.cluster.endpoint.ingress import Ingress
from pomarium.cluster.http import answer_frames, protocols
from pomarium.cluster.http.asgi_bridge import Head
from pomarium.cluster.replica.replica import Routing


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
