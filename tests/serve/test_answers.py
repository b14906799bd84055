"""Errors in the form that the clients of a path read."""

import asyncio
import json

import pytest

from zimage.errors import CheckpointError, RequestError
from zimage.serve.answers import error_body, error_headers, error_status, send_error
from zimage.serve.refusals import NoRoom, NotFound, TooMany


def test_each_form_has_its_own_body():
    assert error_body("/api/jobs", 422, "width 7 is too small", ("width",)) == {
        "error": {"message": "width 7 is too small", "fields": ["width"]}
    }
    assert error_body("/v1/images/generations", 400, "width 7 is too small", ("width", "height")) == {
        "error": {
            "message": "width 7 is too small",
            "type": "invalid_request_error",
            "param": "width",
            "code": None,
        }
    }
    assert error_body("/sdapi/v1/txt2img", 503, "stopping") == {"error": "Service Unavailable", "detail": "stopping"}


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (401, "authentication_error", "invalid_api_key"),
        (404, "not_found_error", "not_found"),
        (413, "invalid_request_error", "request_too_large"),
        (429, "rate_limit_error", "rate_limit_exceeded"),
        (500, "server_error", None),
        (507, "server_error", None),
    ],
)
def test_openai_clients_are_told_the_kind(status, kind, code):
    error = error_body("/v1/models", status, "no")["error"]
    assert (error["type"], error["code"], error["param"]) == (kind, code, None)


def test_other_forms_know_400_for_invalid_values():
    wrong = RequestError("no", fields=("width",))
    assert [error_status(path, wrong) for path in ("/api/jobs", "/v1/x", "/sdapi/v1/x")] == [422, 400, 400]
    assert [error_status("/v1/x", error) for error in (NotFound(), NoRoom(), CheckpointError())] == [404, 507, 500]


def test_whoever_may_try_again_is_told_when():
    assert error_headers(TooMany("full", retry_after=2.6)) == {"Retry-After": "3"}
    assert error_headers(TooMany("full", retry_after=0.1)) == {"Retry-After": "1"}
    assert error_headers(TooMany("full")) == error_headers(RequestError("no")) == {}


def test_text_from_outside_cannot_steer_a_log_or_break_the_body():
    assert error_body("/api", 400, "a\r\nb\x1b[2J")["error"]["message"] == "a b\\x1b[2J"
    sent = []

    async def send(message):
        sent.append(message)

    asyncio.run(send_error({"path": "/api", "method": "GET"}, send, 400, "\ud800 é", [(b"x", b"y")]))
    start, body = sent
    headers = dict(start["headers"])
    assert headers[b"x"] == b"y"
    assert int(headers[b"content-length"]) == len(body["body"])
    assert json.loads(body["body"])["error"]["message"].endswith("é")
