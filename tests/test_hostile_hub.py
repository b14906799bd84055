"""`zimage weights fetch` from a hub that lies, drips, floods or asks for a login, and into folders that hold traps."""

import contextlib
import json
import os
import random
import re
import resource
import signal
import time

import pytest
from chat_server import DRIPS, dripping
from hub_server import FakeHub, repository_of, serving

from zimage import interrupts
from zimage.cli import main
from zimage.errors import CheckpointError, FetchError, RequestError
from zimage.weights import hub as hubs
from zimage.weights.fetch import fetch

pytest.importorskip("huggingface_hub")

DIT = "transformer/diffusion_pytorch_model.safetensors"
CONFIG = "vae/config.json"


@pytest.fixture
def hub(tiny_folder):
    with serving(FakeHub("Tongyi-MAI/Z-Image-Turbo", repository_of(tiny_folder))) as hub:
        yield hub


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    """The current folder, beside which a file lies that must stay as it is."""
    monkeypatch.setattr(hubs, "PAUSES", (0.0,) * 5)
    (tmp_path / "here").mkdir()
    (tmp_path / "victim.json").write_bytes(b"mine")
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "here"
    assert (tmp_path / "victim.json").read_bytes() == b"mine"
    assert {path.name for path in tmp_path.iterdir()} == {"here", "victim.json"}


def failure(capsys, url, *arguments, model="turbo", status=1):
    assert main(["weights", "fetch", model, "--to", "model", "--endpoint", url, *arguments]) == status
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert err.rstrip("\n").isprintable()
    assert len(err) < 2100
    return err


def of(path, **words):
    """A change of what the listing says of a file."""

    def tamper(info):
        (sibling,) = (each for each in info["siblings"] if each["rfilename"] == path)
        sibling.update(words)
        return info

    return tamper


def lfs(**words):
    return of(DIT, lfs={"size": 2, "sha256": "0" * 64, **words})


def named(*paths):
    """A listing with more files, each of two bytes."""
    return lambda info: info | {"siblings": info["siblings"] + [{"rfilename": path, "size": 2} for path in paths]}


LISTINGS = {
    "a hash that is a path": (of(CONFIG, blobId="/../../../victim"), "the blobId of vae/config.json"),
    "a hash too short": (of(CONFIG, blobId="0" * 39), "the blobId of"),
    "a hash that is a number": (of(CONFIG, blobId=7), "the blobId of"),
    "a sha256 that is a path": (lfs(sha256="/../../../victim"), "the sha256 of"),
    "a sha256 in capitals": (lfs(sha256="A" * 64), "the sha256 of"),
    "a sha256 that steers": (lfs(sha256="\x1b]0;owned\x07" * 9), "the sha256 of"),
    "a sha256 that is a list": (lfs(sha256=["0" * 64]), "the sha256 of"),
    "no size": (of(CONFIG, size=None), "states no size for vae/config.json"),
    "no size of a large file": (lfs(size=None), "states no size"),
    "a negative size": (of(CONFIG, size=-1), "the size of vae/config.json as '-1'"),
    "a size of text": (of(CONFIG, size="2"), "the size of"),
    "a size that is true": (of(CONFIG, size=True), "the size of"),
    "a size with a fraction": (of(CONFIG, size=1.5), "the size of"),
    "a size beyond all disks": (lfs(size=10**18), "the size of"),
    "a size of 400 digits": (of(CONFIG, size=10**400), "more than 64 bits"),
    "a large file that is a list": (of(DIT, lfs=[1]), "not one that a hub lists"),
    "a commit that is a branch": (lambda info: info | {"sha": "main"}, "it names no commit"),
    "a commit that is a path": (lambda info: info | {"sha": "../../" + "0" * 34}, "it names no commit"),
    "no commit": (lambda info: info | {"sha": None}, "it names no commit"),
    "no files": (lambda info: info | {"siblings": None}, "it lists no files"),
    "files that are numbers": (lambda info: info | {"siblings": [1]}, "it lists no files"),
    "files by name": (lambda info: info | {"siblings": {"a": {}}}, "it lists no files"),
    "a file twice": (named(CONFIG), "two files of one name"),
    "a file twice where case does not count": (named("vae/Config.json"), "two files of one name"),
    "too many files": (named(*(f"vae/{i}.json" for i in range(1001))), "at most 1,000"),
    "a list": (lambda info: [info], "should hold a JSON object"),
    "a page": (lambda info: b"<html>\x1b[31mhello</html>", "is not JSON"),
    "half of one": (lambda info: json.dumps(info).encode()[:-9], "is not JSON"),
    "nothing": (lambda info: b"", "is not JSON"),
    "nested": (lambda info: b"[" * 100_000, "nested more than"),
    "9 MB": (lambda info: b" " * (9 << 20) + json.dumps(info).encode(), "more than 8 MB"),
    "cards of other kinds": (
        lambda info: info | {"cardData": 7, "createdAt": [], "siblings": []},
        "has no text_encoder",
    ),
}


