"""Figures in Prometheus' text form, read by a strict parser of its grammar."""

import re
from types import SimpleNamespace

import pytest

from zimage.serve.metrics import BUCKETS, MEDIA_TYPE, Histogram, Metrics, family, sample

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^\\"\n]|\\[\\n"])*)"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? ([^ ]+)")
ENDINGS = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
ESCAPES = {r"\\": "\\", r"\n": "\n", r"\"": '"'}


def parsed(text):
    """{family: (kind, {(name, labels): value})}; raises for everything that the format does not allow."""
    families, current = {}, None
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            current = line.split(" ")[2]
            assert re.fullmatch(NAME, current)
            assert current not in families
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == current
            families[name] = (kind, {})
        else:
            parts = SAMPLE.fullmatch(line)
            assert parts, line
            kind, samples = families[current]
            assert parts[1].removeprefix(current) in ENDINGS[kind]
            assert kind != "counter" or current.endswith("_total")
            labels = tuple(
                (n, re.sub(r"\\.", lambda m: ESCAPES[m[0]], v)) for n, v in re.findall(LABEL, parts[2] or "")
            )
            assert (parts[1], labels) not in samples
            samples[parts[1], labels] = float(line.rpartition(" ")[2])
    return families


def job(state, images=0, **timings):
    return SimpleNamespace(state=state, images=[{}] * images, timings=timings)


def figures(metrics, queue=0, running=0, workers=()):
    families = parsed(metrics.text(queue, running, workers))
    return {key: value for _, samples in families.values() for key, value in samples.items()}


def test_everything_is_counted():
    metrics = Metrics()
    metrics.ended(job("done", 2, encode=0.02, denoise=4.5))
    metrics.ended(job("failed", encode=0.01))
    metrics.ended(job("done", 1))
    for status in (200, 200, 422):
        metrics.answered("GET", status, 0.1)
    found = figures(metrics, 3, 1, [("cuda:0", "busy", 2), ("cuda:1", "starting", 0)])
    assert found["zimage_queue_length", ()] == 3
    assert found["zimage_jobs_running", ()] == 1
    assert [found["zimage_jobs_total", (("state", s),)] for s in ("done", "failed", "cancelled")] == [2, 1, 0]
    assert found["zimage_pictures_total", ()] == 3
    assert found["zimage_requests_total", (("method", "GET"), ("status", "200"))] == 2
    assert found["zimage_requests_total", (("method", "GET"), ("status", "422"))] == 1
    assert found["zimage_worker_restarts_total", (("device", "cuda:0"),)] == 2
    assert found["zimage_workers", (("device", "cuda:1"), ("state", "starting"))] == 1
    assert 0 <= found["zimage_uptime_seconds", ()] < 60
    assert found["zimage_stage_seconds_count", (("stage", "encode"),)] == 2
    assert found["zimage_stage_seconds_sum", (("stage", "denoise"),)] == 4.5


def test_workers_on_one_device_are_summed():
    found = figures(Metrics(), workers=[("cpu", "ready", 1), ("cpu", "ready", 2), ("cpu", "busy", 0)])
    assert found["zimage_workers", (("device", "cpu"), ("state", "ready"))] == 2
    assert found["zimage_worker_restarts_total", (("device", "cpu"),)] == 3


def test_a_server_answers_them(server):
    before = figures_of(server)
    server.draw(prompt="a red circle", seed=1, steps=1)
    after = figures_of(server)
    for name, labels in (
        ("zimage_jobs_total", (("state", "done"),)),
        ("zimage_pictures_total", ()),
        ("zimage_stage_seconds_count", (("stage", "denoise"),)),
    ):
        assert after[name, labels] == before.get((name, labels), 0) + 1
    assert after["zimage_requests_total", (("method", "POST"), ("status", "202"))] >= 1
    assert after["zimage_queue_length", ()] == 0
    assert sum(value for (name, _), value in after.items() if name == "zimage_workers") == 1


def figures_of(server):
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"] == MEDIA_TYPE
    return {key: value for _, samples in parsed(answer.text).values() for key, value in samples.items()}


def test_a_new_server_has_figures_too():
    families = parsed(Metrics().text(0, 0, []))
    assert {kind for kind, _ in families.values()} == {"counter", "gauge", "histogram"}
    assert families["zimage_jobs_total"][1]["zimage_jobs_total", (("state", "done"),)] == 0


def test_a_histogram_counts_what_is_at_most_its_bound():
    metrics = Metrics()
    for seconds in (0.005, 0.01, 0.02, 5000):
        metrics.ended(job("done", decode=seconds))
    found = figures(metrics)
    bounds = [*map(str, BUCKETS), "+Inf"]
    buckets = [found["zimage_stage_seconds_bucket", (("stage", "decode"), ("le", bound))] for bound in bounds]
    assert buckets == [2, 3, *[3] * (len(BUCKETS) - 2), 4]
    assert [float(bound) for bound in bounds] == sorted(map(float, bounds))


def test_methods_of_a_client_s_own_make_no_figures_of_their_own():
    metrics = Metrics()
    for i in range(100):
        metrics.answered(f"METHOD{i}", 405, 0.1)
    assert figures(metrics)["zimage_requests_total", (("method", "other"), ("status", "405"))] == 100


@pytest.mark.parametrize("text", ['"', "\\", "\n", '\\"\n\\n', "é", "a b{c}=,"])
def test_labels_and_help_are_escaped(text):
    families = parsed("\n".join(family("a", "gauge", text, [({"b": text, "c": "1"}, 0.1)])) + "\n")
    assert families == {"a": ("gauge", {("a", (("b", text), ("c", "1"))): 0.1})}


@pytest.mark.parametrize("value", [0, 1, 0.1, 1e-9, 123456789012, 1e300, float("inf")])
def test_values_keep_their_digits(value):
    assert float(sample("a", {}, value).split()[1].replace("+Inf", "inf")) == value


def test_an_empty_histogram_has_lines_that_agree():
    *buckets, total, count = Histogram((1.0,)).lines("a", "b")
    assert [line.split()[1] for line in (*buckets, total, count)] == ["0"] * 4
