"""The rules before every request. Each attack is refused, and gets through once its rule is taken away."""

import asyncio
import base64
import logging
import re

import pytest
from asgi import HOST, ask, asked, run
from starlette.responses import FileResponse

from zimage.errors import RequestError
from zimage.serve import access, safety
from zimage.serve.door import LASTS, TRIES, WINDOW, Brake, Door, credential, no_cookie
from zimage.serve.guard import Guard
from zimage.serve.hosts import Hosts, Place, is_loopback
from zimage.serve.safety import RULES, protected
from zimage.settings.serving import ServeSettings

TOKEN = "correct-horse-battery"
BEARER = ("Authorization", f"Bearer {TOKEN}")
BIG = 1 << 20


async def app(scope, receive, send):
    """Reads the body and says how long it was, as a form would, with a status for a client that has gone."""
    length, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            await send({"type": "http.response.start", "status": 499, "headers": []})
            return await send({"type": "http.response.body"})
        length, more = length + len(message["body"]), message["more_body"]
    if scope["path"] == "/fault":
        raise RuntimeError("a secret prompt")
    status = 401 if scope["path"] == "/api/session" else 200
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": b"%d" % length})


def guarded(without=(), token=None, **settings):
    guard = Guard(ServeSettings(max_upload=1, idle_timeout=0.05, **settings), Door(token))
    return protected(app, guard, [rule for rule in RULES if rule.__name__ != without])


def tried(app, count, token="wrong-token-wrong-token", path="/api/jobs", method="GET"):
    for _ in range(count):
        answer = ask(app, method, path, [HOST, ("Authorization", f"Bearer {token}")])
    return answer


def at_once(app):
    async def crowd():
        slow = [asyncio.create_task(asked(app, "POST", body=[0.04])) for _ in range(401)]
        return [await task for task in slow][-1]

    return run(crowd())


def uploads_at_once(app):
    """Each within its limit; the first ones are held while the last comes."""

    async def crowd():
        held = [asyncio.create_task(asked(app, "POST", body=[b"a" * (BIG - 1), 0.04])) for _ in range(9)]
        await asyncio.sleep(0.01)
        return [await task for task in held][-1]

    return run(crowd())


