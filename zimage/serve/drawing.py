"""What a worker does with its pipeline: prepare, render, encode, rewrite. Plain values in, plain values and files out.

job ─ (rewritten first, where that is asked for) ─ run ─→ events ─→ progress, previews, pictures, the kept state
"""

import base64
import dataclasses
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path

from zimage import interrupts
from zimage.captioner import Captioner
from zimage.errors import OutputError, RequestError, ZImageError
from zimage.events import Event, timed
from zimage.formats.lock import Lock
from zimage.loading.loras import Adapters
from zimage.loading.registry import DIT, TEXT_ENCODER
from zimage.pictures.files import save
from zimage.pipeline import ZImage
from zimage.render.defaults import adapters_told
from zimage.render.job import Job
from zimage.render.preview import Factors, Preview, Previews, prefitted
from zimage.render.rewriting import Rewrite
from zimage.render.state import RenderState, StateFile, hold, load_state
from zimage.serve.channel import Message
from zimage.serve.encoding import encode
from zimage.serve.uploads import named
from zimage.settings.captions import TextSettings
from zimage.settings.declared import Request
from zimage.settings.fields import Plain
from zimage.settings.rewriting import RewriteSettings

log = logging.getLogger("zimage")
Check = Callable[[], None]  # raises where the task was cancelled
Send = Callable[[Message], None]

KEPT = 4  # jobs that are prepared and not run yet: their opened pictures may be large
DYING = 10.0  # seconds that a killed process may take to end
USUAL = ("width", "height", "steps", "sampler", "schedule", "guidance", "shift")  # what a model's kind decides
STATE_AFTER = 1.0  # seconds after which a job's state is kept: what takes less is sooner drawn anew


