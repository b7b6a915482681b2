"""A server for clients of OpenAI's API, and a page to chat with: requests join one batch while others run.

    pip install -r requirements-serve.txt
    python -m scripts.serve --compile                                         the shipped demo, http://127.0.0.1:8000
    python -m scripts.serve --compile --checkpoint_path ORG/NAME --quantize int4 --batch_size 16

/v1/completions, /v1/chat/completions, /v1/models and /health; the page is at /. It listens to this machine alone unless
--host says otherwise, has no passwords, and tells a browser to keep other sites out. Ctrl-C ends it, and all texts.
"""
import asyncio
import contextlib
import functools
import importlib.util
import json
import signal
import socket
import sys
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

import device as machine
import prompts
from batch import Batch, Request
from collectives import world
from errors import Parser, UserError, run_command
from generate import DEMO, add_draft_options, add_model_options, compile_steps, load_model, speculate
from model import Transformer
from sampling import Sampling, Varied
from scripts.engine import Engine, Exchange, Failed, Full
from scripts.openai_requests import ApiError, Served, longest_piece
from scripts.openai_responses import Answer, Speller, event
from scripts.rows import check
from tokenizer import Tokenizer

PAGE = Path(__file__).with_name("chat.html")
MOST_BODY = 4 << 20  # bytes of a request
LARGE_BODY = 16 << 10  # bytes from which on a request is read beside the loop, which others wait for
BLOCK = 128  # tokens: prompts are cut into powers of two of it on a CPU, whose matrix library keeps 2 MB for each size
SWITCH = 0.0005  # seconds until a thread gives way to the other: texts must not hold up the steps that make them
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
          "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")


# -- what a server is -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Service:
    """What all requests share."""
    served: Served
    engine: Engine
    spell: Speller
    stop_ids: frozenset[int]
    hosts: frozenset[str] | None  # names that a client may call us by; None: any


class HungUp(Exception):
    """The client has gone."""