# The rule, the attack, the status that it gets.
ATTACKS = {
    "many headers": ("HeadSize", lambda app: ask(app, headers=[HOST, *[("x", "y")] * 64]), 431),
    "long headers": ("HeadSize", lambda app: ask(app, headers=[HOST, ("x", "y" * (16 << 10))]), 431),
    "a long path": ("HeadSize", lambda app: ask(app, path="/" + "a" * 2048), 414),
    "a long query": ("HeadSize", lambda app: ask(app, path="/api?q=" + "a" * 2048), 414),
    "a path that climbs": ("PlainPath", lambda app: ask(app, path="/page/../api/jobs"), 400),
    "a path that climbs at its end": ("PlainPath", lambda app: ask(app, path="/page/.."), 400),
    "a backslash": ("PlainPath", lambda app: ask(app, path="/page/..\\..\\etc"), 400),
    "a line break in a path": ("PlainPath", lambda app: ask(app, path="/a\r\nb"), 400),
    "an absolute path": ("PlainPath", lambda app: ask(app, path="http://evil.example/api"), 400),
    "options for all": ("PlainPath", lambda app: ask(app, "OPTIONS", path="*"), 400),
    "two lengths": (
        "OneLength",
        lambda app: ask(app, headers=[HOST, *[("content-length", "1")] * 2], body=[b"a"]),
        400,
    ),
    "a length and chunks": (
        "OneLength",
        lambda app: ask(app, headers=[HOST, ("content-length", "1"), ("transfer-encoding", "chunked")], body=[b"a"]),
        400,
    ),
    "a rebound name": ("KnownHost", lambda app: ask(app, headers=[("host", "evil.example:7860")]), 403),
    "another port": ("KnownHost", lambda app: ask(app, headers=[("host", "127.0.0.1:7861")]), 403),
    "another address": ("KnownHost", lambda app: ask(app, headers=[("host", "10.1.2.3:7860")]), 403),
    "a user in the host": ("KnownHost", lambda app: ask(app, headers=[("host", "127.0.0.1:7860@evil.example")]), 403),
    "an empty host": ("KnownHost", lambda app: ask(app, headers=[("host", "")]), 403),
    "no host": ("KnownHost", lambda app: ask(app, headers=[]), 400),
    "two hosts": ("KnownHost", lambda app: ask(app, headers=[HOST, ("host", "evil.example")]), 400),
    "another site": ("OwnPages", lambda app: ask(app, headers=[HOST, ("origin", "https://evil.example")]), 403),
    "a sandboxed page": ("OwnPages", lambda app: ask(app, headers=[HOST, ("origin", "null")]), 403),
    "another port's page": ("OwnPages", lambda app: ask(app, headers=[HOST, ("origin", "http://127.0.0.1:80")]), 403),
    "a page at localhost": ("OwnPages", lambda app: ask(app, headers=[HOST, ("origin", "http://localhost:7860")]), 403),
    "two origins": (
        "OwnPages",
        lambda app: ask(app, headers=[HOST, ("origin", "http://127.0.0.1:7860"), ("origin", "http://evil.example")]),
        403,
    ),
    "another site's form": (
        "OwnPages",
        lambda app: ask(
            app, "POST", headers=[HOST, ("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate")], body=[b"{}"]
        ),
        403,
    ),
    "another site's picture": (
        "OwnPages",
        lambda app: ask(app, headers=[HOST, ("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "no-cors")]),
        403,
    ),
    "another port's frame": (
        "OwnPages",
        lambda app: ask(
            app,
            headers=[
                HOST,
                ("sec-fetch-site", "same-site"),
                ("sec-fetch-mode", "navigate"),
                ("sec-fetch-dest", "iframe"),
            ],
        ),
        403,
    ),
    "too many at once": ("FewAtOnce", at_once, 503),
    "a long body": ("BodyLimits", lambda app: ask(app, "POST", headers=[HOST, ("content-length", str(BIG + 1))]), 413),
    "a long body in pieces": ("BodyLimits", lambda app: ask(app, "POST", body=[b"a" * (1 << 18)] * 5), 413),
    "many long bodies": ("BodyLimits", uploads_at_once, 503),
    "a body that pauses": ("BodyLimits", lambda app: ask(app, "POST", body=[b"a", 0.2, b"b"]), 408),
    "a body that drips": ("BodyLimits", lambda app: ask(app, "POST", body=[b"a", 0.02] * 20), 408),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_by_its_rule_alone(name):
    rule, attack, status = ATTACKS[name]
    refused = attack(guarded())
    assert refused.status == status
    assert refused.json["error"]["message"]
    assert attack(guarded(without=rule)).status == 200


# With a token: the rule, the attack, the status.
BREAK_INS = {
    "no token": ("NeedsToken", lambda app: ask(app), 401),
    "another scheme": ("NeedsToken", lambda app: ask(app, headers=[HOST, ("authorization", f"Digest {TOKEN}")]), 401),
    "a wrong token": ("NeedsToken", lambda app: tried(app, 1), 401),
    "the token's beginning": ("NeedsToken", lambda app: tried(app, 1, TOKEN[:-1]), 401),
    "an empty token": ("NeedsToken", lambda app: tried(app, 1, ""), 401),
    "a cookie of one's own": (
        "NeedsToken",
        lambda app: ask(app, headers=[HOST, ("cookie", f"zimage_session=9999999999.{'0' * 64}")]),
        401,
    ),
    "the token as a cookie": (
        "NeedsToken",
        lambda app: ask(app, headers=[HOST, ("cookie", f"zimage_session={TOKEN}")]),
        401,
    ),
    "a path like a free one": ("NeedsToken", lambda app: ask(app, path="/healthy"), 401),
    "many tokens": ("FewTries", lambda app: tried(app, TRIES + 1), 429),
    "the right one after many": ("FewTries", lambda app: (tried(app, TRIES), tried(app, 1, TOKEN))[1], 429),
    "many sessions": ("FewTries", lambda app: tried(app, TRIES + 1, path="/api/session", method="POST"), 429),
}


@pytest.mark.parametrize("name", BREAK_INS)
def test_nobody_comes_in_without_the_token(name):
    rule, attack, status = BREAK_INS[name]
    refused = attack(guarded(token=TOKEN))
    assert refused.status == status
    assert ("www-authenticate" in refused.headers) == (status == 401)
    assert ("retry-after" in refused.headers) == (status == 429)
    through = attack(guarded(without=rule, token=TOKEN)).status
    assert through == (200 if rule == "NeedsToken" or name == "the right one after many" else 401)


def basic(password, user="anybody"):
    return ("Authorization", "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode())


@pytest.mark.parametrize(
    "header", [BEARER, ("Authorization", f"bearer  {TOKEN} "), basic(TOKEN), basic(TOKEN, "")], ids=str
)
def test_the_token_opens(header):
    assert ask(guarded(token=TOKEN), headers=[HOST, header]).status == 200


@pytest.mark.parametrize("path", ["/", "/page/main.js", "/health"])
def test_the_page_and_health_need_no_token(path):
    assert ask(guarded(token=TOKEN), path=path).status == 200


def test_a_cookie_opens_until_it_ends_or_the_token_changes():
    now = [1_000_000.0]
    door = Door(TOKEN, lambda: now[0])
    text = door.cookie(secure=False)
    pair = text.split(";")[0]
    assert TOKEN not in text
    assert "; HttpOnly; SameSite=Strict" in text
    assert "Secure" not in text
    assert "; Secure" in door.cookie(secure=True)
    assert door.opens(None, f"other=1; {pair}")
    assert not Door("another-token-of-mine", lambda: now[0]).opens(None, pair)
    later = re.sub(r"=(\d+)\.", lambda m: f"={int(m[1]) + 1}.", pair)
    assert not door.opens(None, later)
    now[0] += LASTS + 1
    assert not door.opens(None, pair)
    assert "Max-Age=0" in no_cookie()


@pytest.mark.parametrize("cookies", ["", "zimage_session", "zimage_session=", "zimage_session=²³.x", "=;;,\x00", "é=é"])
def test_damaged_cookies_open_nothing(cookies):
    assert not Door(TOKEN).opens(None, cookies)


@pytest.mark.parametrize("text", [None, "", "Bearer", "Basic", "Basic !", "Basic /w==", "Basic YQ==", "Token x"])
def test_damaged_authorization_opens_nothing(text):
    assert credential(text) in (None, "")
    assert not Door(TOKEN).opens(text, None)


def test_a_cookie_goes_on_where_tokens_have_to_wait():
    guard = Guard(ServeSettings(), Door(TOKEN))
    app_ = protected(app, guard)
    assert tried(app_, TRIES + 1).status == 429
    assert ask(app_, headers=[HOST, ("cookie", guard.door.cookie(False))]).status == 200
    assert ask(app_, headers=[HOST, BEARER], client="10.0.0.2").status == 200


def test_the_brake_lets_go_and_forgets():
    now = [0.0]
    brake = Brake(lambda: now[0])
    for _ in range(TRIES):
        assert brake.wait("::1") == 0
        brake.count("2001:db8::1")
        now[0] += 1
    assert brake.wait("2001:db8::ffff") == WINDOW - TRIES  # the same network
    assert brake.wait("2001:db8:0:1::1") == 0
    now[0] = WINDOW + 0.5
    assert brake.wait("2001:db8::1") == 0
    brake.count("2001:db8::1")
    assert 0 < brake.wait("2001:db8::1") < 1  # nine of them were less than a minute ago
    for i in range(10_001):
        brake.count(f"10.{i >> 16}.{i >> 8 & 255}.{i & 255}")
    assert brake.wait("2001:db8::1") == 0  # memory has an end


def test_scripts_are_not_told_of_a_password_window():
    script = ask(guarded(token=TOKEN), headers=[HOST, ("sec-fetch-mode", "cors"), ("sec-fetch-site", "same-origin")])
    assert script.headers["www-authenticate"] == 'Bearer realm="zimage"'
    assert "Basic" in ask(guarded(token=TOKEN)).headers["www-authenticate"]


OWN = "http://127.0.0.1:7860"
WELCOME = {
    "a program": [HOST],
    "our page": [HOST, ("origin", OWN), ("sec-fetch-site", "same-origin"), ("sec-fetch-mode", "cors")],
    "a typed address": [HOST, ("sec-fetch-site", "none"), ("sec-fetch-mode", "navigate")],
    "a link elsewhere": [
        HOST,
        ("sec-fetch-site", "cross-site"),
        ("sec-fetch-mode", "navigate"),
        ("sec-fetch-dest", "document"),
    ],
    "localhost": [("host", "localhost:7860"), ("origin", "http://localhost:7860")],
    "a name in capitals": [("host", "LocalHost:7860")],
    "a name with its dot": [("host", "localhost.:7860")],
    "no port": [("host", "127.0.0.1")],
    "IPv6": [("host", "[::1]:7860"), ("origin", "http://[0:0:0:0:0:0:0:1]:7860")],
    "a proxy's name": [("host", "draw.example.org"), ("origin", "https://draw.example.org")],
    "a proxy's name and port": [("host", "draw.example.org:8443"), ("origin", "https://draw.example.org:8443")],
    "a proxy that changes the host": [HOST, ("origin", "https://draw.example.org")],
    "a name at a port": [("host", "box.lan:8080"), ("origin", "http://box.lan:8080")],
}


@pytest.mark.parametrize("who", WELCOME)
def test_whoever_should_come_in_does(who):
    app = guarded(allow_host=["Draw.example.org", "box.lan:8080"])
    answer = ask(app, headers=WELCOME[who])
    assert answer.status == 200
    assert not any("access-control" in name for name in answer.headers)


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("draw.example.org.evil.example", None),
        ("evil.example", None),
        ("box.lan", None),
        ("box.lan:8081", None),
        ("[::1", None),
        ("[fe80::1%eth0]:7860", None),
        ("127.0.0.1:786O", None),
        ("127.0.0.1:7860 ", None),
        ("draw.example.org", "http://draw.example.org:8080"),
        ("draw.example.org", "https://draw.example.org.evil.example"),
        ("draw.example.org", "https://evil.example/draw.example.org"),
        ("draw.example.org", "https://draw.example.org@evil.example"),
        ("draw.example.org", "ftp://draw.example.org"),
        ("draw.example.org", ""),
    ],
)
def test_whoever_only_looks_like_it_does_not(host, origin):
    app = guarded(allow_host=["draw.example.org", "box.lan:8080"])
    assert ask(app, headers=[("host", host), *([] if origin is None else [("origin", origin)])]).status == 403


def test_on_all_addresses_every_address_is_its_own_and_no_name():
    hosts = Hosts("0.0.0.0")
    server = Place("172.17.0.2", 7860)
    assert hosts.includes("192.168.1.5:8000", server)
    assert hosts.includes("[2001:db8::1]", server)
    assert hosts.includes("localhost:7860", server)
    assert not hosts.includes("evil.example:7860", server)
    assert not Hosts("192.168.1.5").includes("192.168.1.6:7860", Place("192.168.1.5", 7860))
    assert Hosts("box.lan").includes("box.lan:7860", Place("192.168.1.5", 7860))
    assert Hosts("::1").includes("[::1]:7860", Place("::1", 7860))


@pytest.mark.parametrize("name", ["http://draw.example.org", "a b", "", "*.example.org", "[x]", "a:b", "a" * 300])
def test_a_name_to_allow_is_a_name(name):
    with pytest.raises(RequestError, match="allow_host") as caught:
        Guard(ServeSettings(allow_host=[name]))
    assert caught.value.fields == ("allow_host",)


def test_loopback_is_told_by_address():
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "::1", "localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.1.5", "localhost.evil.example", "", "::2"]))


