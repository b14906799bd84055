"""A request is decided once, and what was decided is the job's alone: plain data, its own plan, its own LoRAs."""

import dataclasses
import json
import threading
import time
import weakref
from contextlib import contextmanager
from itertools import zip_longest

import lora_files
import numpy as np
import pytest
import torch
from PIL import Image

import zimage
from zimage.errors import RequestError
from zimage.loading.planner import Planner
from zimage.loading.registry import REQUIRED
from zimage.render import deciding
from zimage.render.job import Job
from zimage.render.state import RenderState
from zimage.settings.declared import Request
from zimage.settings.loading import LoadSettings
from zimage.text.tokenizer import Tokenizer

SIZE = {"width": 64, "height": 48, "steps": 3}


def load(folder, **settings):
    return zimage.ZImage.load(folder, **{"device": "cpu", "dtype": "fp32", **settings})


def draw(events) -> list[bytes]:
    return [event.image.tobytes() for event in events if event.image is not None]


@pytest.fixture
def style(tmp_path):
    paths = [f"layers.{i}.attention.{name}" for i in (0, 1) for name in ("to_q", "to_k", "to_v", "to_out.0")]
    return lora_files.write(tmp_path / "style.safetensors", lora_files.NAMINGS["kohya"](lora_files.factors(paths)))


# ------------------------------------------------------------------ decided once


@pytest.fixture
def counted(monkeypatch):
    """How often things happen: requests checked, plans made, texts tokenised, requests decided."""
    counts = {"checks": 0, "plans": 0, "decisions": 0, "texts": []}
    check, plan, encode, decide = Request.__post_init__, Planner.plan, Tokenizer.encode, deciding.decide

    def checked(self):
        counts["checks"] += 1
        check(self)

    def planned(self, *arguments):
        counts["plans"] += 1
        return plan(self, *arguments)

    def encoded(self, text):
        counts["texts"].append(text)
        return encode(self, text)

    def decided(*arguments):
        counts["decisions"] += 1
        return decide(*arguments)

    monkeypatch.setattr(Request, "__post_init__", checked)
    monkeypatch.setattr(Planner, "plan", planned)
    monkeypatch.setattr(Tokenizer, "encode", encoded)
    monkeypatch.setattr("zimage.pipeline.decide", decided)
    return counts


@pytest.mark.parametrize("verbose", [False, True])
def test_one_gen_decides_once(tiny_folder, tmp_path, monkeypatch, counted, verbose):
    from zimage.cli import main

    monkeypatch.chdir(tmp_path)
    arguments = ["gen", "a cat", "--model", str(tiny_folder), "--steps", "1", "--guidance", "1", "-o", "x.png"]
    assert main(arguments + ["-v"] * verbose) == 0
    assert counted["decisions"] == 1
    assert counted["plans"] <= 1 + verbose
    assert counted["checks"] <= 3
    assert len(counted["texts"]) == len(set(counted["texts"])) == 2, "the prompt's and the negative one"


def test_equal_prompts_are_tokenised_and_encoded_once(tiny_folder, counted):
    pipe = load(tiny_folder)
    events = list(pipe.run(pipe.prepare(Request(["a cat", "a dog", "a cat"], **SIZE))))
    assert len(counted["texts"]) == 2
    assert max(event.count for event in events if event.stage == "encode") == 2
    assert len(draw(events)) == 3


def test_a_thousand_prompts_are_admitted_in_a_second(tiny_folder):
    pipe, seconds = load(tiny_folder), []
    for requests in ([Request(f"prompt {i}") for i in range(1000)], [Request([f"prompt {i}" for i in range(1000)])]):
        start = time.perf_counter()
        for request in requests:
            pipe.prepare(request)
        seconds.append(time.perf_counter() - start)
    assert max(seconds) <= 2.0, f"{seconds}: 1.0 s on an idle machine; twice that beside other tests"


# ------------------------------------------------------------------ plain data


