"""A server process for the tests of listening: `python listened.py OPTIONS`, options as JSON.

`plain` takes uvicorn's own connections in place of ours; `stop` is the seconds that `on_stop` takes, `fails` an error
at the start; the rest are settings.
It prints its URL when it is ready, and "stopped" after `on_stop`.
"""

import asyncio
import json
import resource
import sys

from uvicorn.protocols.http.h11_impl import H11Protocol

from zimage.errors import ZImageError
from zimage.serve import listening
from zimage.serve.door import Door
from zimage.serve.guard import Guard
from zimage.serve.safety import protected
from zimage.serve.token import read_token
from zimage.settings.serving import ServeSettings

FILES = 400  # that the process may open
running = {"/big": 0, "/events": 0}


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    path = scope["path"]
    running[path] = running.get(path, 0) + 1
    try:
        await answer(path, receive, send)
    finally:
        running[path] -= 1


async def lifespan(receive, send):
    await receive()
    if options["fails"]:
        raise ZImageError(options["fails"])
    await send({"type": "lifespan.startup.complete"})
    await receive()
    say("closed")
    await send({"type": "lifespan.shutdown.complete"})


async def answer(path, receive, send):
    body = b""
    if path == "/read":
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        body = b"%d" % len(body)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    if path == "/events":
        while True:
            await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
            await asyncio.sleep(0.05)
    for _ in range(200 if path == "/big" else 0):
        await send({"type": "http.response.body", "body": bytes(1 << 17), "more_body": True})
    if path == "/running":
        body = json.dumps(running).encode()
    await send({"type": "http.response.body", "body": body})


async def stop():
    await asyncio.sleep(options["stop"])
    say("stopped")


def say(text):
    print(text, flush=True)


if __name__ == "__main__":
    options = {"plain": False, "stop": 0, "fails": "", **json.loads(sys.argv[1])}
    settings = ServeSettings(**{k: v for k, v in options.items() if k not in ("plain", "stop", "fails")})
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    listening.LINGER = listening.STALLED = listening.SAVING = listening.END = 0.2
    if options["plain"]:
        listening.Connection = lambda limits, **named: H11Protocol(**named)
    try:
        token = read_token(settings)
        guard = Guard(settings, Door(token))
        listening.serve(app if options["plain"] else protected(app, guard), settings, token, say, stop)
    except ZImageError as error:
        sys.exit(f"error: {error}")