@pytest.mark.parametrize(
    ("path", "headers"), [("/api/jobs", [HOST]), ("/api/jobs", []), ("/fault", [HOST]), ("/..", [HOST])]
)
def test_every_answer_tells_browsers_its_limits(path, headers):
    answer = ask(guarded(), path=path, headers=headers)
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:;")
    assert "frame-ancestors 'none'" in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cross-origin-resource-policy"] == "same-origin"
    assert answer.headers["cache-control"] == "no-store"
    bare = ask(guarded(without="SecurityHeaders"), path=path, headers=headers)
    assert not {name.decode() for name, _ in safety.SECURITY_HEADERS} & set(bare.headers)


def test_an_answer_may_say_itself_how_long_it_lasts():
    async def picture(scope, receive, send):
        headers = [(b"Cache-Control", b"private, max-age=9")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})

    headers = ask(protected(picture, Guard(ServeSettings()))).headers
    assert [value for name, value in headers.items() if name.lower() == "cache-control"] == ["private, max-age=9"]


def test_a_fault_of_the_program_is_an_answer_like_any_other(caplog):
    answer = ask(guarded(), path="/fault")
    assert answer.status == 500
    assert answer.json["error"]["message"].startswith("the server failed")
    assert b"secret" not in answer.body
    with pytest.raises(RuntimeError):
        ask(guarded(without="LastNet"), path="/fault")