def test_a_job_goes_through_json_and_draws_the_same(tiny_folder, tmp_path, style):
    pipe = load(tiny_folder)
    pipe.lora.add(style, 0.7)
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (48, 64, 3), dtype=np.uint8))
    picture.save(tmp_path / "start.png")
    requests = [
        Request(["a cat", "a dog"], images=2, seed=5, guidance=1.5, **SIZE),
        Request("a cat", seed=5, image=str(tmp_path / "start.png"), mask=str(tmp_path / "start.png"), steps=2),
        Request("a cat", seed=5, hires=2, layer_weights={-2: 0.5, -1: 0.5}, **SIZE),
    ]
    for request in requests:
        job = pipe.prepare(request)
        assert all(value is not None for value in vars(job).values())
        again = Job.from_dict(json.loads(json.dumps(job.to_dict())))
        assert again.to_dict() == job.to_dict()
        elsewhere = load(tiny_folder)  # it has no LoRA of its own: the job names the file
        assert draw(elsewhere.run(again)) == draw(pipe.run(job))


def test_what_was_given_as_an_object_is_passed_again_by_its_hash(tiny_folder):
    pipe, red = load(tiny_folder), Image.new("RGB", (64, 48), "red")
    caption = pipe.encode("a cat")[0]
    for request, name, thing in (
        (Request("a cat", seed=1, image=red, steps=1), "image", red),
        (Request(embeddings=caption, seed=1, **SIZE), "embeddings", caption),
    ):
        job = pipe.prepare(request)
        plain = json.loads(json.dumps(job.to_dict()))
        digest = plain["request"][name]["hash"]
        with pytest.raises(RequestError, match="pass it as attachments"):
            Job.from_dict(plain)
        assert draw(pipe.run(Job.from_dict(plain, {digest: thing}))) == draw(pipe.run(job))
        with pytest.raises(RequestError, match="not the file that the job was prepared with"):
            Job.from_dict(plain, {digest: Image.new("RGB", (8, 8)) if name == "image" else caption + 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seeds", ["1"]),
        ("seeds", []),
        ("passes", [["64", 48, "off"]]),
        ("passes", []),
        ("sigmas", [0.0, 1.0]),
        ("sigmas", [float("nan"), 0.0]),
        ("token_ids", {}),
        ("texts", ["<|im_start|>a dog"]),
        ("passes", [[128, 48, "off"]]),
        ("plan", 3),
    ],
    ids=str,
)
def test_a_job_whose_parts_do_not_belong_together_is_refused(tiny_folder, name, value):
    pipe = load(tiny_folder)
    plain = pipe.prepare(Request("a cat", seed=1, **SIZE)).to_dict()
    with pytest.raises(RequestError, match=r"not a job|prepare it anew"):
        pipe.run(Job.from_dict({**plain, name: value}))
    assert pipe.loaded == ()


def test_a_job_that_does_not_fit_is_refused_when_it_runs(tiny_folder):
    pipe = load(tiny_folder, memory=1e-6)
    job = pipe.prepare(Request("a cat", seed=1, **SIZE), must_fit=False)
    with pytest.raises(RequestError, match="no size fits"):
        pipe.run(job)
    assert pipe.loaded == ()


@pytest.mark.parametrize(
    "spoilt", [{}, {"request": {}}, {"request": 3}, [], None, {"request": {"steps": "x"}}], ids=str
)
def test_what_is_not_a_job_is_one_line(spoilt):
    with pytest.raises(RequestError) as caught:
        Job.from_dict(spoilt)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "value"), [("model", "0000"), ("dtype", "float16"), ("precision", "int8")])
def test_a_job_whose_bits_would_be_others_here_is_refused(tiny_folder, name, value):
    pipe = load(tiny_folder)
    plain = pipe.prepare(Request("a cat", **SIZE)).to_dict()
    with pytest.raises(RequestError, match=f"prepared for {name} {value}"):
        pipe.run(Job.from_dict({**plain, name: value}))


def test_a_job_from_elsewhere_is_planned_anew(tiny_folder):
    """Whatever it says of devices and limits, what is here is what counts."""
    plain = load(tiny_folder).prepare(Request("a cat", seed=1, **SIZE)).to_dict()
    for stage in plain["plan"]["stages"].values():
        stage["device"] = "cuda:0"
    assert draw(load(tiny_folder).run(Job.from_dict(plain))) == draw(
        load(tiny_folder).run(Request("a cat", seed=1, **SIZE))
    )
    with pytest.raises(RequestError, match="no size fits"):
        load(tiny_folder, memory=1e-6).run(Job.from_dict(plain))


