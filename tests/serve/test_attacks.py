"""Hostile requests to a real server: refused in words, in time, by the field, and without reaching any file of ours."""

import base64
import json
import struct
import time

import httpx
import pytest
from hostile import BOMBS, picture, tensors

JSON = {"Content-Type": "application/json"}
TWO = {"Content-Type": "multipart/form-data; boundary=x"}

PATHS = {
    "/api/images/..%2f..%2fetc%2fpasswd": 400,
    "/api/images/%2e%2e%2findex.sqlite": 400,
    "/api/images/..%5cindex.sqlite": 400,
    "/api/images/index.sqlite": 404,
    "/api/images/.hidden": 404,
    "/api/images/a%2fb": 404,
    "/api/history/%00": 400,
    "/api/history/%0d%0aX-Forged:%201": 400,
    "/api/jobs/%2e%2e": 400,
    "/api/jobs/%F0%9F%98%80/events": 404,
    "/page/..%2fapp.py": 400,
    "/page/app.py": 404,
    "/page/%2fetc%2fpasswd": 404,
    "/page/index.html%00.js": 400,
    "//etc/passwd": 404,
    "/docs": 404,
    "/redoc": 404,
    "/api/history?limit=-1": 422,
    "/api/history?limit=9999999999999999999999": 422,
    "/api/history?before=%FF": 422,
    "/api/history?q=%22*%28%29%27%3B--%25_": 200,
    "/api/jobs?state=nothing": 422,
}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_leads_nowhere_else(server, path):
    answer = server.http.get(path)
    assert answer.status_code == PATHS[path], answer.text
    assert "root:" not in answer.text
    assert "SQLite" not in answer.text
    assert "x-forged" not in answer.headers