@pytest.mark.parametrize("kind", LISTINGS)
def test_every_word_of_a_listing_is_checked(hub, capsys, place, kind):
    hub.tamper, words = LISTINGS[kind]
    assert words in failure(capsys, hub.url)
    assert list(place.iterdir()) == []
    assert hub.transfers() == []


NAMES = [
    *("../evil.json", "/etc/evil.json", "vae/../../victim.json", "vae\\..\\evil.json", "C:/evil.json", "vae//x.json"),
    *(
        "vae/\x1b[31m.json",
        "vae/a/b.json",
        "vae/" + "x" * 5000 + ".json",
        "vae/.hidden.json",
        "vae/ä.json",
        "vae/x.json\n",
    ),
    *("vae/x.bin", ".zimage-manifest.json", "", None, 7, ["vae/x.json"]),
]


def test_files_of_other_names_are_passed_over(hub, place):
    hub.tamper = named(*NAMES)
    expected = {name for name in hub.files if re.fullmatch(r"(\w+/)?[\w.-]+\.(json|safetensors|txt|jinja)", name)}
    assert {file.path for file in fetch(hub.repository, place / "model", endpoint=hub.url)} == expected
    files = {str(path.relative_to(place / "model")) for path in place.rglob("*") if path.is_file()}
    assert files == expected | {".zimage-manifest.json"}


def test_no_more_is_written_than_was_announced(hub, capsys, place):
    hub.extra = bytes(20 << 20)
    assert "the hub sends more than the " in failure(capsys, hub.url)
    assert sum(path.stat().st_size for path in place.rglob("*") if path.is_file()) < 1 << 20
    assert list((place / "model" / ".zimage-partial").iterdir()) == []


@pytest.mark.parametrize(("room", "file"), [(0, r"\.zimage-partial/\S+"), (100, r"\.zimage-manifest\.json")])
def test_a_full_disk_is_named(hub, capsys, place, room, file):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limit[1]))
    try:
        err = failure(capsys, hub.url)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert re.fullmatch(rf"error: model/{file}: File too large\n", err), err