class Studio:
    """A worker's pipeline; of a server that only encodes, the half without pictures."""

    def __init__(self, start: Message, send: Send):
        loading = dict(start["loading"])
        kind = Captioner if start["encoder_only"] else ZImage
        self.captioner: Captioner = kind.load(loading.pop("model", None), **loading)
        self.send, self.folder = send, Path(start["data"])
        self.factors: Factors | None = None
        self._wants_previews = start["previews"] and isinstance(self.captioner, ZImage)
        self._prepared: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()

    def about(self) -> Message:
        """What forms and pages tell of the model."""
        pipe, defaults = self.captioner, {}
        if isinstance(pipe, ZImage):
            usual = pipe.prepare(Request(prompt=""), must_fit=False).request
            defaults = {name: getattr(usual, name) for name in USUAL}
        device, dtype = pipe.places.get(DIT) or pipe.places[TEXT_ENCODER]
        return {
            "model": {"name": pipe.model.name, "fingerprint": pipe.model.fingerprint, "is_demo": pipe.is_demo},
            "defaults": defaults,
            "token_limit": pipe.texts.limit,
            "dtype": str(dtype).removeprefix("torch."),
            "device": str(device),
            "notes": list(pipe.model.assumptions),
            "vision": pipe.vision.describe() if pipe.vision else {},
        }

    @property
    def pipe(self) -> ZImage:
        """Raises RequestError on a server that only encodes."""
        if not isinstance(self.captioner, ZImage):
            raise RequestError("this server only encodes; ask one that draws")
        return self.captioner

    def warm_up(self) -> None:
        """Before the first task: fit what previews are made with, once for a VAE, or read what was fitted."""
        if self._wants_previews:
            try:
                self.factors = prefitted(self.pipe, self.folder)
            except ZImageError as error:
                log.warning("jobs are drawn without previews: %s", error)

    # ------------------------------------------------------------------ questions, in the second thread

    def answer(self, question: Message, idle: bool) -> Message:
        """Raises what the pipeline raises. `idle`: nothing else takes memory now."""
        if question["op"] == "prepare":
            return self._prepare(question, idle)
        if question["op"] == "vision":
            return self._vision(question.get("clear", False))
        text = TextSettings.from_mapping(question["text"])
        texts = self.captioner.texts
        return {"text": texts.parts(text).format(question["prompt"]), **texts.count(question["prompt"], text)._asdict()}

    def _vision(self, clear: bool) -> Message:
        """Whether the vision model is in memory, and figures of the cache of captions, which is emptied for `clear`."""
        cache, vision = self.captioner.cache, self.captioner.vision
        if clear:
            cache.clear()
        loaded = vision is not None and vision.component in self.captioner.residency.loaded
        return {"loaded": loaded, "cache": {**vars(cache.stats), "hit_rate": cache.stats.hit_rate}}

    def _prepare(self, question: Message, idle: bool) -> Message:
        """The job of a request. What does not fit in memory beside a render that runs is tried when its turn comes."""
        request = Request.from_mapping(question["values"])
        if question["rewrite"]:
            if request.embeddings is not None:
                text = "rewriter: embeddings hold no prompt to rewrite; leave out one of them"
                raise RequestError(text, fields=("rewriter", "embeddings"))
            self.pipe.rewriter.template(RewriteSettings.from_mapping(question["rewrite"]))
        job = self.pipe.prepare(request, self._adapters(question["lora"]), must_fit=idle)
        if idle:
            with self._lock:
                self._prepared[question["id"]] = job
                while len(self._prepared) > KEPT:
                    self._prepared.popitem(last=False)
        tokens = max(*job.token_counts, *map(len, job.token_ids.values()), 0)
        said = adapters_told(job.loras, self.pipe.model)
        return {"job": job.to_dict(), "request": _shown(job), "seeds": list(job.seeds), "tokens": tokens, "said": said}

    def _adapters(self, loras: Sequence[Mapping[str, Plain]] | None) -> Adapters | None:
        """LoRAs by their paths, which the server has found by their names; None: those that the pipeline has."""
        if loras is None:
            return None
        return tuple(self.pipe.lora.adapter(use["path"], use["scale"]) for use in loras)

    def _job(self, task: Message) -> Job:
        with self._lock:
            known = self._prepared.pop(task["id"], None)
        return known or Job.from_dict(task["job"])

    # ------------------------------------------------------------------ tasks, in the main thread

    def render(self, task: Message, check: Check) -> Message:
        """Draw a job's pictures, and return its timings. Errors name none of its files' folders."""
        with named(_places(task["job"])):
            job, rewritten = self._job(task), list(task["rewritten"])
            if task["rewrite"]:
                job, rewritten = self._rewritten(task, job, check)
            whole = interrupts.held() if self.pipe.settings.compile or self.pipe.settings.cuda_graphs else nullcontext()
            with whole:  # what compiles or records must not be left in the middle
                return Drawing(self, task["id"], job, rewritten).run(check)

    def compute(self, task: Message, check: Check) -> Message:
        """Encode or rewrite a text for a client that waits."""
        if task["what"] in ("encode", "see"):
            return {"result": encode(self.captioner, task["asked"], Path(task["path"]))}
        settings = RewriteSettings.from_mapping(task["asked"]["settings"])
        result = self._written(task["id"], task["asked"]["prompt"], settings, check)
        return {"result": {"prompt": result.prompt, "thinking": result.thinking, **result.describe()}}

    def _rewritten(self, task: Message, job: Job, check: Check) -> tuple[Job, list[Message]]:
        """The job with its prompts rewritten. The server keeps it: a crash later on does not write them anew."""
        settings = RewriteSettings.from_mapping(task["rewrite"])
        results = [self._written(task["id"], prompt, settings, check) for prompt in job.request.prompts]
        prompts = [result.prompt for result in results]
        prompt = prompts if isinstance(job.request.prompt, list) else prompts[0]
        job = self.pipe.prepare(dataclasses.replace(job.request, prompt=prompt), job.loras)
        rewritten = [result.describe() for result in results]
        told = {"job": job.to_dict(), "request": _shown(job), "rewritten": rewritten}
        self.send({"on": "rewritten", "id": task["id"], **told})
        return job, rewritten

    def _written(self, task: str, prompt: str, settings: RewriteSettings, check: Check) -> Rewrite:
        pieces, count = self.captioner.rewriter.pieces(prompt, settings), 0
        while True:
            self.send({"on": "progress", "id": task, "stage": "rewrite", "step": count, "total": settings.max_tokens})
            try:
                next(pieces)
            except StopIteration as finished:
                result: Rewrite = finished.value
                return result
            check()
            count += 1


