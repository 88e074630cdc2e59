"""The HTTP endpoint: authorises, finds the model, hands the request to one of its engines and relays the answer.

    client --http_server.py--> Ingress --dispatch.py: over an idle line, or a call of Serve's--> EngineReplica
                                       <--answers.py: the request, vLLM's answer--------------'

Bodies pass through unread but for `model`, so that everything vLLM accepts works and its own error bodies arrive. What
engines answer passes below the framework of the other routes, which would cost each piece of a stream as much again as
all else here. The process stays small: it imports no vLLM.
"""

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from random import Random
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pomarium.cluster import faults
from pomarium.cluster.batch.api import routes
from pomarium.cluster.batch.api.store import BatchStore
from pomarium.cluster.endpoint import cards, front_page, holding, ledger, metrics_page, rack_view, reasons, watch
from pomarium.cluster.endpoint.answers import Answer, Answers
from pomarium.cluster.endpoint.cards import Served
from pomarium.cluster.endpoint.continued import KEPT_BODY, Continued
from pomarium.cluster.endpoint.dispatch import dispatch
from pomarium.cluster.endpoint.holding import SILENT, HopelessError
from pomarium.cluster.endpoint.on_demand import OnDemand
from pomarium.cluster.endpoint.rack_view import RackView
from pomarium.cluster.endpoint.reasons import Reasons
from pomarium.cluster.endpoint.relay import Relay
from pomarium.cluster.endpoint.routing import NoReplicaError, keys_of
from pomarium.cluster.http import bodies, openai_app, openai_errors, protocols
from pomarium.cluster.http.answer_frames import Asked
from pomarium.cluster.http.asgi import Message, Receive, Send, while_there
from pomarium.cluster.http.asgi_bridge import Head
from pomarium.cluster.http.openai_errors import RefusalError
from pomarium.cluster.http.progress import Resume
from pomarium.cluster.http.protocols import GENERATED, OTHER_KINDS
from pomarium.cluster.rack.status import RackStatus
from pomarium.cluster.replica.answering import ReplyTo
from pomarium.cluster.replica.loss import EngineLostError
from pomarium.cluster.replica.replica import Routing
from pomarium.cluster.replica.serve_plan import LIMITS, Batches, Limits

logger = logging.getLogger(__name__)

HEALTH_S = 1.5
"""An engine that does not answer a health check in this time would not serve a request either. Together with
reasons.READ_S it bounds the answer of /health at 2 s."""

HEAD_IS_GONE = f"{watch.HEAD_GONE}: engines go on for some seconds, and then all of it ends."

VERSIONS = {"version": "vllm", "pomarium": "pomarium"}
"""What /version shows, and of which package."""

NOT_KEPT = (
    "No response is kept here, so none can be retrieved, cancelled or deleted: send the whole conversation as `input`, "
    "and close the connection to cancel."
)

KEPT = (f"{protocols.RESPONSES}/{{name}}", f"{protocols.RESPONSES}/{{name}}/{{what}}")
"""Paths of responses that a server has kept."""

SEED_BYTES = 8

_WORDS = {rack_view.SERVING: "ok"}
"""What /health says of a model on demand, where its state has another name."""

LARGE_AT_ONCE = 2
"""Large bodies (bodies.LARGE) that are parsed at once: one of nothing but brackets takes some 25 times its bytes."""

PASSED_HEADERS = frozenset({"content-type", "x-request-id", "traceparent", "tracestate"})


async def _listen() -> Answers:
    """Where other machines of the rack reach this one."""
    answers = Answers(ray.util.get_node_ip_address(), ledger.of_this_process().lost)
    await answers.start()
    return answers