@pytest.mark.parametrize("value", [b"a\r\nx: y", b"a\0", b" a", b"a ", b"\x7f"])
def test_a_header_that_cannot_be_sent_is_a_fault_with_an_answer(value):
    async def form(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-warning", value)]})
        await send({"type": "http.response.body"})

    answer = ask(protected(form, Guard(ServeSettings())))
    assert (answer.status, "x-warning" in answer.headers) == (500, False)


def test_websockets_are_closed():
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(guarded()({"type": "websocket"}, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


def test_health_is_answered_when_nothing_else_is():
    guard = Guard(ServeSettings(), most_requests=0)
    assert ask(protected(app, guard)).status == 503
    assert ask(protected(app, guard), path="/health").status == 200


def test_memory_for_bodies_is_given_back():
    app_ = guarded()
    for _ in range(3):
        assert uploads_at_once(app_).status == 503
    assert ask(app_, "POST", body=[b"a" * (BIG - 1)]).status == 200


def test_whoever_has_no_token_yet_sends_short_bodies():
    assert ask(guarded(token=TOKEN), "POST", "/api/session", body=[b"a" * 4096]).status == 401
    answer = ask(guarded(token=TOKEN), "POST", "/api/session", body=[b"a" * 4097])
    assert (answer.status, answer.json["error"]["message"]) == (413, "a request may have 4,096 bytes here")


def test_files_are_sent_whole(tmp_path):
    async def file(scope, receive, send):
        await FileResponse(path)(scope, receive, send)

    path = tmp_path / "a.txt"
    path.write_text("abc")
    rules = [rule for rule in RULES if rule.__name__ != "WholeAnswers"]
    headers = [HOST, ("range", "bytes=1-1")]
    for given, kept, body in ((RULES, [HOST], b"abc"), (RULES, headers, b"abc"), (rules, headers, b"b")):
        answer = asyncio.run(asked(protected(file, Guard(ServeSettings()), given), headers=kept))
        assert answer.body == body


def test_a_body_within_its_limits_arrives_whole():
    assert ask(guarded(), "POST", body=[b"a" * (1 << 18)] * 4).body == b"%d" % BIG
    slowly = [b"a" * 1024, 0.04] * 4  # each pause is short, and the body is fast enough for all of them
    assert ask(guarded(), "POST", body=slowly).body == b"4096"


def lines(caplog, app, path="/api/history?q=secret", **named):
    with caplog.at_level(logging.INFO, logger="zimage.access"):
        ask(app, path=path, **named)
    return [record.getMessage() for record in caplog.records if record.name == "zimage.access"]


def test_the_access_log_names_neither_query_nor_body(caplog):
    (line,) = lines(caplog, guarded(access_log=True), body=[b"secret"], method="POST")
    assert re.fullmatch(r"10\.0\.0\.1 POST /api/history 200 \d+ ms", line)
    caplog.clear()
    assert lines(caplog, guarded()) == []


def test_the_access_log_stays_one_line(caplog):
    (line,) = lines(caplog, guarded(access_log=True), path="/a\r\n10.0.0.9 GET /forged\x1b[2J" + "b" * 300)
    assert "\n" not in line
    assert "\x1b" not in line
    assert len(line) < 300


def test_prompts_are_logged_only_where_that_was_asked_for(caplog):
    async def form(scope, receive, send):
        access.note_prompts(["a cat\non fire"])
        await app(scope, receive, send)

    def line(**settings):
        caplog.clear()
        return lines(caplog, protected(form, Guard(ServeSettings(access_log=True, **settings))))[0]

    assert line(log_prompts=True).endswith(" ms 'a cat on fire'")
    assert "cat" not in line()


def test_every_answer_is_observed():
    seen = []
    guard = Guard(ServeSettings(), observe=lambda method, status, seconds: seen.append((method, status, seconds < 5)))
    ask(protected(app, guard))
    ask(protected(app, guard), headers=[])
    assert seen == [("GET", 200, True), ("GET", 400, True)]