def test_a_hub_that_starts_anew_for_ever_is_left(hub, capsys):
    """Each answer has half of the file, and the hub heeds no range."""
    hub.ranges, content = False, hub.files[DIT]
    hub.files[DIT] = content[: len(content) // 2]
    hub.tamper = of(DIT, lfs={"size": len(content), "sha256": "0" * 64})
    assert main(["weights", "fetch", "turbo", "--to", "model", "--endpoint", hub.url, "-q"]) == 1
    assert "it broke off after" in capsys.readouterr().err
    assert hub.transfers().count(DIT) < 10


# Links and pipes in the folder ----------------------------------------------------------------------------------------


def partial_of(place, hub):
    """Where the first file's bytes arrive."""
    hub.break_after[CONFIG] = 1
    with contextlib.suppress(FetchError):
        list(fetch(hub.repository, place / "model", endpoint=hub.url))
    hub.status.clear()
    (partial,) = (place / "model" / ".zimage-partial").glob("vae--*")
    return partial


def link(path, to):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


TRAPS = {
    "a component's folder": lambda model, outside: link(model / "vae", outside),
    "a folder that is not there": lambda model, outside: link(model / "vae", outside / "nowhere"),
    "a file": lambda model, outside: link(model / CONFIG, outside / "victim.json"),
    "the record": lambda model, outside: link(model / ".zimage-manifest.json", outside / "victim.json"),
    "the partial files": lambda model, outside: link(model / ".zimage-partial", outside),
    "a link to a link": lambda model, outside: (link(model / "a", outside), link(model / "vae", model / "a")),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_links_that_lead_outside_are_refused(hub, capsys, place, trap):
    TRAPS[trap](place / "model", place.parent)
    assert "leads out of model by a link" in failure(capsys, hub.url)
    assert hub.transfers() == []


@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_nothing_is_appended_to_a_file_of_another_name(hub, capsys, place, make):
    partial = partial_of(place, hub)
    partial.unlink()
    (place / "mine.json").write_bytes(b"m")
    make(place / "mine.json", partial)
    failure(capsys, hub.url)
    assert (place / "mine.json").read_bytes() == b"m"


def test_a_pipe_among_the_partial_files_is_not_waited_for(hub, capsys, place):
    partial = partial_of(place, hub)
    partial.unlink()
    os.mkfifo(partial)
    assert "is not a file that a fetch left there" in failure(capsys, hub.url)


def test_links_within_the_folder_are_followed(hub, place):
    (place / "model" / "store").mkdir(parents=True)
    (place / "model" / "vae").symlink_to(place / "model" / "store")
    list(fetch(hub.repository, place / "model", endpoint=hub.url))
    assert (place / "model" / "store" / "config.json").read_bytes() == hub.files[CONFIG]


# Logins ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "configured", "knows"),
    [
        ("https://huggingface.co", "https://huggingface.co", True),
        ("https://huggingface.co:443", "https://mirror.example", True),
        ("https://mirror.example", "https://mirror.example", True),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000", True),
        ("http://localhost:8000", "http://localhost:8000", True),
        ("https://mirror.example", "https://huggingface.co", False),
        ("http://huggingface.co", "https://huggingface.co", False),
        ("http://mirror.example", "http://mirror.example", False),
        ("https://mirror.example:8443", "https://mirror.example", False),
        ("https://huggingface.co.evil.example", "https://huggingface.co", False),
        ("http://127.0.0.1:8000", "https://huggingface.co", False),
        ("http://127.0.0.1.evil.example", "http://127.0.0.1.evil.example", False),
    ],
)
def test_a_login_is_told_where_the_user_set_it_up(monkeypatch, endpoint, configured, knows):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", configured)
    with contextlib.closing(hubs.Hub("a/b", endpoint)) as hub:
        assert hub.knows_login is knows
        assert ("hf_secret" in str(hub._headers)) is knows


def test_another_endpoint_is_not_told_the_login(hub, monkeypatch, capsys, place):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    list(fetch(hub.repository, place / "model", endpoint=hub.url))
    assert {told for _, told in hub.told} == {None}
    hub.repository = "someone/else"
    assert f"set HF_ENDPOINT={hub.url}" in failure(capsys, hub.url)


@pytest.mark.parametrize("endpoint", ["https://hub.example", "HTTPS://hub.example"])
def test_nothing_is_fetched_without_encryption_from_a_hub_that_has_it(endpoint):
    httpx = pytest.importorskip("httpx2")
    asked = []

    def answer(request):
        asked.append(str(request.url))
        return httpx.Response(302, headers={"Location": "http://hub.example/x"})

    hub = hubs.Hub("a/b", endpoint)
    hub._client = httpx.Client(transport=httpx.MockTransport(answer))
    with pytest.raises(FetchError, match="without encryption"):
        hub.listing(None)
    assert len(asked) == 1


LOCATIONS = [
    *("http://[", "//\x80:x", "http://h:99999/", "x" * 99_000, "\x1b[31mred", "", "ftp://x/y", "http://h..x/", "?"),
    *(
        "http://%zz/",
        "http://xn--/",
        "file:///etc/passwd",
        "http://" + "a" * 70,
        "http:///x",
        "\u202e",
        "http://me:pw@[::1",
    ),
]


@pytest.mark.parametrize("location", LOCATIONS)
def test_a_location_that_is_none_is_one_line(location):
    httpx = pytest.importorskip("httpx2")
    headers = {"Location": location.encode()}
    hub = hubs.Hub("a/b", "http://127.0.0.1:9")
    hub._client = httpx.Client(transport=httpx.MockTransport(lambda request: httpx.Response(302, headers=headers)))
    with pytest.raises(FetchError) as error:
        hub.listing(None)
    assert str(error.value).isprintable()


# Time -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drip", DRIPS)
def test_a_listing_comes_in_time(monkeypatch, capsys, drip):
    monkeypatch.setattr(hubs, "LISTING_TIME", 0.4)
    with dripping(*DRIPS[drip]) as address:
        start = time.monotonic()
        failure(capsys, f"{'https' if drip.startswith('TLS') else 'http'}://{address}")
        assert time.monotonic() - start < 1.5


def test_a_transfer_that_drips_is_given_up(hub, monkeypatch, capsys, place):
    monkeypatch.setattr(hubs, "PATIENCE", 0.3)
    monkeypatch.setattr(hubs, "LEAST", 10**9)
    hub.stall_after[DIT] = 20_000
    start = time.monotonic()
    assert main(["weights", "fetch", "turbo", "--to", "model", "--endpoint", hub.url, "-q"]) == 1
    assert time.monotonic() - start < 5
    assert "sent too little for too long for " + DIT in capsys.readouterr().err


def test_an_interrupt_at_any_moment_ends_the_transfer(hub, place):
    hub.stall_after[DIT] = 200_000
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    moments = random.Random(5)
    try:
        for _ in range(30):
            moment, start = moments.uniform(0.001, 0.15), time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                _interrupted_fetch(hub, place / "model", moment)
            assert time.monotonic() - start < moment + 2
            for partial in (place / "model").glob(".zimage-partial/*diffusion*"):
                assert hub.files[DIT].startswith(partial.read_bytes())
    finally:
        signal.signal(signal.SIGALRM, handler)
    hub.stall_after.clear()
    list(fetch(hub.repository, place / "model", endpoint=hub.url))
    assert (place / "model" / DIT).read_bytes() == hub.files[DIT]


def _interrupted_fetch(hub, folder, moment):
    signal.setitimer(signal.ITIMER_REAL, moment)
    list(fetch(hub.repository, folder, endpoint=hub.url))


def test_an_interrupt_that_python_drops_is_raised_again():
    class Dropping:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    def work():
        with interrupts.handled(), interrupts.telling("nothing was done"):
            Dropping()
            time.sleep(2)

    with pytest.raises(interrupts.Interrupt) as raised:
        work()
    assert raised.value.args == ("nothing was done",)


# Names ----------------------------------------------------------------------------------------------------------------


def test_any_repository_in_the_layout_is_fetched(hub, place, capsys):
    hub.repository = "some-one/My.Z_Image"
    assert main(["weights", "fetch", hub.repository, "--endpoint", hub.url, "-q"]) == 0, capsys.readouterr().err
    assert (place / "My.Z_Image" / DIT).read_bytes() == hub.files[DIT]


@pytest.mark.parametrize(
    "name",
    [
        "Turbo",
        "a/b/c",
        "../x",
        "a/..",
        "a/b..c",
        "/etc",
        "a/",
        "https://x/y",
        "a/\x1b[31m",
        "ä/b",
        "",
        "a/" + "b" * 200,
    ],
)
def test_a_name_that_is_no_repository(name, capsys):
    assert "write turbo, base or OWNER/NAME" in failure(capsys, "http://127.0.0.1:9", model=name, status=2)
    with pytest.raises(RequestError):
        hubs.check_repository(name)


# Records --------------------------------------------------------------------------------------------------------------

ENTRY = {"size": 4, "sha256": "0" * 64}
RECORDS = {
    "a path that leads up": {"../../victim.json": ENTRY},
    "an absolute path": {"/etc/passwd": ENTRY},
    "a path in the folder that leads up": {"vae/../../victim.json": ENTRY},
    "a name no render needs": {"notes.txt": ENTRY},
    "a size of text": {CONFIG: {**ENTRY, "size": "4"}},
    "a negative size": {CONFIG: {**ENTRY, "size": -4}},
    "a size that is true": {CONFIG: {**ENTRY, "size": True}},
    "no size": {CONFIG: {"sha256": "0" * 64}},
    "a hash that steers": {CONFIG: {**ENTRY, "sha256": "\x1b[31m"}},
    "a hash that is a number": {CONFIG: {**ENTRY, "sha256": 7}},
    "an entry that is a list": {CONFIG: [4]},
    "files that are a list": [CONFIG],
}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_record_that_no_fetch_wrote_is_refused(place, kind):
    from zimage.weights.manifest import read_record

    record = {"repository": "a/b", "revision": "main", "files": RECORDS[kind]}
    (place / ".zimage-manifest.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="remove it and fetch again"):
        read_record(place)
