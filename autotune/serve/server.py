"""An HTTP server in the form of OpenAI's API for one policy, which decodes one request at a time, in order of arrival.

A request is read and checked at once. Then it waits for the decoder, a single thread, and streams or gathers what that
writes. A client that goes away gives up its place, or ends the decoding within a step or a prefill chunk.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import logging
import socket
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from ..policy.policy import PolicyError
from .openai_api import FAILED, APIError, ChatRequest, CompletionRequest, parse, prompt_tokens, usage

if TYPE_CHECKING:
    from .deploy import LLM, Served, Stream

log = logging.getLogger("autotune.serve")

SHUTDOWN_S = 5  # seconds after Ctrl-C in which what still runs is ended; chosen, not measured
_Word = TypeVar("_Word")


@dataclass
class _Job:
    """A request that was checked; `served` is what it took, after its end."""

    name: str
    start: Callable[[], Stream]
    served: Served | None = None

    @property
    def result(self) -> Served:
        assert self.served is not None, "it has not ended"
        return self.served


class _Desk:
    """The queue before the decoder, and the counts of what became of the requests. Used from the event loop only."""

    def __init__(self, llm: LLM, max_queue: int):
        self.llm, self.max_queue = llm, max_queue
        self.decoder = ThreadPoolExecutor(1, "serve")
        self.unfinished = 0
        self.requests: Counter[str] = Counter()
        self.totals: dict[str, float] = defaultdict(float)
        self.tokens_per_s = 0.0
        self.peak_bytes = 0

    async def decode(self, job: _Job) -> AsyncGenerator[str]:
        """The reply's pieces, when its turn has come. To close this gives up the place, or ends the decoding."""
        if self.unfinished > self.max_queue:
            waiting = f"{self.unfinished - 1} requests are waiting, as many as may (--max-queue); try again later"
            raise APIError(429, waiting, code="queue_full", kind="rate_limit_error")
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()
        gone = threading.Event()
        begun: list[Stream] = []

        def work() -> None:
            try:
                stream = job.start()
            except PolicyError as error:
                raise APIError(400, str(error)) from None
            begun.append(stream)
            if gone.is_set():  # who set it may not have seen the stream
                stream.close()
            with closing(stream):
                try:
                    for piece in stream:
                        loop.call_soon_threadsafe(pieces.put_nowait, piece)
                except PolicyError as error:  # it did not fit the budget
                    raise APIError(503, str(error), code="out_of_memory", kind="server_error") from None
            job.served = stream.request

        def finish(done: Future[None]) -> None:
            self.unfinished -= 1
            if done.cancelled():
                self.requests["abandoned"] += 1
                log.info("%s abandoned in the queue", job.name)
            elif job.served is not None:
                self._count(job.served, job.name)
            elif gone.is_set():  # nobody else will see the error
                self.requests["abandoned"] += 1
                log.info("%s abandoned: %s", job.name, done.exception())
            pieces.put_nowait(None)

        self.unfinished += 1
        future = self.decoder.submit(work)
        future.add_done_callback(lambda done: loop.call_soon_threadsafe(finish, done))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            future.result()
        finally:
            gone.set()
            future.cancel()
            for stream in begun:  # it waits for the step, or the prefill chunk, that is running
                loop.run_in_executor(None, stream.close)

    def _count(self, served: Served, name: str) -> None:
        generation = served.generation
        seconds = generation.ttft_s + generation.decode_s
        self.requests["abandoned" if served.finish_reason == "closed" else "ok"] += 1
        self.totals["prompt_tokens"] += served.prompt_tokens
        self.totals["cached_tokens"] += served.cached_tokens
        self.totals["generated_tokens"] += len(generation.tokens)
        self.totals["proposed_tokens"] += generation.proposed
        self.totals["accepted_tokens"] += generation.accepted
        self.totals["ttft_seconds"] += generation.ttft_s
        self.totals["decode_seconds"] += generation.decode_s
        self.tokens_per_s = len(generation.tokens) / seconds if seconds else 0.0
        self.peak_bytes = max(self.peak_bytes, served.peak_bytes)
        log.info("%s %s: %s", name, served.finish_reason, served.summary())

    def metrics(self) -> str:
        """https://prometheus.io/docs/instrumenting/exposition_formats/, the text format."""
        lines = ["# HELP autotune_requests_total Requests by outcome.", "# TYPE autotune_requests_total counter"]
        for outcome in ("ok", "abandoned", "refused", "busy", "failed"):
            lines.append(f'autotune_requests_total{{outcome="{outcome}"}} {self.requests[outcome]}')
        counters = {
            "prompt_tokens": "Tokens of prompts, cached ones included.",
            "cached_tokens": "Tokens of prompts that a cache still held.",
            "generated_tokens": "Tokens written.",
            "proposed_tokens": "Tokens that a draft proposed.",
            "accepted_tokens": "Tokens of those that were accepted.",
            "ttft_seconds": "Time to the first token, without waiting for the decoder.",
            "decode_seconds": "Time from the first token to the last.",
        }
        gauges = {
            "queue_length": ("Requests waiting for the decoder.", max(0, self.unfinished - 1)),
            "tokens_per_s": ("Tokens per second of the last request.", self.tokens_per_s),
            "peak_bytes": ("Highest footprint of any request.", self.peak_bytes),
            "budget_bytes": ("The policy's budget.", self.llm.policy.budget_bytes),
        }
        for name, text in counters.items():
            lines += [f"# HELP autotune_{name}_total {text}", f"# TYPE autotune_{name}_total counter"]
            lines.append(f"autotune_{name}_total {self.totals[name]}")
        for name, (text, value) in gauges.items():
            lines += [f"# HELP autotune_{name} {text}", f"# TYPE autotune_{name} gauge", f"autotune_{name} {value}"]
        return "\n".join(lines) + "\n"


