"""The description of the server: complete, and true of what it answers."""

import json

import pytest

METHODS = {"get", "post", "patch", "put", "delete"}


@pytest.fixture(scope="module")
def description(server):
    return server.http.get("/openapi.json").json()


@pytest.fixture(scope="module")
def operations(description):
    return {
        f"{method} {path}": operation
        for path, methods in description["paths"].items()
        for method, operation in methods.items()
        if method in METHODS
    }


def resolved(description, schema):
    title = schema.get("$ref", "").removeprefix("#/components/schemas/")
    return description["components"]["schemas"][title] if title else schema


def references(value):
    if isinstance(value, dict):
        found = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return found + [one for inner in value.values() for one in references(inner)]
    return [one for inner in value for one in references(inner)] if isinstance(value, list) else []


def test_every_operation_says_what_it_does_and_answers(operations):
    for name, operation in operations.items():
        assert operation.get("summary"), name
        assert " " in operation["summary"], f"{name}: a sentence, not a function's name"
        assert any(status.startswith("2") for status in operation["responses"]), name
        for status, answer in operation["responses"].items():
            assert answer["description"], (name, status)
            is_error = status >= "400"
            assert not is_error or answer["content"]["application/json"]["example"], (name, status)


def test_every_json_body_has_an_example_that_is_accepted(description, operations, server):
    """In one go: what the examples ask for is drawn."""
    tried = []
    for name, operation in operations.items():
        content = operation.get("requestBody", {}).get("content", {}).get("application/json")
        if content is None:
            continue
        schema = resolved(description, content["schema"])
        examples = [*schema.get("examples", []), *([schema["example"]] if "example" in schema else [])]
        assert examples, f"{name} has no example"
        method, _, path = name.partition(" ")
        if "{" in path or path in NEEDS_MORE:
            continue
        answer = server.http.request(method, path, json=examples[0])
        assert answer.status_code < 300, (name, answer.text)
        assert str(answer.status_code) in operation["responses"], name
        tried.append(path)
    assert {"/api/jobs", "/v1/images/generations", "/sdapi/v1/txt2img", "/sdapi/v1/img2img"} <= set(tried)


# Examples that hold for another server's state: a token, a deleted picture, hashes of another model's tokens.
NEEDS_MORE = {"/api/session", "/api/history/restore", "/api/captions", "/v1/hidden_states", "/api/rewrite"}
NEEDS_MORE |= {"/api/vl/extract", "/api/vl/generate"}  # of a server with a vision model


def test_everything_that_is_referred_to_is_there(description):
    known = description["components"]["schemas"]
    for reference in references(description):
        assert reference.removeprefix("#/components/schemas/") in known
    assert "HTTPValidationError" not in json.dumps(description), "our errors have forms of their own"


def test_errors_have_the_form_that_is_described(description, server):
    for path, title in {
        "/api/jobs": "Error",
        "/v1/images/edits": "OpenAIError",
        "/sdapi/v1/txt2img": "A1111Error",
    }.items():
        answer = server.http.post(path, content=b"[", headers={"Content-Type": "application/json"})
        assert answer.status_code in (400, 415)
        assert set(description["components"]["schemas"][title]["required"]) <= set(answer.json())


def test_every_declared_field_is_in_the_bodies(description):
    from zimage.serve.asking import NAMES

    for title in ("Drawing", "OpenAIGeneration", "OpenAIEdit"):
        assert set(NAMES) <= set(description["components"]["schemas"][title]["properties"]), title