class Ingress:
    """The endpoint as an ASGI application.

    There may be several of one endpoint, in processes of their own (ingress_replica.py): none keeps what another would
    lack.

    `engines`: one handle per model name. `api_keys`: that requests carry; empty admits everybody. `batches`: where
    uploaded files and batches are kept; None: there are none. `served`: what is known of each model. `created`: Unix
    time, since when they are served; None: now.
    `head_answers`: whether Ray's head does. `shortage`: a sentence on a disk that is full, if one is. `listen`: for
    answers. `look`: at the rack; blocks. `on_demand`: all models come and go, as it says; None: none does. `limits`: of
    requests whose engine is lost. `resumed`: told of each that went on at another, its model and how long its client
    waited.
    """

    def __init__(
        self,
        engines: Mapping[str, DeploymentHandle],
        api_keys: frozenset[str] = frozenset(),
        batches: Batches | None = None,
        served: Mapping[str, Served] | None = None,
        created: int | None = None,
        head_answers: Callable[[], bool] = watch.head_answers,
        shortage: Callable[[], str | None] = watch.shortage,
        listen: Callable[[], Awaitable[Answers]] = _listen,
        look: Callable[[], RackStatus] = rack_view.read,
        on_demand: OnDemand | None = None,
        limits: Limits = LIMITS,
        resumed: Callable[[str, float], None] = lambda model, waited_s: None,
    ) -> None:
        self._engines = dict(engines)
        self._served = {name: (served or {}).get(name, Served(name)) for name in engines}
        self._contexts = {name: model.context for name, model in self._served.items() if model.context is not None}
        self._keys = tuple(key.encode() for key in api_keys)
        self._created = int(time.time()) if created is None else created
        self._reasons = Reasons()
        self._on_demand = on_demand
        self._view = RackView(look)
        self._head_answers, self._shortage = head_answers, shortage
        self._batches = batches
        self._store = None if batches is None else BatchStore(Path(batches.folder))
        self._ledger, self._random = ledger.of_this_process(), Random()
        self._reading_large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._listen, self._limits, self._resumed = listen, limits, resumed
        self._listening: asyncio.Future[Answers] | None = None
        self._running: set[Continued] = set()
        self._ends = False
        self._batch_work: asyncio.Task[None] | None = None
        self._others = openai_app.application(
            [
                Route("/", self.page),
                Route("/health", self.health),
                Route("/metrics", self.prometheus),
                Route("/v1/rack", self.rack),
                Route("/v1/models", self.models),
                Route("/v1/models/{model:path}", self.model),
                Route("/version", self.version),
                *(Route(path, self.kept_response, methods=["GET", "POST", "DELETE"]) for path in KEPT),
                *(Route(path, self.other_kind, methods=["POST"]) for path in OTHER_KINDS),
                *routes.mounted(self._stored, self._run_batches),
                # For other methods, and a slash behind the path.
                *(Route(path, _passes_below, methods=["POST"]) for path in GENERATED),
            ]
        )

    async def open(self) -> None:
        """Before the first request: have ready what takes Ray's head, and go on with batches of an earlier ingress."""
        await self._answers()
        if self._store is not None and any(not batch.status.over for batch in self._store.batches()):
            self._run_batches()

    def end(self) -> None:
        """The endpoint is being stopped: what is being answered ends with an error of its protocol, and so does what
        comes."""
        self._ends = True
        for answer in self._running:
            answer.end()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in GENERATED:
            await self._others(scope, receive, send)
            return
        begun = False

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        request = Request(scope, receive)
        try:
            await self.generate(request, sending)
        except Exception as error:
            if begun:
                raise
            await openai_app.response(request, error)(scope, receive, send)

    async def health(self, _: Request) -> Response:
        """200 if each model would serve a request, else 503 with the reason per model. 503, too, once Ray's head has
        ended: what still serves ends within a minute."""
        found, head = await asyncio.gather(
            asyncio.gather(*(self._health_of(name, handle) for name, handle in self._engines.items())),
            asyncio.to_thread(self._head_answers),
        )
        models = {name: said for name, (_, said) in zip(self._engines, found, strict=True)}
        if not head:
            return JSONResponse({"status": "unavailable", "reason": HEAD_IS_GONE, "models": models}, 503)
        full = await asyncio.to_thread(self._shortage)
        disk = {"disk": full} if full else {}
        if not all(well for well, _ in found):
            return JSONResponse({"status": "unavailable", "models": models} | disk, 503)
        return JSONResponse({"status": "ok", "models": models} | disk)

    async def _health_of(self, name: str, engine: DeploymentHandle) -> tuple[bool, str]:
        """Whether a request would be served, and a word or sentence on it."""
        if self._on_demand is not None:
            model = self._on_demand.state(name)
            well = (
                model.state != rack_view.FAILED or self._on_demand.unfit(name) is not None
            )  # that was said at the start
            return well, model.reason or _WORDS.get(model.state, model.state)
        if not self._served[name].sleeps:
            return await _health(engine, self._reasons)
        # An engine that is asked is one that is needed: Serve would never let it go.
        state = await self._reasons.state(engine.deployment_name)
        if state.running:
            return True, "ok"
        if state.waking:
            return True, "waking"
        hopeless = holding.verdict(state, holding.GRACE_S, 0.0)
        return hopeless is None, hopeless or "asleep"

    async def prometheus(self, request: Request) -> Response:
        """Prometheus text of all machines: Ray's, vLLM's and our own series."""
        self._authorise(request)
        return PlainTextResponse(await metrics_page.collect(), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        """The page, which anybody may have: what it shows takes the key. Who is no browser finds nothing here."""
        if not front_page.wanted(request.headers.get("accept", "")):
            raise HTTPException(404, headers={"Vary": "Accept"})
        made = front_page.page(bool(self._keys))
        return Response(made.content, media_type=front_page.HTML, headers=made.headers)

    async def rack(self, request: Request) -> Response:
        """The state of the rack and of the models."""
        self._authorise(request)
        found, states = await asyncio.gather(
            self._view.status(),
            asyncio.gather(*(self._reasons.state(engine.deployment_name) for engine in self._engines.values())),
        )
        models = [
            rack_view.model_state(name, self._served[name].sleeps, state, found)
            if self._on_demand is None
            else self._on_demand.state(name)
            for name, state in zip(self._engines, states, strict=True)
        ]
        return JSONResponse(rack_view.document(found, models), headers={"Cache-Control": "no-store"})

    async def models(self, request: Request) -> Response:
        """The models served here."""
        self._authorise(request)
        return JSONResponse({"object": "list", "data": await asyncio.gather(*map(self._card, self._engines))})

    async def model(self, request: Request) -> Response:
        """One model; all for a path that ends with the slash."""
        if not (model := request.path_params["model"]):
            return await self.models(request)
        self._authorise(request)
        return JSONResponse(await self._card(self._known(model)))

    async def version(self, request: Request) -> Response:
        """vLLM's, where its own clients look for it, and Pomarium's."""
        self._authorise(request)
        return JSONResponse({name: metadata.version(of).partition("+")[0] for name, of in VERSIONS.items()})

    async def kept_response(self, request: Request) -> Response:
        """An earlier answer of /v1/responses: none is kept, for any engine may have given it, and be gone."""
        self._authorise(request)
        raise RefusalError(*openai_errors.unknown(NOT_KEPT))

    async def other_kind(self, request: Request) -> Response:
        """What takes another kind of model than those that are served."""
        self._authorise(request)
        path = request.url.path
        name, _ = await self._read_beside(path, await request.body())
        raise RefusalError(*openai_errors.other_kind(name, path, OTHER_KINDS[path]))

    async def generate(self, request: Request, send: Send) -> None:
        """Everything that an engine answers.

        Raises, before anything is sent:
            RefusalError: the request is none, or no engine could answer it.
            ClientDisconnect: the client left.
        """
        self._authorise(request)
        path = request.url.path
        body = b"".join([piece async for piece in request.stream()])  # body() would keep it as long as the request
        name, routing = await self._read_beside(path, body)
        headers = tuple((k, v) for k, v in request.headers.items() if k.lower() in PASSED_HEADERS)
        seed = secrets.token_hex(SEED_BYTES) if self._limits.times else ""
        asked = Asked(request.method, path, headers, seed)
        deployment = self._engines[name].deployment_name
        state = (lambda: self._reasons.state(deployment)) if self._served[name].sleeps else None
        async with self._present(name, request.receive):
            answer = await self._continued(name, routing, asked, body)
            del body  # an answer may take minutes
            relay = Relay(name, path, answer, lambda: self._reasons.why(deployment), state)
            self._running.add(answer)
            if self._ends:
                answer.end()
            try:
                await while_there(request.receive, _relayed(relay, send))
            finally:
                self._running.discard(answer)

    async def _continued(self, name: str, routing: Routing, asked: Asked, body: bytes) -> Continued:
        """The answer of one of the model's engines, and of others after it if need be."""
        engine, served, answers = self._engines[name], self._served[name], await self._answers()
        deployment, keeps = engine.deployment_name, not served.scales

        def call(reply: ReplyTo) -> Any:
            return engine.request.remote(routing, reply)

        def ask(resume: Resume | None, body: bytes) -> Answer:
            over = dispatch(self._ledger, answers, deployment, routing.keys, self._random) if keeps else None
            how = asked if resume is None else replace(asked, resume=resume)
            return answers.ask(call, how, body, patient=served.sleeps, keeps=keeps, over=over)

        again = None if len(body) > KEPT_BODY else partial(ask, body=body)
        request_id = next((value for key, value in asked.headers if key.lower() == "x-request-id"), "a request")
        return Continued(
            f"{request_id} ({name})",
            ask(None, body),
            again,
            self._limits,
            lambda: self._reasons.state(deployment),
            self._ledger.lost,
            partial(self._resumed, name),
        )

    @asynccontextmanager
    async def _present(self, name: str, receive: Receive) -> AsyncIterator[None]:
        """A model that comes and goes is there, and stays. Raises RefusalError and ClientDisconnect."""
        if self._on_demand is None:
            yield
            return
        if unfit := self._on_demand.unfit(name):
            raise RefusalError(*openai_errors.invalid(unfit, "model"))
        async with AsyncExitStack() as stay:
            try:
                await while_there(receive, stay.enter_async_context(self._on_demand.needed(name)))
            except HopelessError as hopeless:
                raise RefusalError(*openai_errors.engine_unavailable(name, str(hopeless))) from None
            yield

    def _stored(self, request: Request) -> BatchStore:
        self._authorise(request)
        if self._store is None:
            raise RefusalError(*openai_errors.http(404, f"{request.method} {request.url.path}: there are no batches."))
        return self._store

    def _run_batches(self) -> None:
        """From now on, unless another ingress does: then once that one has ended."""
        if self._batch_work is None:
            self._batch_work = asyncio.create_task(self._batches_in_turn())

    async def _batches_in_turn(self) -> None:
        from pomarium.cluster.batch.api import runner

        assert self._store is not None
        assert self._batches is not None
        turn = await runner.turn(self._store.folder)
        key = next((key.decode() for key in self._keys), None)
        running = runner.start(self._store, self._batches.url, key)
        try:
            await asyncio.get_running_loop().create_future()  # both are given up with this process
        finally:
            del running
            turn.close()

    def _authorise(self, request: Request) -> None:
        """Raises RefusalError (401) without a valid key."""
        if not self._keys:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        bearer = token if scheme.lower() == "bearer" else ""
        for given in (bearer, request.headers.get("x-api-key", "")):
            sent = given.strip().encode("latin-1")  # as Starlette decoded what came
            if sent and any(hmac.compare_digest(sent, key) for key in self._keys):
                return
        raise RefusalError(*openai_errors.unauthorized())

    async def _answers(self) -> Answers:
        """Where replicas answer; made once, on the loop of all requests."""
        if self._listening is None:
            self._listening = asyncio.ensure_future(self._listen())
        return await asyncio.shield(self._listening)

    async def _read_beside(self, path: str, body: bytes) -> tuple[str, Routing]:
        """`_read`, of a large body beside the loop that streams use, as far as Python's lock lets it."""
        if len(body) <= bodies.LARGE:
            return self._read(path, body)
        async with self._reading_large:
            return await asyncio.to_thread(self._read, path, body)

    def _read(self, path: str, body: bytes) -> tuple[str, Routing]:
        """The model that `body` asks for, the only one if it names none, and what a replica is chosen by."""
        try:
            fields = bodies.parsed(body)
        except bodies.BodyError as error:
            raise RefusalError(*openai_errors.invalid(str(error), None)) from None
        if fields.get("model") is None:
            if len(self._engines) > 1:
                raise RefusalError(*openai_errors.model_required(list(self._engines)))
            name = next(iter(self._engines))
        else:
            name = self._known(fields["model"])
        return name, Routing(keys_of(path, fields))

    def _known(self, name: object) -> str:
        if isinstance(name, str) and name in self._engines:
            return name
        raise RefusalError(*openai_errors.unknown_model(name, list(self._engines)))

    async def _card(self, name: str) -> dict[str, Any]:
        card = cards.card(name, self._served[name], await self._context(name), self._created)
        if self._on_demand is None:
            return card
        model = self._on_demand.state(name)
        return card | {"state": model.state, "reason": model.reason}

    async def _context(self, name: str) -> int | None:
        """Tokens of prompt and answer, asked of an engine once; None while none answers. Takes at most 2 s."""
        if name in self._contexts or self._on_demand is not None:  # an engine that is asked might leave meanwhile
            return self._contexts.get(name)
        engine = self._engines[name]
        # An engine that is asked is one that is needed: a model that sleeps would wake.
        if self._served[name].sleeps and not (await self._reasons.state(engine.deployment_name)).running:
            return None
        asked = await _asked(engine.context)
        if asked is None or asked.exception() is not None:
            return None
        self._contexts[name] = asked.result()
        return self._contexts[name]


async def _passes_below(_: Request) -> Response:
    raise AssertionError("Ingress.__call__ answers these")


async def _relayed(relay: Relay, send: Send) -> None:
    """Send the answer as it comes; what is no stream, as a whole."""
    try:
        head = await relay.head()
        if head.media_type.startswith("text/event-stream"):
            await send(_begin(head))
            async for piece in relay.events():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
            return
        whole = b"".join([piece async for piece in relay.pieces()])
        await send(_begin(head, (b"content-length", str(len(whole)).encode())))
        await send({"type": "http.response.body", "body": whole})
    finally:
        relay.cancel()


def _begin(head: Head, *more: tuple[bytes, bytes]) -> Message:
    headers = [(b"content-type", head.media_type.encode("latin-1")), *more]
    return {"type": "http.response.start", "status": head.status, "headers": headers}


async def _health(engine: DeploymentHandle, known: Reasons) -> tuple[bool, str]:
    """Whether a request would be served, and what the engine says, or why it would not. Takes at most 2 s."""
    asked = await _asked(engine.healthy)
    if asked is None:
        return False, await known.why(engine.deployment_name, SILENT)
    error = asked.exception()
    if error is None:
        return True, str(asked.result())
    if isinstance(error, NoReplicaError | RayActorError):
        return False, await known.why(engine.deployment_name)
    logger.warning("health check failed: %s", error)
    if isinstance(error, EngineLostError):
        return False, f"{reasons.LOST} ({faults.sentence(error)}); {reasons.ANOTHER}"
    return False, "its engine has failed and is being replaced"


async def _asked(method: Any) -> "asyncio.Future[Any] | None":
    """An engine's answer, or what it raised; None after HEALTH_S."""
    answer = method.remote()
    asked: asyncio.Future[Any] = asyncio.ensure_future(answer)
    await asyncio.wait({asked}, timeout=HEALTH_S)  # not wait_for, which would wait for the cancellation as well
    if asked.done():
        return asked
    answer.cancel()
    asked.cancel()
    return None