class Drawing:
    """One job on its way to pictures: a consumer of its events."""

    def __init__(self, studio: Studio, id: str, job: Job, rewritten: Sequence[Message]):
        self.pipe, self.send, self.id, self.job, self.rewritten = studio.pipe, studio.send, id, job, rewritten
        self.pictures = studio.folder / "pictures"
        self.state_path = studio.folder / "states" / f"{id}.safetensors"
        self.timings: dict[str, float] = {}
        self.state = RenderState()
        self.kept = self._begun()
        self._refused_state = False
        self._previews = Previews(studio.factors, self._show) if studio.factors else None

    def run(self, check: Check) -> Message:
        """Draw what is not drawn yet. A cancel comes through in the middle of a step, but not while weights move."""
        begun = time.monotonic()
        hooks = [self._previews.hook] if self._previews else []
        try:
            events = timed(self.pipe.run(self.job, self.state, hooks), self.timings)
            with self._previews or nullcontext(), closing(events), ExitStack() as moving:
                for event in events:
                    check()
                    if event.stage == "load":
                        moving.close() if event.step else moving.enter_context(interrupts.held())
                    self._take(event)
                    self._keep(event, time.monotonic() - begun)
        except OutputError:
            raise  # once there is room, the job goes on from its state
        except BaseException:
            self._forget()
            raise
        self._forget()
        return {"timings": {stage: round(seconds, 4) for stage, seconds in self.timings.items()}}

    def _take(self, event: Event) -> None:
        if event.image is not None:
            with interrupts.held():  # there is no picture that the server has not heard of
                self._save(event)
            return
        if self._previews:
            self._previews.take(event)
        named = {"stage": event.stage, "step": event.step, "total": event.total, "detail": event.detail}
        self.send({"on": "progress", "id": self.id, **named, "index": event.index, "count": event.count})

    def _show(self, preview: Preview) -> None:
        shown = {"index": preview.index, "width": preview.width, "height": preview.height}
        url = f"data:image/jpeg;base64,{base64.b64encode(preview.jpeg).decode()}"
        self.send({"on": "preview", "id": self.id, "step": preview.step, **shown, "image": url})

    def _save(self, event: Event) -> None:
        assert event.image is not None
        try:
            save(event.image, self._path(event.index), self._record(event.index), replace=True)
        except OSError as error:
            raise OutputError(f"the picture cannot be written: {error.strerror or error}") from error
        self._tell(event.index)

    def _tell(self, index: int) -> None:
        self.send({"on": "image", "id": self.id, "index": index, "image": self._path(index).stem})

    def _path(self, index: int) -> Path:
        return self.pictures / f"{self.id}-{index + 1}.png"

    def _record(self, index: int) -> dict[str, Plain]:
        """The metadata of an image, as `gen` writes them."""
        record = self.pipe.metadata(self.job, index)
        if not self.rewritten:
            return record
        return {**record, "rewritten": self.rewritten[index // self.job.request.images]}

    # ------------------------------------------------------------------ the state

    def _begun(self) -> StateFile | None:
        """What another process has done of the job, where that can be used."""
        if not self.state_path.exists():
            return None
        try:
            lock = _released(self.state_path)
            state, record = load_state(self.state_path)
            self.pipe.check_state(state, self.job)
            drawn = [self._path(i).exists() for i in range(state.decoded)]
            state.decoded = drawn.index(False) if False in drawn else state.decoded
            kept = StateFile(self.state_path, record, state, lock)
        except ZImageError as error:
            log.warning("the job starts anew: %s", error)
            self.state_path.unlink(missing_ok=True)
            return None
        for index in range(state.decoded):
            self._tell(index)  # the server may have gone before it heard of them
        self.state = state
        return kept

    def _forget(self) -> None:
        """The job has ended for good."""
        if self.kept:
            self.kept.remove()

    def _keep(self, event: Event, seconds: float) -> None:
        if self.kept:
            self.kept.update(event)
        elif self.state.update(event) and seconds > STATE_AFTER and not self._refused_state:
            try:
                self.kept = StateFile(self.state_path, {"job": self.id}, self.state)
            except (OutputError, RequestError) as error:
                log.warning("%s; the render goes on without", error)
                self._refused_state = True


def _released(path: Path) -> Lock:
    """The lock of a state, once the process that began the job has ended, which takes a moment. Raises RequestError."""
    end = time.monotonic() + DYING
    while True:
        try:
            return hold(path)
        except RequestError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def _places(job: Message) -> dict[str, str]:
    """The path of each file of a job, with the field that it belongs to."""
    found = {use["path"]: "lora" for use in job["loras"]}
    for field, value in job["request"].items():
        for entry in value if isinstance(value, list) else [value]:
            paths = [entry.get(role) for role in ("path", "picture", "model")] if isinstance(entry, dict) else []
            found |= {path: field for path in paths if path and os.path.isabs(path)}
    return found


def _shown(job: Job) -> Message:
    """The request as clients see it: nothing open, and no paths."""
    loras = [f"{use.name}:{use.scale:g}" for use in job.loras]
    return {**job.request.to_mapping(), "lora": loras}
