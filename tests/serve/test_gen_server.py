"""`gen --server`: what is sent, what is saved and said, and what happens when server, network or user break it off."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_server as fake
import pytest
from fake_server import CUT, ID, serving, usual
from fastapi.responses import JSONResponse, RedirectResponse, Response
from PIL import Image

from zimage.cli import following, main
from zimage.cli.following import followed, lines, messages
from zimage.errors import RemoteError
from zimage.pictures.files import read_metadata
from zimage.text import remote as calls

ROOT = Path(__file__).parent.parent.parent
TOKEN = "sesame-sesame-sesame"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(calls, "PAUSES", (0.01, 0.01))
    monkeypatch.setattr(following, "PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def gen(capsys):
    """Runs `gen --server` → status, standard output, standard error."""

    def call(server, *arguments):
        url = server if isinstance(server, str) else server.url
        status = main(["gen", *map(str, arguments), "--server", url])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


# ------------------------------------------------------------------ what is sent


def test_only_what_was_set_is_sent(gen, tmp_path):
    text = '[default]\nsteps = 3\nmodel = "elsewhere"\nlora = ["mine.safetensors"]\ncache_folder = "/x"\n'
    (tmp_path / "zimage.toml").write_text(text)
    with serving() as server:
        assert gen(server, "a cat", "--seed", 5, "--layer-weights=-2:0.5,-3:0.5", "--config", "zimage.toml")[0] == 0
    asked = server.submitted
    weights = {"-2": 0.5, "-3": 0.5}
    assert asked.request == {"prompt": "a cat", "steps": 3, "seed": 5, "layer_weights": weights, "images": 1}
    assert len(asked.headers["idempotency-key"]) >= 32
    assert "authorization" not in asked.headers


def test_loras_and_templates_go_by_name_and_rewriting_is_the_servers(gen, monkeypatch):
    monkeypatch.setenv("ZIMAGE_REWRITER_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("ZIMAGE_MODEL", "nowhere")
    with serving() as server:
        more = ["--rewrite", "rewrite-photo", "--max-tokens", 9, "--template", "photo-overcast"]
        assert gen(server, "a cat", "--lora", "style:0.8", "--lora", "ink", *more)[0] == 0
    assert server.submitted.request == {
        "prompt": "a cat",
        "images": 1,
        "template": "photo-overcast",
        "rewriter": "rewrite-photo",
        "max_tokens": 9,
        "lora": ["style:0.8", "ink"],
    }


def test_files_are_uploaded_under_their_names(gen, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "start.png")
    (tmp_path / "mask.bin").write_bytes(b"mask")
    with serving() as server:
        arguments = ["--image", tmp_path / "start.png", "--mask", "mask.bin", "--strength", 0.5]
        assert gen(server, "a cat", *arguments)[0] == 0
    asked = server.submitted
    assert asked.files == {"image": ("start.png", (tmp_path / "start.png").read_bytes()), "mask": ("mask.bin", b"mask")}
    assert asked.request == {"prompt": "a cat", "images": 1, "strength": 0.5}


def test_a_mask_that_lies_in_the_image_is_no_file(gen, tmp_path):
    Image.new("RGBA", (32, 32)).save(tmp_path / "start.png")
    (tmp_path / "alpha").write_bytes(b"of the same name")
    with serving() as server:
        assert gen(server, "a cat", "--image", "start.png", "--mask", "alpha", "--extend", "8,0,0,0")[0] == 0
    assert list(server.submitted.files) == ["image"]
    assert server.submitted.request == {"prompt": "a cat", "images": 1, "mask": "alpha", "extend": "8,0,0,0"}


def test_pictures_of_conditions_come_as_files_in_their_order(gen, tmp_path):
    for name in ("a", "b", "pose"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    references = ["--reference", "a.png:0.5", "--reference", "b.png"]
    with serving() as server:
        assert gen(server, "a cat", *references, "--control", "union:pose.png:0.9", "--seed", 5)[0] == 0
    asked = server.submitted
    assert asked.request == {
        "prompt": "a cat",
        "images": 1,
        "seed": 5,
        "reference": [{"alpha": 0.5}, {"alpha": 0.3}],
        "control": [{"model": "union", "scale": 0.9}],
    }
    assert asked.parts == [
        *(("reference", "a.png", b"a"), ("reference", "b.png", b"b")),
        ("control", "pose.png", b"pose"),
    ]


def test_the_token_goes_to_the_server_alone_and_is_never_shown(gen, monkeypatch):
    monkeypatch.setenv("ZIMAGE_TOKEN", f"{TOKEN}\n")
    with serving() as elsewhere, serving() as server:
        assert gen(server, "a cat")[0] == 0
        assert {one.headers["authorization"] for one in server.asked} == {f"Bearer {TOKEN}"}
        server.answers["POST /api/jobs"] = [RedirectResponse(f"{elsewhere.url}/api/jobs", 307)]
        status, _, err = gen(server, "a cat")
        assert (status, elsewhere.asked) == (1, [])
        assert "has moved (307); pass the url that it has moved to" in err
        said = JSONResponse({"error": {"message": f"wrong: {TOKEN}", "fields": []}}, 401)
        server.answers["POST /api/jobs"] = [said]
        status, _, err = gen(server, "a cat")
    assert (status, TOKEN in err) == (1, False)
    assert "refused the token (401); set ZIMAGE_TOKEN to the one that the server asks for" in err


REFUSED = {
    "--model x": "--model belongs to the server",
    "--device cpu": "--device belongs to the server",
    "--rewrite x --rewriter-url http://127.0.0.1:9": "--rewriter-url belongs to the server",
    "--save-state x": "--save-state belongs to the server",
    "--resume x": "--resume belongs to the server",
    "--steps 0": "steps 0 is too small",
    "--negative x --guidance 0": "negative: it has no effect at guidance 0",
    "--image nowhere.png": "image: nowhere.png is missing",
    "--image /dev/zero": "image: /dev/zero is a device; it should be a regular file",
    "-o nowhere/x.png": "the folder 'nowhere' does not exist",
    "-o {bad}.png": "its fields may be",
}


@pytest.mark.parametrize("options", REFUSED)
def test_what_is_wrong_here_asks_nobody(gen, options):
    with serving() as server:
        status, out, err = gen(server, "a cat", *options.split())
    assert (status, out, server.asked) == (2, "", [])
    assert REFUSED[options] in err
    assert err.count("\n") == 1


def test_without_a_prompt_nobody_is_asked(gen):
    with serving() as server:
        assert gen(server)[0] == 2
    assert server.asked == []


@pytest.mark.parametrize(
    "url", ["localhost", "ftp://x", "http://u:secret@h", "http://h/?x=1", "http://h:99999", "", "h i"]
)
def test_urls_that_cannot_be_used(gen, url):
    status, _, err = gen(url, "a cat")
    assert status == 2
    assert err.startswith("error: server: the url cannot be used; it should look like http://127.0.0.1:7860")
    assert "secret" not in err


def test_without_httpx_one_line_names_the_extra(gen, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "httpx", None)
    (tmp_path / "start.png").write_bytes(b"x")
    status, _, err = gen("http://127.0.0.1:9", "a cat", "--image", "start.png")
    assert (status, err.count("\n")) == (1, 1)
    assert "needs httpx, the extra `remote`" in err


def test_a_token_that_is_none_is_told_and_not_shown(gen, monkeypatch):
    monkeypatch.setenv("ZIMAGE_TOKEN", "sesame\tsesame")
    with serving() as server:
        status, _, err = gen(server, "a cat")
    assert (status, server.asked, "sesame" in err) == (2, [], False)
    assert err.startswith("error: ZIMAGE_TOKEN is empty or holds characters that no key has")


# ------------------------------------------------------------------ what is saved and said


def test_pictures_are_saved_as_they_come_bit_for_bit(gen, tmp_path):
    with serving() as server:
        status, out, err = gen(server, "a cat", "a dog", "-n", 2, "--each", "--seed", 3, "-o", "{prompt}-{index}.png")
    names = ["a-cat-1.png", "a-cat-2.png", "a-dog-3.png", "a-dog-4.png"]
    assert (status, out.split()) == (0, names)
    assert [(tmp_path / name).read_bytes() for name in names] == list(server.pictures.values())
    assert err.splitlines()[0] == f"64×32, 4 steps, guidance 0, shift 3, on {server.url}"
    assert err.splitlines()[-1].startswith("4 images in ")


def test_other_formats_carry_the_settings_too(gen, tmp_path):
    with serving() as server:
        assert gen(server, "a cat", "-o", "cat.webp", "-q")[:2] == (0, "cat.webp\n")
    image = server.job["images"][0]
    assert read_metadata(tmp_path / "cat.webp") == image["settings"]
    with Image.open(tmp_path / "cat.webp") as saved:
        assert (saved.format, saved.size) == ("WEBP", (64, 32))


def test_json_is_that_of_a_run_here(gen, tmp_path):
    with serving() as server:
        status, out, err = gen(server, "a cat", "--seed", 4, "--json")
    told = json.loads(out)
    assert (status, err) == (0, "")
    assert told["images"] == [{"path": "a-cat-4.png", **server.job["images"][0]["settings"]}]
    assert told["seconds"] > 0


@pytest.mark.parametrize(
    "wrong", [{"seeds": [1, 2, 3]}, {"rewritten": [{"original": "a", "rewriter": "rewrite-photo", "seed": 3}]}]
)
def test_lists_that_do_not_belong_together_are_a_fault_of_the_server(gen, wrong):
    def mixed(server):
        server.job |= wrong
        return [("job", dict(server.job)), server.end()]

    with serving(mixed) as server:
        status, out, err = gen(server, "a cat", "a dog", "--each")
    assert (status, out) == (1, "")
    assert "the server's answer cannot be used" in err


@pytest.mark.parametrize("wrong", [{"nag": "x"}, {"nag": None}, {"sampler": 3}, {"schedule": []}])
def test_a_jobs_sampling_that_is_none_is_a_fault_of_the_server(gen, wrong):
    def strange(server):
        server.job["request"] |= wrong
        return [("job", dict(server.job)), server.end()]

    with serving(strange) as server:
        status, out, err = gen(server, "a cat")
    assert (status, out) == (1, "")
    assert f"the server's answer cannot be used: the job's request.{next(iter(wrong))} should be" in err


def test_a_picture_of_no_noise_levels_is_a_fault_of_the_server(gen):
    def strange(server):
        event = ("image", server.draw(0))
        event[1]["image"]["settings"]["request"]["shift"] = None
        return [event, CUT]

    with serving(strange) as server:
        status, out, err = gen(server, "a cat", "-o", "cat.webp", "-q")
    assert (status, out) == (1, "")
    assert "the server's answer cannot be used: a picture has neither a shift nor sigmas" in err


def test_notes_and_rewritten_prompts_are_told_once(gen):
    def rewritten(server):
        server.job["notes"] = ["the demo draws simple scenes"]
        first = dict(server.job)
        server.job |= {"rewritten": [{"original": "a cat", "rewriter": "rewrite-photo", "seed": 3}]}
        server.job["request"] = {**server.job["request"], "prompt": "a fine cat"}
        return [("job", first), *usual(server)]

    with serving(rewritten) as server:
        _, _, err = gen(server, "a cat")
    assert err.count("the demo draws simple scenes") == 1
    assert err.count("rewritten (rewrite-photo, seed 3): a fine cat") == 1


def test_a_terminal_sees_the_queue_and_the_steps(gen, monkeypatch):
    shown = []
    monkeypatch.setattr("zimage.cli.terminal.is_terminal", lambda stream: stream is sys.stderr)
    monkeypatch.setattr("zimage.cli.terminal.show", shown.append)
    with serving() as server:
        assert gen(server, "a cat")[0] == 0
    bar = [line for line in shown if line.startswith("denoise")]
    assert shown[0] == "starting"
    assert "waiting: 1 job before it" in shown
    assert [line.rsplit(" ", 1)[1] for line in bar] == ["0/4", "1/4", "2/4", "3/4", "4/4"]


def test_from_takes_the_whole_request_and_says_what_has_changed(gen, tmp_path):
    record = {**fake.FACTS, "lora": [{"name": "style.safetensors", "scale": 0.5, "hash": "1"}], "dtype": "bf16"}
    record["request"] = {"prompt": "a cat", "seed": 9, "width": 64, "height": 32, "steps": 2, "guidance": 0.0}
    (tmp_path / "cat.png").write_bytes(fake.png(64, 32, record, 9))
    with serving() as server:
        status, _, err = gen(server, "--from", "cat.png", "--steps", 3)
    sent = server.submitted.request
    assert {name: sent[name] for name in ("prompt", "seed", "steps", "lora")} == {
        "prompt": "a cat", "seed": 9, "steps": 3, "lora": ["style.safetensors:0.5"],
    }  # fmt: skip
    assert sent["negative"] is sent["rewriter"] is None, "nothing of the server's defaults"
    assert status == 0
    assert "warning: dtype was bf16, now fp32: pixels may differ" in err
    assert "warning: lora was style.safetensors 0.5 1, now none: pixels may differ" in err


# ------------------------------------------------------------------ what goes wrong


def test_an_error_of_the_server_names_the_setting_and_its_place(gen, tmp_path):
    (tmp_path / "zimage.toml").write_text("[default]\nwidth = 1024\n")
    error = {"error": {"message": "width: a picture of 1024 px is too large; the limit is 64", "fields": ["width"]}}
    with serving() as server:
        server.answers["POST /api/jobs"] = [JSONResponse(error, 422)]
        status, _, err = gen(server, "a cat", "-q", "--config", "zimage.toml")
    assert (status, len(server.asked)) == (2, 1)
    told = "width: a picture of 1024 px is too large; the limit is 64 (from zimage.toml [default] line 2)"
    assert err == f"error: {told}\n"


@pytest.mark.parametrize(("status", "tries"), [(404, 1), (409, 1), (413, 1), (429, 3), (503, 3), (507, 3)])
def test_other_refusals_are_one_line_and_what_may_pass_is_tried_again(gen, status, tries):
    answer = {"error": {"message": "not now\x1b[31m", "fields": []}}
    with serving() as server:
        server.answers["POST /api/jobs"] = [JSONResponse(answer, status) for _ in range(3)]
        code, _, err = gen(server, "a cat", "-q")
    assert (code, len(server.asked)) == (1, tries)
    assert f"({status})" in err or f"status {status}" in err
    assert "not now" in err
    assert "\x1b" not in err
    assert err.count("\n") == 1


def test_a_submission_that_broke_is_repeated_under_the_same_key(gen):
    with serving() as server:
        server.answers["POST /api/jobs"] = [JSONResponse({}, 502)]
        assert gen(server, "a cat")[0] == 0
    assert len(server.of("POST", "/api/jobs")) == 2
    assert server.submitted.request["prompt"] == "a cat"


@pytest.mark.parametrize("fields", [["steps"], []])
def test_a_job_that_fails_is_an_error(gen, fields):
    def failing(server):
        return [("job", server.job), server.end("failed", error={"message": "out of memory", "fields": fields})]

    with serving(failing) as server:
        status, out, err = gen(server, "a cat", "-q")
    assert (status, out) == (2 if fields else 1, "")
    assert err.startswith("error: ")
    assert "out of memory" in err
    assert "may go on" not in err
    assert server.of("DELETE", f"/api/jobs/{ID}") == []


def test_a_job_that_somebody_else_cancels_is_an_error_and_its_pictures_stay(gen, tmp_path):
    def cancelled(server):
        return [("job", dict(server.job)), ("image", server.draw(0)), server.end("cancelled")]

    with serving(cancelled) as server:
        status, out, err = gen(server, "a cat", "-n", 2, "-q")
    assert (status, out) == (1, "a-cat-7.png\n")
    assert err.endswith(": the job was cancelled\n")


def test_pictures_that_were_deleted_there_are_missed(gen):
    def deleted(server):
        event = ("image", server.draw(0))
        server.job["images"].clear()
        return [("job", dict(server.job)), event, server.end()]

    with serving(deleted) as server:
        status, out, err = gen(server, "a cat", "-n", 2, "-q")
    assert (status, out) == (1, "a-cat-7.png\n")
    assert "1 of 2 pictures came; others were deleted there" in err


def test_a_stream_that_breaks_is_taken_up_where_it_broke(gen):
    def broken(server):
        return [("job", dict(server.job)), ("image", server.draw(0)), CUT]

    def rest(server):
        return [("image", server.draw(1)), server.end()]

    with serving(broken, rest) as server:
        status, out, _ = gen(server, "a cat", "-n", 2)
    assert (status, out.split()) == (0, ["a-cat-7.png", "a-cat-8.png"])
    streams = server.of("GET", f"/api/jobs/{ID}/events")
    assert [one.headers.get("last-event-id") for one in streams] == [None, "a-1"]
    assert len(server.of("GET", f"/api/images/{ID}-1")) == 1, "nothing twice"


def test_pictures_of_events_that_were_missed_are_found_in_the_job(gen):
    def later(server):
        server.draw(0), server.draw(1)
        return [("job", dict(server.job)), server.end()]

    with serving(lambda server: [CUT], later) as server:
        status, out, _ = gen(server, "a cat", "-n", 2)
    assert (status, out.split()) == (0, ["a-cat-7.png", "a-cat-8.png"])


def test_a_server_that_comes_back_is_waited_for(gen):
    broken, done, second = threading.Event(), threading.Event(), []

    def breaking(server):
        return [("job", dict(server.job)), broken.set, CUT]

    with contextlib.ExitStack() as stack:
        first = stack.enter_context(serving(breaking))

        def restart():
            broken.wait(100)
            stack.close()
            time.sleep(0.3)
            with serving(port=int(first.url.rpartition(":")[2]), job=first.job) as again:
                second.append(again)
                done.wait(100)

        thread = threading.Thread(target=restart)
        thread.start()
        status, out, err = gen(first.url, "a cat", "-q")
        done.set()
        thread.join()
    assert (status, out, err) == (0, "a-cat-7.png\n", "")
    assert second[0].of("POST", "/api/jobs") == []


def test_a_server_that_stays_away_ends_it_with_the_jobs_address(gen, monkeypatch):
    monkeypatch.setattr(following, "PATIENCE", 0.5)

    def leaving(server):
        server.answers[f"GET /api/jobs/{ID}/events"] = [JSONResponse({}, 502) for _ in range(10_000)]
        return [("job", dict(server.job)), CUT]

    with serving(leaving) as server:
        status, _, err = gen(server, "a cat", "-q")
    assert status == 1
    assert err.endswith(f"; the job may go on at {server.url}/api/jobs/{ID}\n")
    assert server.of("DELETE", f"/api/jobs/{ID}") == []


def test_a_picture_that_cannot_be_had_now_is_asked_for_again(gen):
    with serving() as server:
        server.answers[f"GET /api/images/{ID}-1"] = [Response(status_code=502) for _ in range(4)]
        assert gen(server, "a cat")[0] == 0


STRANGE = {
    "an id that leads elsewhere": ({"id": "../../health"}, "is not an id"),
    "no settings": ({"settings": None}, "settings should be a table"),
    "a prompt that is none": ({"settings": {"request": {"prompt": 3}}}, "cannot be used"),
    "a size that nothing has": ({"width": 1 << 40}, "sides of at most 16384 px"),
    "another size": ({"width": 16}, "not an intact PNG of 16 × 32 px"),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_server_that_says_strange_things_is_refused(gen, tmp_path, kind):
    changed, words = STRANGE[kind]

    def strange(server):
        image = {**server.draw(0)["image"], **changed}
        return [("image", {"image": image}), CUT]

    with serving(strange) as server:
        status, out, err = gen(server, "a cat", "-q")
    assert (status, out, list(tmp_path.iterdir())) == (1, "", [])
    assert words in err
    assert err.count("\n") == 1
    assert {one.path for one in server.asked} <= {"/api/jobs", f"/api/jobs/{ID}/events", f"/api/images/{ID}-1"}


@pytest.mark.parametrize("content", [b"", b"not a picture", "cut", "jpeg"])
def test_a_picture_that_is_none_is_not_saved(gen, tmp_path, content):
    stream = io.BytesIO()
    Image.new("RGB", (64, 32)).save(stream, "JPEG")

    def damaged(server):
        event = ("image", server.draw(0))
        whole = server.pictures[f"{ID}-1"]
        server.pictures[f"{ID}-1"] = {"cut": whole[:-9], "jpeg": stream.getvalue()}.get(content, content)
        return [event, CUT]

    with serving(damaged) as server:
        if content == b"":
            server.answers[f"GET /api/images/{ID}-1"] = [Response(b"", media_type="image/png")]
        status, out, err = gen(server, "a cat", "-q")
    assert (status, out, list(tmp_path.iterdir())) == (1, "", [])
    assert "not an intact PNG of 64 × 32 px" in err


@pytest.mark.parametrize("answer", [{}, {"id": 3}, [], "x", {"id": "a/b"}])
def test_what_is_no_server_of_ours_is_told(gen, answer):
    with serving() as server:
        server.answers["POST /api/jobs"] = [JSONResponse(answer, 202)]
        status, _, err = gen(server, "a cat", "-q")
    assert status == 1
    assert "answer" in err
    assert err.count("\n") == 1


# ------------------------------------------------------------------ interrupts


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_cancels_the_job(tmp_path, number, status):
    reached = threading.Event()

    def running(server):
        return [("job", dict(server.job)), ("image", server.draw(0)), reached.set, lambda: time.sleep(10), CUT]

    with serving(running) as server:
        process = start(tmp_path, "a cat", "-n", "2", "--server", server.url)
        assert reached.wait(20)
        while not list(tmp_path.glob("*.png")):
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
        assert server.of("DELETE", f"/api/jobs/{ID}")
    assert process.returncode == status
    last = err.splitlines()[-1]
    assert last == "error: interrupted; the job was cancelled on the server; 1 picture saved"
    assert [path.name for path in tmp_path.iterdir()] == ["a-cat-7.png"]


def test_a_disk_that_is_full_cancels_the_job(gen, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zimage.pictures.files.save", full)
    with serving() as server:
        status, _, err = gen(server, "a cat", "-q")
        assert server.of("DELETE", f"/api/jobs/{ID}")
    assert status == 1
    assert "cannot be written" in err


def start(folder, *arguments):
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "no_proxy": "127.0.0.1"}
    command = [sys.executable, ROOT / "cli.py", "gen", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, stderr=subprocess.PIPE)


def test_it_starts_quickly_and_without_torch(tmp_path):
    """In processor time, of the whole command: others may use the machine."""
    with serving() as server:
        process = start(tmp_path, "a cat", "-q", "--server", server.url)
        _, status, used = os.wait4(process.pid, 0)
        code = "import sys; from zimage.cli import main; main(sys.argv[1:]); print({*sys.modules} & {'torch', 'numpy'})"
        command = [sys.executable, "-c", code, "gen", "a cat", "-q", "--server", server.url]
        assert subprocess.check_output(command, cwd=tmp_path, text=True).endswith("set()\n")
    assert status == 0
    assert used.ru_utime + used.ru_stime <= 0.7  # 0.45; 0.3 s on the clock to the request, on an idle machine


# ------------------------------------------------------------------ the stream itself


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_read_however_they_are_cut(size):
    text = ': hello\r\n\r\nid: a-1\r\nevent: job\r\ndata: {"a":\r\ndata: "ä"}\r\n\r\n'
    text += "data:x\nretry: 3\n\nid: a-2\n\ndata: y"
    whole = text.encode()
    found = list(messages(lines(whole[i : i + size] for i in range(0, len(whole), size))))
    assert [(m.id, m.event, m.data) for m in found] == [("a-1", "job", '{"a":\n"ä"}'), ("a-1", "message", "x")]


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 70_000, b"data: " + b"x" * 60_000 + b"\n"])
def test_an_event_without_an_end_is_refused(piece):
    forever = iter(lambda: piece, None)
    with pytest.raises(RemoteError, match="an event of more than"):
        list(messages(lines(forever)))


def test_data_that_is_not_json_is_refused_at_once():
    opened = []
    with pytest.raises(RemoteError, match="is not JSON"):
        list(followed(lambda place: opened.append(place) or [b"data: {\n\n"]))
    assert opened == [""]
