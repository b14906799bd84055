"""The history over HTTP, against the schemas that the description has for it."""

import asyncio
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from histories import draw, fill, history, ids

from zimage.serve.forms import history as form
from zimage.serve.openapi import describe


class Told:
    """What other clients hear."""

    def __init__(self):
        self.events = []

    def tell(self, job, event, data):
        self.events.append((job, event, data))


@pytest.fixture
def service(tmp_path):
    kept = history(tmp_path)
    yield SimpleNamespace(history=kept, streams=Told())
    kept.database.close()


@pytest.fixture
def app(service):
    app = FastAPI()
    app.include_router(form.routes(service))
    describe(app, form.SCHEMAS)
    return app


@pytest.fixture
def client(app):
    with TestClient(app) as client:
        yield client


def test_pages_are_what_the_history_has(service, client):
    made = fill(service.history, 5)
    first = client.get("/api/history", params={"limit": 3}).json()
    assert [image["id"] for image in first["images"]] == made[:3]
    assert first["images"][0] == service.history.get(made[0]).plain()
    second = client.get("/api/history", params={"limit": 3, "before": first["next"]}).json()
    assert [image["id"] for image in second["images"]] == made[3:]
    assert (first["total"], second["next"]) == (5, None)


def test_a_search_is_one_of_words(service, client):
    fill(service.history, 3)
    found = client.get("/api/history", params={"q": "NUMBER 1", "before": ""}).json()
    assert [image["prompt"] for image in found["images"]] == ["picture number 1"]
    assert found["total"] == 1


AT_FAULT = {"limit=0": "limit", "limit=201": "limit", "limit=x": "limit", "before=x": "before", "q=" + "a+" * 33: "q"}


@pytest.mark.parametrize(("query", "field"), AT_FAULT.items())
def test_values_that_are_none_are_named(client, query, field):
    answer = client.get(f"/api/history?{query}")
    assert answer.status_code == 422
    assert answer.json()["error"]["fields"] == [field]


def test_a_picture_comes_as_its_file(service, client):
    (made,) = fill(service.history, 1)
    answer = client.get(f"/api/images/{made}")
    assert answer.content == service.history.file(made).read_bytes()
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert answer.headers["content-disposition"] == f'inline; filename="{made}.png"'
    assert answer.headers["cache-control"].startswith("private")
    assert client.get(f"/api/history/{made}").json() == service.history.get(made).plain()


@pytest.mark.parametrize("what", ["", "/thumbnail"])
def test_what_a_client_has_is_not_sent_again(service, client, what):
    (made,) = fill(service.history, 1)
    url = f"/api/images/{made}{what}"
    tag = client.get(url).headers["etag"]
    for known in (tag, f'"x", W/{tag}', "*"):
        answer = client.get(url, headers={"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    draw(service.history.files.path(made), seed=200, size=(64, 48), created=2e9)
    again = client.get(url, headers={"If-None-Match": tag})
    assert again.status_code == 200
    assert again.headers["etag"] != tag


def test_a_thumbnail_is_webp(service, client):
    (made,) = fill(service.history, 1)
    answer = client.get(f"/api/images/{made}/thumbnail")
    assert answer.headers["content-type"] == "image/webp"
    assert answer.content[8:12] == b"WEBP"


@pytest.mark.parametrize("url", ["/api/history/{}", "/api/images/{}"])
def test_a_picture_is_deleted_and_brought_back(service, client, url):
    made = fill(service.history, 2)
    answer = client.delete(url.format(made[0]))
    assert answer.json() == {"deleted": [made[0]], "undo_seconds": 600}
    assert client.delete(url.format(made[0])).status_code == 404
    for gone in ("/api/history/{}", "/api/images/{}", "/api/images/{}/thumbnail"):
        assert client.get(gone.format(made[0])).status_code == 404
    assert client.post("/api/history/restore", json={"ids": [made[0], "unknown"]}).json() == {"restored": [made[0]]}
    assert client.post("/api/history/restore", json={"ids": [made[0]]}).json() == {"restored": []}
    assert ids(service.history.page()) == made
    assert service.streams.events == [
        ("", "history", {"deleted": [made[0]]}),
        ("", "history", {"restored": [made[0]]}),
    ]


def test_everything_is_deleted_and_brought_back(service, client):
    made = fill(service.history, 4)
    deleted = client.delete("/api/history").json()["deleted"]
    assert sorted(deleted) == sorted(made)
    assert client.get("/api/history").json() == {"images": [], "next": None, "total": 0}
    assert len(client.post("/api/history/restore", json={"ids": deleted}).json()["restored"]) == 4
    assert ids(service.history.page()) == made


@pytest.mark.parametrize("body", [{}, {"ids": "x"}, {"ids": [1]}, {"ids": None}, {"ids": [], "more": 1}])
def test_ids_to_restore_are_a_list_of_texts(client, body):
    answer = client.post("/api/history/restore", json=body)
    assert (answer.status_code, answer.json()["error"]["fields"]) == (422, ["ids"])


OUTSIDE = ["..%2Findex.sqlite", "%2e%2e", "..", ".x", "%2Fetc%2Fpasswd", "a%00", "%ff", "%ED%A0%80", "x" * 200, "a%0Ab"]


@pytest.mark.parametrize("id", OUTSIDE)
@pytest.mark.parametrize("url", ["/api/history/{}", "/api/images/{}", "/api/images/{}/thumbnail"])
def test_no_address_leads_outside(service, client, url, id):
    draw(service.history.files.pictures.parent / "x.png")
    assert client.get(url.format(id)).status_code == 404
    assert client.delete(url.format(id)).status_code in (404, 405)


def test_a_picture_that_goes_while_it_is_sent_comes_whole(service, client):
    (made,) = fill(service.history, 1)
    whole = service.history.file(made).read_bytes()
    with service.history.open(made) as file:
        service.history.delete([made])
        service.history.files.purge(made)
        assert b"".join(form.pieces(file)) == whole
    service.history.files.pictures.joinpath(f"{made}.png").unlink(missing_ok=True)
    assert client.get(f"/api/images/{made}").status_code == 404


def test_a_picture_that_somebody_took_away_is_not_found(service, client):
    (made,) = fill(service.history, 1)
    service.history.file(made).unlink()
    assert client.get(f"/api/images/{made}").status_code == 404
    assert client.get(f"/api/images/{made}/thumbnail").status_code == 404


def test_few_thumbnails_are_made_at_once(service, monkeypatch):
    """A large picture takes much memory, and threads are for others too."""
    at_work, most = 0, 0

    def slowly(id):
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        import time

        time.sleep(0.01)
        at_work -= 1
        return b"webp"

    monkeypatch.setattr(service.history, "thumbnail", slowly)
    (route,) = [r for r in form.routes(service).routes if r.path.endswith("/thumbnail")]

    async def many():
        await asyncio.gather(*(route.endpoint("x", SimpleNamespace(headers={})) for _ in range(10)))

    asyncio.run(many())
    assert most == form.DRAWN


def test_every_operation_is_described(app):
    description = app.openapi()
    schemas = description["components"]["schemas"]
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            assert operation["summary"], (method, path)
            ((kind, media),) = operation["responses"]["200"]["content"].items()
            assert kind in ("image/png", "image/webp") or "example" in media
            assert all("422" in operation["responses"] for p in operation.get("parameters", []) if p["in"] == "query")
    assert {"HistoryPage", "Deleted", "Restored", "Restoring", "Image"} <= schemas.keys()