def test_foreign_tokens_never_reach_the_cache(tiny_folder):
    pipe = load(tiny_folder)
    plain = pipe.prepare(Request("a cat", seed=1, **SIZE)).to_dict()
    other = pipe.prepare(Request("a dog", seed=1, **SIZE)).to_dict()
    swapped = dict(zip(plain["token_ids"], other["token_ids"].values(), strict=True))
    with pytest.raises(RequestError, match="the job's token ids are not those"):
        pipe.run(Job.from_dict({**plain, "token_ids": swapped}))
    fresh = load(tiny_folder).encode("a cat")[0]
    torch.testing.assert_close(pipe.encode("a cat")[0], fresh, rtol=0, atol=0)


def test_the_state_of_another_render_is_refused(tiny_folder):
    pipe, state = load(tiny_folder), RenderState()
    for event in pipe.run(Request("a cat", seed=1, **SIZE)):
        state.update(event)
    with pytest.raises(RequestError, match="state is that of another render"):
        pipe.run(Request("a cat", seed=1, width=96, height=96, steps=3), state)
    with pytest.raises(RequestError, match="state is that of another render"):
        pipe.run(Request("a cat", seed=1, **SIZE), RenderState(decoded=2))


def test_the_library_does_not_take_its_model_from_the_environment(tiny_folder, monkeypatch):
    monkeypatch.setenv("ZIMAGE_MODEL", str(tiny_folder))
    assert zimage.ZImage.load().is_demo


def test_embeddings_are_no_text_to_encode(tiny_folder):
    pipe = load(tiny_folder)
    request = Request(embeddings=pipe.encode("a cat")[0], seed=1, **SIZE)
    assert not [event for event in pipe.run(request) if event.stage == "encode"]
    guided = [e for e in pipe.run(dataclasses.replace(request, guidance=1.0)) if e.stage == "encode"]
    assert {(event.index, event.count) for event in guided} == {(0, 1)}


@pytest.mark.parametrize("shape", [(0, 16, 6, 8), (16, 6, 8)], ids=str)
def test_tensors_of_another_shape_are_one_line(tiny_folder, shape):
    pipe, wrong = load(tiny_folder), torch.zeros(shape)
    with pytest.raises(RequestError, match="should be"):
        pipe.decode(wrong)
    with pytest.raises(RequestError, match="should be"):
        pipe.denoise([], wrong)


def test_a_job_keeps_its_plan_whatever_is_prepared_after_it(tiny_folder):
    pipe = load(tiny_folder)
    first = pipe.prepare(Request("a cat", seed=1, **SIZE))
    events = pipe.run(first)
    pipe.planner.settings = LoadSettings(residency="stage")
    second = pipe.prepare(Request("a dog", seed=1, **SIZE))
    assert first.plan.kept == set(REQUIRED)
    assert second.plan.kept == set()
    list(events)
    assert set(pipe.loaded) == set(REQUIRED)
    list(pipe.run(second))
    assert pipe.loaded == ()


# ------------------------------------------------------------------ two at once


@contextmanager
def peaks(pipe, monkeypatch):
    """The most components that were in memory while some job worked, by the job's plan.

    Beside what that plan keeps there may be only what another stage is using, and only where the limit has room for it.
    """
    seen: dict[frozenset, int] = {}
    use = pipe.residency.use

    @contextmanager
    def used(name, plan, *beside_it):
        with use(name, plan, *beside_it) as module:
            there = set(pipe.loaded)
            beside = sum(pipe.planner.sizes[other].resident for other in there - plan.kept - {name})
            stage = plan.stages[name]
            assert not beside or stage.peak + beside <= plan.limits[stage.device], (there, plan)
            seen[plan.kept] = max(seen.get(plan.kept, 0), len(there))
            yield module

    monkeypatch.setattr(pipe.residency, "use", used)
    yield seen


def test_two_jobs_interleaved_event_by_event_each_have_their_own_plan(tiny_folder, monkeypatch):
    pipe = load(tiny_folder)
    keeping = pipe.prepare(Request(["a cat", "a fox"], seed=1, guidance=1.0, **SIZE))
    pipe.planner.settings = LoadSettings(residency="stage")
    letting_go = pipe.prepare(Request(["a dog", "a bird"], seed=2, hires=2, **SIZE))
    alone = [draw(pipe.run(job)) for job in (keeping, letting_go)]
    pipe.release()
    with peaks(pipe, monkeypatch) as seen:
        runs, found = [pipe.run(keeping), pipe.run(letting_go)], [[], []]
        under_way = [0, 1]
        while under_way:
            for i in list(under_way):
                event = next(runs[i], None)
                if event is None:
                    under_way.remove(i)
                elif event.image is not None:
                    found[i].append(event.image.tobytes())
    assert found == alone
    assert seen.keys() == {frozenset(), frozenset(REQUIRED)}
    assert pipe.loaded == (), "the one that ended last keeps nothing"