def application(llm: LLM, *, name: str, api_key: str | None, max_queue: int, max_body: int) -> FastAPI:
    """The server's routes. `max_queue` requests wait besides the one that runs; a body has up to `max_body` bytes."""
    desk = _Desk(llm, max_queue)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(desk.decoder.shutdown, cancel_futures=True)

    app = FastAPI(title="autotune", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    began = int(time.time())
    preparing = asyncio.Lock()  # a fast tokenizer can be borrowed by one thread at a time

    def authorize(request: Request) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = scheme.lower() == "bearer" and hmac.compare_digest(given.encode("latin-1"), (api_key or "").encode())
        if api_key and not right:
            raise APIError(
                401, "the API key is missing or wrong: send Authorization: Bearer KEY", code="invalid_api_key"
            )

    async def answer(request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        authorize(request)
        try:
            asked = parse(kind, await _body(request, max_body))
            _check_model(asked.model)
            async with preparing:
                tokens = await asyncio.to_thread(prompt_tokens, llm, asked)
            identity = f"{asked.ID}-{uuid.uuid4().hex}"
            job = _Job(f"{request.url.path} {identity[-8:]}", asked.start(llm, tokens))
            pieces = desk.decode(job)
            head = {"id": identity, "created": int(time.time()), "model": name}
            if asked.stream:
                first = await _while_there(request, anext(pieces, ""))  # an error before it still gets its status
                events = _events(asked, head, first, pieces, job)
                return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
            text = await _while_there(request, _gather(pieces))
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        choice = asked.whole(text, job.result.finish_reason)
        return JSONResponse({**head, "object": asked.WHOLE, "choices": [choice], "usage": usage(job.result)})

    def _check_model(asked: str) -> None:
        if asked != name:
            raise APIError(
                404, f"the model {asked!r} does not exist; this server has {name!r}", "model", "model_not_found"
            )

    def _model() -> dict[str, Any]:
        return {"id": name, "object": "model", "created": began, "owned_by": "autotune"}

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, ChatRequest)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, CompletionRequest)

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        authorize(request)
        return {"object": "list", "data": [_model()]}

    @app.get("/v1/models/{asked:path}")
    async def model(request: Request, asked: str) -> dict[str, Any]:
        authorize(request)
        _check_model(asked)
        return _model()

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        authorize(request)
        return PlainTextResponse(desk.metrics(), media_type="text/plain; version=0.0.4")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    async def refused(request: Request, error: APIError | HTTPException) -> Response:
        if isinstance(error, HTTPException):  # no such path, or another method
            error = APIError(error.status_code, str(error.detail))
        desk.requests["busy" if error.status == 429 else "failed" if error.status >= 500 else "refused"] += 1
        log.info("%s %d: %s", request.url.path, error.status, error)
        return JSONResponse(error.body, error.status)

    async def failed(request: Request, error: Exception) -> Response:
        desk.requests["failed"] += 1
        return JSONResponse(FAILED, 500, {"Connection": "close"})  # uvicorn logs the traceback, and closes it

    app.add_exception_handler(APIError, refused)  # type: ignore[arg-type] # it is only called with these
    app.add_exception_handler(HTTPException, refused)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, failed)
    return app