async def unless_gone(receive: Callable, work: Awaitable):
    """What `work` gives; it is cancelled, and HungUp raised, as soon as the client hangs up."""
    async def hang_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = work, _ = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise HungUp
        return work.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream:
    """A response of server-sent events, until the client hangs up; `end` is called in any case."""

    def __init__(self, pieces: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        self.pieces, self.end = pieces, end

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        try:
            await unless_gone(receive, self.send(send))
        except HungUp:
            pass
        finally:
            self.end()

    async def send(self, send: Callable) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


async def read_body(request) -> bytes:
    """Raises ApiError for one that is too large; of that, some is read and dropped, so that the client hears of it."""
    body, size = bytearray(), 0
    async for piece in request.stream():
        size += len(piece)
        if size <= MOST_BODY:
            body += piece
        elif size > 16 * MOST_BODY:
            break
    if size > MOST_BODY:
        raise ApiError(413, f"the body has more than {MOST_BODY} bytes", code="body_too_large")
    return bytes(body)


# -- what it does -----------------------------------------------------------------------------------------------------

async def respond(service: Service, request, chat: bool):
    """An answer to a request for texts: a document, or a stream of them."""
    raw = await read_body(request)
    read = service.served.read
    asked = read(raw, chat) if len(raw) < LARGE_BODY else await asyncio.to_thread(read, raw, chat)
    requests = asked.requests(service.stop_ids, service.served.length)
    answer, exchange = Answer(asked, service.served, service.spell), submit(service.engine, requests)
    try:
        if not asked.stream:
            async def all_of_it() -> None:
                async for _ in grow(service.engine, exchange, answer):
                    pass
            await unless_gone(request.receive, all_of_it())
            return document(answer.whole())
        growth = grow(service.engine, exchange, answer)
        await unless_gone(request.receive, anext(growth))  # before it an error is still a status
        pieces, exchange_of_stream, exchange = stream(answer, growth), exchange, None
        return EventStream(pieces, lambda: service.engine.give_up(exchange_of_stream))
    except Failed as e:
        raise ApiError(500, str(e)) from None
    finally:
        if exchange is not None:
            service.engine.give_up(exchange)


def submit(engine: Engine, requests: list[Request]) -> Exchange:
    try:
        return engine.submit(requests)
    except UserError as e:
        raise ApiError(400, str(e)) from None
    except Full:
        raise ApiError(503, "too many requests are waiting; try again in a moment", code="overloaded") from None
    except Failed as e:
        raise ApiError(503, str(e), code="stopping") from None


async def grow(engine: Engine, exchange: Exchange, answer: Answer) -> AsyncIterator[None]:
    """Let the choices of an answer take in what comes, a yield each time; a row is freed when its text has ended."""
    async for arrived in engine.news(exchange):
        for i, (tokens, stop) in arrived.items():
            answer.choices[i].copied = exchange.texts[i].copied
            if answer.choices[i].push(tokens, stop):
                engine.end(exchange, i)
        yield


async def stream(answer: Answer, growth: AsyncIterator[None]) -> AsyncIterator[bytes]:
    """Events of an answer that has begun to grow."""
    told: set[int] = set()  # choices of which the end was told

    def news() -> bytes:
        open_choices = [choice for choice in answer.choices if choice.index not in told]
        told.update(choice.index for choice in open_choices if choice.finish)
        return b"".join(event(piece) for choice in open_choices for piece in answer.news(choice))

    yield b"".join(map(event, answer.begin())) + news()
    try:
        async for _ in growth:
            if found := news():
                yield found
        yield b"".join(map(event, answer.end())) + event("[DONE]")
    except Failed as e:
        yield event(ApiError(500, str(e)).body)


def application(service: Service):
    """The ASGI application."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, Response
    from starlette.routing import Route

    served, engine = service.served, service.engine
    model = {"id": served.model, "object": "model", "created": 0, "owned_by": "readonce",
             "context_length": served.length, "chat": served.tokenizer.template is not None}

    async def completions(request):
        return await respond(service, request, chat=False)

    async def chat_completions(request):
        return await respond(service, request, chat=True)

    async def models(request):
        return document({"object": "list", "data": [model]})

    async def one_model(request):
        if (name := request.path_params["name"]) != served.model:
            raise ApiError(404, f"there is no model {name!r}; this server has {served.model}", "model",
                           "model_not_found")
        return document(model)

    async def health(request):
        rows = len(engine.batch.rows)
        well = engine.failure is None and not engine.closing
        drafts = engine.batch.speculation and engine.batch.speculation.statistics.summary()
        return document({"status": "ok" if well else engine.reason, "rows": rows, "running": min(engine.taken, rows),
                         "waiting": max(engine.taken - rows, 0), "speculation": drafts}, 200 if well else 503)

    async def page(request):
        return HTMLResponse(PAGE.read_text("utf-8"), headers={"content-security-policy": POLICY})

    async def gone(request, error):
        return Response(status_code=499)  # nobody reads it

    async def refused(request, error):
        return document(error.body, error.status, {"retry-after": "1"} if error.code == "overloaded" else {})

    async def no_such_route(request, error):
        return document(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").body,
                        error.status_code, error.headers)

    async def broken(request, error):  # its traceback goes to stderr
        return document(ApiError(500, "a fault of this server; it says more where it was started").body, 500)

    posts = [Route("/v1/completions", completions, methods=["POST"]),
             Route("/v1/chat/completions", chat_completions, methods=["POST"])]
    gets = [Route("/v1/models", models), Route("/v1/models/{name:path}", one_model), Route("/health", health),
            Route("/", page)]
    handlers = {ApiError: refused, HTTPException: no_such_route, HungUp: gone, ClientDisconnect: gone,
                Exception: broken}
    return guarded(Starlette(routes=posts + gets, exception_handlers=handlers), service.hosts)


def document(content: dict, status: int = 200, headers: dict | None = None):
    from starlette.responses import Response
    return Response(json.dumps(content, allow_nan=False), status, headers, "application/json")


def guarded(app: Callable, hosts: frozenset[str] | None) -> Callable:
    """`app` for those who call it by one of `hosts`, and no page of another: a name that a stranger's page has made
    point here (DNS rebinding), or a form of it, gets an error."""
    async def guard(scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "http" and hosts is not None:
            headers = dict(scope["headers"])
            host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
            if name_in(f"//{host}") not in hosts or (origin and name_in(origin) not in hosts):
                error = ApiError(403, f"this server is not to be called as {host!r} from {origin or 'there'!r}")
                return await document(error.body, 403)(scope, receive, send)
        return await app(scope, receive, send)
    return guard


def name_in(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


# -- command line -----------------------------------------------------------------------------------------------------

def parser() -> Parser:
    p = Parser(prog="python -m scripts.serve", description=__doc__.splitlines()[0])
    add_model_options(p)
    p.add_argument("--host", default="127.0.0.1", help="address to listen at (default %(default)s: this machine alone)")
    p.add_argument("--port", type=int, default=8000, help="default %(default)s; 0: any that is free")
    p.add_argument("--batch_size", type=int, default=prompts.ROWS, metavar="N",
                   help="texts at a time; more wait (default %(default)s)")
    p.add_argument("--max_waiting", type=int, default=256, metavar="N",
                   help="texts that may wait; further ones are told to come again (default %(default)s)")
    p.add_argument("--max_length", type=int, metavar="N", help="tokens of a text, the prompt's included (default: the "
                                                               "model's, at most 4096)")
    p.add_argument("--top_k", type=int, default=Varied.top_k, metavar="N",
                   help="tokens are drawn from the N likeliest; a request may ask for fewer (default %(default)s)")
    add_draft_options(p)
    p.set_defaults(compile_prefill=False, random_weights=None, synthetic_acceptance=None)
    return p


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, before time goes into a model."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)  # without its protocol asyncio would not set TCP_NODELAY
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError, UnicodeError) as e:
        raise UserError(f"cannot listen at --host {host} --port {port} ({e}); give another port, or end what listens "
                        f"there") from None
    return bound


def hosts_of(host: str, address: str) -> frozenset[str] | None:
    """The names of a loopback address; None for another, whose names are not known here."""
    return frozenset({"localhost", "127.0.0.1", "::1", host, address}) if ip_address(address).is_loopback else None


def make_batch(args, model: Transformer, tokenizer: Tokenizer, length: int) -> Batch:
    """The batch, with all its steps compiled and warm."""
    block = BLOCK if model.device.type == "cpu" else 0
    make = functools.partial(Batch, model, args.batch_size, length, Varied(args.top_k), block=block,
                             speculation=speculate(args, model, tokenizer, args.batch_size))
    ways = Sampling(0, None), Sampling(0, None, frequency_penalty=1.0, logprobs=0)
    steps, _ = compile_steps(args, model, functools.partial(prompts.warm_up, make, ways=ways))
    return make(steps, snapshots=args.batch_size + 2)


def load(args, hosts: frozenset[str] | None) -> Service:
    """The model, warm, and its engine, running. Loading, too, is the engine's: each thread that ever used several cores
    keeps helpers, and where these are more than cores they sleep between kernels: steps would take 4 times as long.
    """
    threads, tokenizer = machine.choose_threads(args.threads), None

    def make() -> Batch:
        nonlocal tokenizer
        model, tokenizer = load_model(args.checkpoint_path or DEMO, args.device, args.dtype, args.quantize,
                                      args.cache_packed, args.draft == "mtp", args.kv_dtype)
        return make_batch(args, model, tokenizer, args.max_length or min(model.config.max_seq_len, 4096))

    engine = Engine(make, args.max_waiting, threads)
    model = engine.begin().model
    size = model.config.vocab_size
    served = Served(args.checkpoint_path or "demo", tokenizer, engine.batch.length, size, engine.batch.sampling,
                    args.batch_size + args.max_waiting, longest_piece(tokenizer, size))
    return Service(served, engine, Speller(tokenizer), tokenizer.stop_ids, hosts)


def make_server(service: Service, ready: str):
    """A uvicorn.Server that ends texts under way when it is told to stop, and stops when the engine has failed; when it
    listens, it says `ready`."""
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            print(ready, file=sys.stderr, flush=True)

        async def shutdown(self, sockets=None) -> None:
            service.engine.close()
            await super().shutdown(sockets)

    server = Server(uvicorn.Config(application(service), lifespan="off", log_level="warning", access_log=False,
                                   server_header=False, timeout_graceful_shutdown=5))
    service.engine.on_failure = lambda: setattr(server, "should_exit", True)
    return server


def require(args) -> None:
    """UserError for options that cannot be, before anything is loaded."""
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the package {package} is not installed; pip install -r requirements-serve.txt")
    check(args, port=0, batch_size=1, max_waiting=0, max_length=2, top_k=1)
    if args.port > 65535:
        raise UserError(f"--port is {args.port}; it must be at most 65535")
    if world.size > 1:
        raise UserError("there is no server of several ranks; start it without torchrun")


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    require(args)
    with listen(args.host, args.port) as bound:
        address, port = bound.getsockname()[:2]
        service = load(args, hosts_of(args.host, address))
        shown = f"[{address}]" if ":" in address else address
        server = make_server(service, f"{service.served.model}, {args.batch_size} texts of {service.served.length} "
                                      f"tokens at a time, on http://{shown}:{port} (Ctrl-C ends it)")
        sys.setswitchinterval(SWITCH)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn has ended all, and hands the signal on
            server.run([bound])
    service.engine.join(10)
    if (failure := service.engine.failure) is None:
        return 0
    if isinstance(failure, UserError):
        print(f"error: {failure.line}", file=sys.stderr)
    else:
        traceback.print_exception(failure)
    return 1


if __name__ == "__main__":
    run_command(main)