def test_where_there_is_no_room_the_other_job_lets_go(tiny_folder, monkeypatch):
    monkeypatch.setattr("zimage.loading.planner._base_bytes", lambda device: 0)
    least = load(tiny_folder, memory=1e-9).prepare(Request("a", **SIZE), must_fit=False).plan.tightest.peak / 1e9
    pipe = load(tiny_folder, memory=least)
    planned = [pipe.prepare(Request(["a cat", "a fox"], seed=seed, **SIZE)) for seed in (1, 2)]
    alone = [draw(pipe.run(job)) for job in planned]
    with peaks(pipe, monkeypatch) as seen:
        runs = [pipe.run(job) for job in planned]
        next(event for event in runs[0] if event.stage == "denoise" and event.latents is not None)
        found = list(zip_longest(*runs))  # each in another stage than the other
    assert [draw(filter(None, events)) for events in zip(*found, strict=True)] == alone
    assert seen.keys() == {frozenset()}


def test_a_component_that_is_released_is_gone_while_a_job_waits(tiny_folder):
    pipe = load(tiny_folder)
    job = pipe.prepare(Request("a cat", seed=1, guidance=1.0, hires=2, **SIZE))
    plain, found = draw(pipe.run(job)), []
    for event in pipe.run(job):
        held = [weakref.ref(pipe.residency._held[name].module) for name in pipe.loaded]
        pipe.release()
        assert not [ref for ref in held if ref() is not None], event
        if event.image is not None:
            found.append(event.image.tobytes())
    assert found == plain


def test_a_preview_between_two_steps_loads_nothing_again(tiny_folder, monkeypatch):
    pipe, loads = load(tiny_folder, residency="stage"), []
    loading = pipe.residency._prepared
    monkeypatch.setattr(pipe.residency, "_prepared", lambda name, *a: (loads.append(name), loading(name, *a))[1])
    for event in pipe.run(Request("a cat", seed=1, **SIZE)):
        if event.stage == "denoise" and event.latents is not None:
            pipe.decode(event.latents)
    assert loads.count("dit") == 1


def test_a_hook_may_change_the_loras_while_a_thread_does(tiny_folder, style):
    pipe = load(tiny_folder)
    handle = pipe.lora.add(style, 0.5)

    def changing(evaluate):
        def changed(e):
            pipe.lora.set(handle, 0.5 + e.step / 10)
            return evaluate(e)

        return changed

    done = threading.Event()

    def run():
        for _ in range(5):
            list(pipe.run(Request("a cat", seed=1, **SIZE), hooks=[changing]))
        done.set()

    def toggle():
        while not done.wait(0.0005):
            pipe.lora.set(handle, 0.3)

    run_in_threads([run, toggle, toggle], seconds=60)


def test_eight_threads_each_have_their_own_plan(tiny_folder, monkeypatch):
    pipe, planned = load(tiny_folder), []
    for i in range(8):
        pipe.planner.settings = LoadSettings(residency="stage" if i % 2 else "auto")
        planned.append(pipe.prepare(Request(f"cat {i}", seed=i, **SIZE)))
    alone = [draw(pipe.run(job)) for job in planned]
    pipe.release()
    with peaks(pipe, monkeypatch) as seen:
        found = run_in_threads([lambda job=job: draw(pipe.run(job)) for job in planned])
    assert found == alone
    assert seen.keys() == {frozenset(), frozenset(REQUIRED)}
    assert not [t for t in threading.enumerate() if t.name == "zimage-prefetch"]


