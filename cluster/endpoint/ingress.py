"""The HTTP endpoint: authorises, finds the model, hands the request to one of its engines and relays the answer.

    client --HTTP--> Serve proxy --> Ingress --Serve handle: which replica, and that it is busy--> EngineReplica
                                             <--answers.py: the request, vLLM's answer-----------'

Bodies pass through unread but for `model`, so that everything vLLM accepts works and its own error bodies arrive.
door.py bounds them, here once more for a Ray whose proxy has no door. The process stays small: it imports no vLLM. No
CORS headers are sent: browsers of other origins are kept out.
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI, Request
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse

from pomarium.cluster import faults
from pomarium.cluster.batch.api import routes
from pomarium.cluster.batch.api.store import BatchStore
from pomarium.cluster.endpoint import cards, holding, metrics_page, reasons, watch
from pomarium.cluster.endpoint.answers import Answers
from pomarium.cluster.endpoint.cards import Served
from pomarium.cluster.endpoint.holding import SILENT
from pomarium.cluster.endpoint.reasons import Reasons
from pomarium.cluster.endpoint.relay import Relay
from pomarium.cluster.endpoint.routing import NoReplicaError, keys_of
from pomarium.cluster.http import bodies, openai_errors
from pomarium.cluster.http.answer_frames import Asked
from pomarium.cluster.http.door import Door
from pomarium.cluster.http.openai_errors import RefusalError
from pomarium.cluster.replica.answering import ReplyTo
from pomarium.cluster.replica.loss import EngineLostError
from pomarium.cluster.replica.replica import Routing
from pomarium.cluster.replica.serve_plan import Batches

logger = logging.getLogger(__name__)

HEALTH_S = 1.5
"""An engine that does not answer a health check in this time would not serve a request either. Together with
reasons.READ_S it bounds the answer of /health at 2 s."""

HEAD_IS_GONE = f"{watch.HEAD_GONE}: engines go on for some seconds, and then all of it ends."

LARGE = 256 << 10
"""Bytes of a body that takes longer to parse than to hand to a thread: some 2 ms."""

PASSED_HEADERS = frozenset({"content-type", "x-request-id", "traceparent", "tracestate"})

CLIENT_LEFT = 499
"""Status that nobody gets to see, after nginx."""

api = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
api.add_middleware(Door)


@api.exception_handler(RefusalError)
async def _answer_refusal(_: Request, refusal: RefusalError) -> Response:
    return JSONResponse(refusal.body, refusal.status, headers=openai_errors.headers(refusal.status))


@api.exception_handler(HTTPException)
async def _answer_http(request: Request, error: HTTPException) -> Response:
    path = openai_errors.shown(request.url.path)
    status, body = openai_errors.http(error.status_code, f"{request.method} {path}: {error.detail}.")
    return JSONResponse(body, status, headers=error.headers)


@api.exception_handler(ClientDisconnect)
async def _answer_nobody(_: Request, __: ClientDisconnect) -> Response:
    """The client left, or its body was refused (door.py), before all of it was there."""
    return Response(status_code=CLIENT_LEFT)


@api.exception_handler(Exception)
async def _answer_fault(request: Request, fault: Exception) -> Response:
    request_id = request.headers.get("x-request-id", "?")
    logger.error("request %s failed", request_id, exc_info=fault)
    status, body = openai_errors.internal(request_id)
    return JSONResponse(body, status)


async def _listen() -> Answers:
    """Where other machines of the rack reach this one."""
    answers = Answers(ray.util.get_node_ip_address())
    await answers.start()
    return answers


class Ingress:
    """Serve deployment class of the endpoint.

    `engines`: one handle per model name. `api_keys`: accepted bearer tokens; empty admits everybody. `batches`: where
    uploaded files and batches are kept; None: there are none. `served`: what is known of each model.
    `head_answers`: whether Ray's head does. `shortage`: a sentence on a disk that is full, if one is. `listen`: for
    answers.
    """

    def __init__(
        self,
        engines: Mapping[str, DeploymentHandle],
        api_keys: frozenset[str] = frozenset(),
        batches: Batches | None = None,
        served: Mapping[str, Served] | None = None,
        head_answers: Callable[[], bool] = watch.head_answers,
        shortage: Callable[[], str | None] = watch.shortage,
        listen: Callable[[], Awaitable[Answers]] = _listen,
    ) -> None:
        self._engines = dict(engines)
        self._served = {name: (served or {}).get(name, Served(name)) for name in engines}
        self._contexts = {name: model.context for name, model in self._served.items() if model.context is not None}
        self._keys = tuple(key.encode() for key in api_keys)
        self._created = int(time.time())
        self._reasons = Reasons()
        self._head_answers, self._shortage = head_answers, shortage
        self._batches = batches
        self._store = None if batches is None else BatchStore(Path(batches.folder))
        self._listen = listen
        self._listening: asyncio.Future[Answers] | None = None
        self._runner: Any = None
        if self._store is not None and any(not batch.status.over for batch in self._store.batches()):
            self._start_runner()

    @api.get("/health")
    async def health(self) -> Response:
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

    @api.get("/metrics")
    async def prometheus(self, request: Request) -> Response:
        """Prometheus text of all machines: Ray's, vLLM's and our own series."""
        self._authorise(request)
        return PlainTextResponse(await metrics_page.collect(), media_type="text/plain; version=0.0.4")

    @api.get("/v1/models")
    async def models(self, request: Request) -> Response:
        """The models served here."""
        self._authorise(request)
        return JSONResponse({"object": "list", "data": await asyncio.gather(*map(self._card, self._engines))})

    @api.get("/v1/models/{model:path}")
    async def model(self, request: Request, model: str) -> Response:
        """One model; all for a path that ends with the slash."""
        if not model:
            return await self.models(request)
        self._authorise(request)
        return JSONResponse(await self._card(self._known(model)))

    @api.post("/v1/chat/completions")
    @api.post("/v1/completions")
    @api.post("/tokenize")
    @api.post("/detokenize")
    async def generate(self, request: Request) -> Response:
        """Everything that an engine answers."""
        self._authorise(request)
        path = request.url.path
        body = b"".join([piece async for piece in request.stream()])  # body() would keep it as long as the request
        # Beside the loop that streams use, as far as Python's lock lets it.
        name, routing = await asyncio.to_thread(self._read, path, body) if len(body) > LARGE else self._read(path, body)
        headers = tuple((k, v) for k, v in request.headers.items() if k.lower() in PASSED_HEADERS)
        engine, answers = self._engines[name], await self._answers()
        deployment, sleeps = engine.deployment_name, self._served[name].sleeps

        def call(reply: ReplyTo) -> Any:
            return engine.request.remote(routing, reply)

        answer = answers.ask(call, Asked(request.method, path, headers), body, patient=sleeps)
        del body  # an answer may take minutes
        state = (lambda: self._reasons.state(deployment)) if sleeps else None
        relay = Relay(name, answer, lambda: self._reasons.why(deployment), state)
        try:
            head = await relay.head()
            if head.media_type.startswith("text/event-stream"):
                return StreamingResponse(relay.events(), head.status, media_type=head.media_type)
            return Response(b"".join([p async for p in relay.pieces()]), head.status, media_type=head.media_type)
        except BaseException:
            relay.cancel()
            raise

    @api.post("/v1/files")
    async def upload_file(self, request: Request) -> Response:
        """Keep a file for batches."""
        return await routes.upload(self._stored(request), request)

    @api.get("/v1/files")
    async def list_files(self, request: Request) -> Response:
        """All files."""
        return await routes.files(self._stored(request), request)

    @api.get("/v1/files/{name}")
    async def file(self, request: Request, name: str) -> Response:
        """One file."""
        return await routes.file(self._stored(request), name)

    @api.get("/v1/files/{name}/content")
    async def file_content(self, request: Request, name: str) -> Response:
        """What is in it."""
        return await routes.content(self._stored(request), name)

    @api.delete("/v1/files/{name}")
    async def delete_file(self, request: Request, name: str) -> Response:
        """Forget it."""
        return await routes.delete(self._stored(request), name)

    @api.post("/v1/batches")
    async def create_batch(self, request: Request) -> Response:
        """Have a file's requests answered."""
        created = await routes.create(self._stored(request), request)
        if self._runner is None:
            self._start_runner()
        return created

    @api.get("/v1/batches")
    async def list_batches(self, request: Request) -> Response:
        """All batches."""
        return await routes.batches(self._stored(request), request)

    @api.get("/v1/batches/{name}")
    async def batch(self, request: Request, name: str) -> Response:
        """One batch."""
        return await routes.batch(self._stored(request), name)

    @api.post("/v1/batches/{name}/cancel")
    async def cancel_batch(self, request: Request, name: str) -> Response:
        """End it; what is answered is kept."""
        return await routes.cancel(self._stored(request), name)

    def _stored(self, request: Request) -> BatchStore:
        self._authorise(request)
        if self._store is None:
            raise RefusalError(*openai_errors.http(404, f"{request.method} {request.url.path}: there are no batches."))
        return self._store

    def _start_runner(self) -> None:
        from pomarium.cluster.batch.api import runner

        assert self._store is not None
        assert self._batches is not None
        key = next((key.decode() for key in self._keys), None)
        self._runner = runner.start(self._store, self._batches.url, key)

    def _authorise(self, request: Request) -> None:
        """Raises RefusalError (401) without a valid key."""
        if not self._keys:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip().encode("latin-1")  # as Starlette decoded what came
        if scheme.lower() != "bearer" or not any(hmac.compare_digest(given, key) for key in self._keys):
            raise RefusalError(*openai_errors.unauthorized())

    async def _answers(self) -> Answers:
        """Where replicas answer; made at the first request, on the loop of all of them."""
        if self._listening is None:
            self._listening = asyncio.ensure_future(self._listen())
        return await asyncio.shield(self._listening)

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
        return cards.card(name, self._served[name], await self._context(name), self._created)

    async def _context(self, name: str) -> int | None:
        """Tokens of prompt and answer, asked of an engine once; None while none answers. Takes at most 2 s."""
        if name in self._contexts:
            return self._contexts[name]
        engine = self._engines[name]
        # An engine that is asked is one that is needed: a model that sleeps would wake.
        if self._served[name].sleeps and not (await self._reasons.state(engine.deployment_name)).running:
            return None
        asked = await _asked(engine.context)
        if asked is None or asked.exception() is not None:
            return None
        self._contexts[name] = asked.result()
        return self._contexts[name]


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


IngressDeployment = serve.ingress(api)(Ingress)
"""`Ingress` bound to its routes. Last in the module: Serve copies the routes' functions and the names known by then."""