async def _while_there(request: Request, work: Awaitable[_Word]) -> _Word:
    """The work's result; raises ClientDisconnect, and ends the work, as soon as the client goes away."""

    async def leaves() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    worker, watcher = asyncio.ensure_future(work), asyncio.create_task(leaves())
    try:
        await asyncio.wait([worker, watcher], return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientDisconnect
    finally:
        worker.cancel()
        watcher.cancel()


async def _gather(pieces: AsyncIterator[str]) -> str:
    return "".join([piece async for piece in pieces])


async def _body(request: Request, most: int) -> bytes:
    """The body. One that is too large is read on for a while and dropped, or the client would never see the answer."""
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= most:
            body += chunk
        elif size > 16 * most:
            break
    if size > most:
        raise APIError(413, f"the body has more than {most} bytes (--max-body)", code="body_too_large")
    return bytes(body)


async def _events(
    asked: ChatRequest | CompletionRequest, head: dict[str, Any], first: str, pieces: AsyncGenerator[str], job: _Job
) -> AsyncIterator[str]:
    """The reply as server-sent events."""
    with_usage = asked.stream_options is not None and asked.stream_options.include_usage

    def event(*choices: dict[str, Any], **more: Any) -> str:
        data = {**head, "object": asked.PIECE, "choices": choices} | ({"usage": None} if with_usage else {}) | more
        return f"data: {json.dumps(data)}\n\n"

    async with aclosing(pieces):
        yield event(asked.piece(first, first=True))
        try:
            async for piece in pieces:
                yield event(asked.piece(piece))
        except Exception as error:
            body = error.body if isinstance(error, APIError) else FAILED
            yield f"data: {json.dumps(body)}\n\n"  # the status is long sent
            raise
    yield event(asked.piece("", job.result.finish_reason))
    if with_usage:
        yield event(usage=usage(job.result))
    yield "data: [DONE]\n\n"


def model_name(folder: Path) -> str:
    """The folder's name, or for a snapshot in the hub's cache the model's ID."""
    if folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--"):
        return folder.parent.parent.name.removeprefix("models--").replace("--", "/")
    return folder.name


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet. Raises OSError where the address is taken or not this machine's."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError:
        bound.close()
        raise
    return bound


def run(app: FastAPI, bound: socket.socket) -> None:
    """Serve until Ctrl-C."""
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    log.setLevel(logging.INFO)
    host, port = bound.getsockname()[:2]
    log.info("serving on http://%s:%d/v1; Ctrl-C ends it", f"[{host}]" if ":" in host else host, port)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, ws="none", server_header=False, timeout_graceful_shutdown=SHUTDOWN_S
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[bound])