def run_in_threads(calls, seconds=300):
    found, faults = [None] * len(calls), []

    def work(i):
        try:
            found[i] = calls[i]()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=seconds)
    assert not [thread for thread in threads if thread.is_alive()]
    assert not faults, faults
    return found


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_lora_that_another_thread_toggles_never_mixes(tiny_folder, style, precision):
    """Every picture is that of one state, and its metadata says of which."""
    pipe = load(tiny_folder, precision=precision, residency="keep")
    settings = {"seed": 3, "width": 32, "height": 32, "steps": 4}
    expected = {}
    handle = pipe.lora.add(style, 0.0)
    for scale in (0.0, 0.5, 1.0):
        pipe.lora.set(handle, scale)
        expected[scale] = pipe.generate("a cat", **settings).images[0].tobytes()
    assert len(set(expected.values())) == 3
    done, scales = threading.Event(), [1.0, 0.5, 0.0]

    def toggle():
        turn = 0
        while not done.is_set():
            pipe.lora.set(handle, scales[turn % 3])
            turn += 1
            time.sleep(0.002)

    toggler = threading.Thread(target=toggle)
    toggler.start()
    try:
        some = 50 if precision == "bf16" else 5
        calls = [lambda: [pipe.generate("a cat", **settings) for _ in range(some)]] * 4
        results = [result for found in run_in_threads(calls) for result in found]
    finally:
        done.set()
        toggler.join()
    told = [result.metadata[0]["lora"][0]["scale"] for result in results]
    assert [result.images[0].tobytes() for result in results] == [expected[scale] for scale in told]
    assert len(set(told)) > 1


def test_a_lora_of_one_request(tiny_folder, style):
    pipe = load(tiny_folder)
    plain = draw(pipe.run(Request("a cat", seed=1, **SIZE)))
    adapter = pipe.lora.adapter(style, 0.8)
    job = pipe.prepare(Request("a cat", seed=1, **SIZE), loras=[adapter])
    styled = draw(pipe.run(job))
    assert styled != plain
    assert pipe.metadata(job, 0)["lora"] == [adapter.describe()]
    assert draw(pipe.run(Request("a cat", seed=1, **SIZE))) == plain
    assert pipe.lora.list() == ()


def test_a_failed_add_stops_the_streaming_of_the_dit_that_it_drops(tiny_folder, style, monkeypatch):
    monkeypatch.setattr("zimage.loading.planner._base_bytes", lambda device: 0)
    least = load(tiny_folder, memory=1e-9).prepare(Request("a", **SIZE), must_fit=False).plan.tightest.peak / 1e9
    pipe = load(tiny_folder, memory=least)
    dit = pipe.dit
    assert dit.streaming.count
    stopped = []
    monkeypatch.setattr(dit.streaming, "stop", lambda: stopped.append(True))
    monkeypatch.setattr("zimage.loading.loras.adapt", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
    with pytest.raises(MemoryError):
        pipe.lora.add(style)
    assert stopped
    assert "dit" not in pipe.loaded
    assert pipe.lora.list() == ()


# ------------------------------------------------------------------ hooks


def test_a_hook_stands_round_every_evaluation(tiny_folder):
    pipe, seen = load(tiny_folder), []

    def watching(evaluate):
        def watched(e):
            seen.append((e.step, float(e.sigmas[e.step]), e.scale))
            return evaluate(e)

        return watched

    job = pipe.prepare(Request("a cat", seed=1, guidance=2.0, cfg_truncation=0.3, **SIZE))
    plain = draw(pipe.run(job))
    assert draw(pipe.run(job, hooks=[watching])) == plain
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert {scale for _, _, scale in seen} == {0.0, 2.0}


def test_a_hook_can_guide_in_another_way(tiny_folder):
    """The positive branch alone, as without guidance; and hooks compose, the last one outermost."""
    pipe, order = load(tiny_folder), []

    def unguided(evaluate):
        order.append("unguided")
        return lambda e: evaluate(e._replace(scale=0.0))

    def outer(evaluate):
        order.append("outer")
        return evaluate

    guided = pipe.prepare(Request("a cat", seed=1, guidance=2.0, **SIZE))
    plain = draw(pipe.run(Request("a cat", seed=1, **SIZE)))
    assert draw(pipe.run(guided)) != plain
    assert draw(pipe.run(guided, hooks=[unguided, outer])) == plain
    assert order == ["unguided", "outer"]
    captions, noise = pipe.encode(["a cat"]), zimage.flow.start_noise(1, 16, 6, 8)
    latents = pipe.denoise(captions, noise, steps=3, guidance=2.0, hooks=[unguided])
    torch.testing.assert_close(latents, pipe.denoise(captions, noise, steps=3), rtol=0, atol=0)