# A body as text, the field that the refusal names, and its status.
BODIES = {
    "depth": ('{"prompt": ' + "[" * 10_000 + "]" * 10_000 + "}", None, 400),
    "digits": ('{"prompt": "a", "seed": ' + "9" * 100_000 + "}", None, 400),
    "more than 64 bits": ('{"prompt": "a", "seed": 99999999999999999999}', None, 400),
    "NaN": ('{"prompt": "a", "guidance": NaN}', None, 400),
    "infinity": ('{"prompt": "a", "guidance": 1e999}', None, 400),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', None, 400),
    "half a character": ('{"prompt": "\\ud800"}', None, 400),
    "very many values": ('{"prompt": [' + '"a",' * 200_000 + '"a"]}', None, 400),
    "no object": ("[1]", None, 422),
    "nothing": ("", None, 400),
    "a zero": ('{"prompt": "a\\u0000b"}', "prompt", 422),
    "a long prompt": (json.dumps({"prompt": "a " * 60_000}), "prompt", 422),
    "many tokens": (json.dumps({"prompt": "a " * 20_000}), "prompt", 422),
    "many tokens to avoid": (json.dumps({"prompt": "a", "guidance": 2, "negative": "a " * 20_000}), "prompt", 422),
    "many pictures": (json.dumps({"prompt": ["a"] * 1000}), "prompt", 422),
    "a huge picture": ('{"prompt": "a", "width": 4294967296}', "width", 422),
    "many steps": ('{"prompt": "a", "steps": 1000}', "steps", 422),
    "a path as a picture": ('{"prompt": "a", "image": "/etc/passwd"}', "image", 422),
    "an address as a picture": ('{"prompt": "a", "image": "http://169.254.169.254/"}', "image", 422),
    "a path as embeddings": ('{"embeddings": "/etc/passwd"}', "embeddings", 422),
    "a path as a LoRA": ('{"prompt": "a", "lora": ["../../x"]}', "lora", 422),
    "a LoRA that is not there": ('{"prompt": "a", "lora": ["x"]}', "lora", 422),
    "a path as a template": ('{"prompt": "a", "template": "/etc/passwd"}', "template", 422),
    "a path as a rewriter": ('{"prompt": "a", "rewriter": "../../x"}', "rewriter", 422),
    "another server to rewrite": ('{"prompt": "a", "rewriter_url": "http://evil.example"}', "rewriter_url", 422),
    "another model": ('{"prompt": "a", "model": "/etc"}', "model", 422),
    "a prototype": ('{"prompt": "a", "__proto__": {"steps": 1}}', "__proto__", 422),
    "no base64": ('{"prompt": "a", "image": "data:image/png;base64,!!!!"}', "image", 422),
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_is_refused_by_its_field(server, kind):
    body, field, status = BODIES[kind]
    start = time.monotonic()
    answer = server.http.post("/api/jobs", content=body, headers=JSON)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["fields"][:1] == ([field] if field else [])
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused(server, kind):
    asked = {"prompt": "a", "image": base64.b64encode(BOMBS[kind]).decode()}
    answer = server.http.post("/api/jobs", json=asked)
    assert answer.status_code in (413, 422)
    assert answer.json()["error"]["fields"] == ["image"]


def embeddings(shape, content, dtype="F32"):
    header = {"embeddings": {"dtype": dtype, "shape": shape, "data_offsets": [0, len(content)]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


EMBEDDINGS = {
    "NaN": embeddings([1, 64], struct.pack("<f", float("nan")) * 64),
    "another width": tensors(),
    "no tokens": embeddings([0, 128], b""),
    "three axes": embeddings([1, 1, 128], bytes(512)),
    "whole numbers": embeddings([1, 128], bytes(512), "I32"),
    "very many tokens": embeddings([5000, 128], bytes(5000 * 256), "BF16"),
    "a picture": picture(),
}


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_embeddings_are_a_fault_of_the_request(server, kind):
    files = {"request": (None, "{}"), "embeddings": ("../../x", EMBEDDINGS[kind])}
    answer = server.http.post("/api/jobs", files=files)
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["fields"] == ["embeddings"]
    assert str(server.folder) not in answer.text


PARTS = {
    "100,000 parts": (b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n' * 100_000 + b"--x--", 400),
    "a huge name": (b'--x\r\nContent-Disposition: form-data; name="' + b"a" * 10**6 + b'"\r\n\r\n\r\n--x--', 400),
    "a part twice": (b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n{}\r\n' * 2 + b"--x--", 422),
    "an unknown part": (b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\n{}\r\n--x--', 422),
    "no end": (b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n{}', 400),
}


@pytest.mark.parametrize("kind", PARTS)
def test_parts_that_are_hostile_are_refused(server, kind):
    body, status = PARTS[kind]
    assert server.http.post("/api/jobs", content=body, headers=TWO).status_code == status


def test_the_name_of_a_file_goes_nowhere(server):
    outside = {path.name for path in server.folder.parent.iterdir()}
    files = {"request": (None, '{"prompt": "a", "steps": 1}'), "image": ("../../stolen.png", picture())}
    job = server.http.post("/api/jobs", files=files).json()
    assert server.wait(job["id"])["state"] == "done"
    assert {path.name for path in server.folder.parent.iterdir()} == outside
    assert "stolen" not in json.dumps(server.http.get(f"/api/jobs/{job['id']}").json())


def test_other_types_of_bodies_are_refused(server):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"):
        answer = server.http.post("/api/jobs", content=b'{"prompt": "a"}', headers={"Content-Type": kind})
        assert answer.status_code == 415, kind


@pytest.mark.parametrize("origin", ["null", "https://evil.example", "http://localhost:3000"])
def test_pages_elsewhere_are_refused_on_every_path(server, origin):
    for path in server.http.get("/openapi.json").json()["paths"]:
        for method in ("GET", "POST", "DELETE", "OPTIONS"):
            answer = server.http.request(method, path, headers={"Origin": origin})
            assert answer.status_code == 403
            assert not any(name.startswith("access-control") for name in answer.headers)


def test_every_path_needs_the_token(new_server):
    token = "correct-horse-battery"
    server = new_server(environment={"ZIMAGE_TOKEN": token}).start()
    description = server.http.get("/openapi.json", headers={"Authorization": f"Bearer {token}"}).json()
    free = {"/health", "/api/session"}
    for path, operations in description["paths"].items():
        for method in operations:
            if path not in free:
                assert server.http.request(method, path.replace("{id}", "x")).status_code == 401, (method, path)
    assert server.http.get("/openapi.json").status_code == 401
    assert server.http.get("/").status_code == 200
    assert server.http.post("/api/session", json={"token": "no"}).status_code == 401
    begun = server.http.post("/api/session", json={"token": token})
    assert begun.status_code == 204
    assert "HttpOnly; SameSite=Strict" in begun.headers["set-cookie"]
    assert token not in begun.headers["set-cookie"]
    assert server.http.get("/api/jobs").status_code == 200  # by the cookie
    server.http.delete("/api/session")
    assert server.http.get("/api/jobs").status_code == 401


def test_fields_that_are_ignored_are_named_in_a_header_of_any_text(server):
    for name in ("", "é", "a\r\nSet-Cookie: x=y", "\x04", "a " * 500):
        answer = server.http.post("/sdapi/v1/options", json={"some": 1, name: 1})
        assert answer.status_code == 200, name
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("theirs", ["n_iter", "batch_size"])
def test_one_thing_under_two_names_is_a_fault_of_the_request(server, theirs):
    answer = server.http.post("/sdapi/v1/txt2img", json={"prompt": "a", "images": 1, theirs: 1})
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(f"{theirs}: images is set too")


def test_work_ends_with_its_client(server):
    """A rewriting of thousands of tokens is given up, and does not keep the next one waiting."""
    prompt = "a lighthouse at dusk, waves, warm light in the window"  # the demo writes no end to it
    asked = {"prompt": prompt, "max_tokens": 4096, "rewrite_seed": 0}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/api/rewrite", json=asked, timeout=0.5)
    assert server.http.post("/api/encode", json={"prompt": "a cat"}, timeout=10).status_code == 200
    assert server.http.post("/api/rewrite", json={**asked, "max_tokens": 4097}).status_code == 422


def test_the_server_is_as_it_was(server):
    health = server.http.get("/health").json()
    assert health["status"] == "ok"
    assert all(worker["restarts"] == 0 for worker in health["workers"])
    assert "Traceback" not in server.said()
