"""Figures of a server, in the text form of Prometheus (version 0.0.4).

A family is a figure with its name, kind and help; each of its samples has a value for each of its labels. The values of
labels come from short lists of our own, never from a request: every new one would be kept for ever.
"""

import bisect
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from zimage.serve.view import JobView

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # seconds
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
Labels = Mapping[str, str]


class Metrics:
    """What is counted as it happens; `text` adds what is so at the moment."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._requests: Counter[tuple[str, str]] = Counter()
        self._jobs: Counter[str] = Counter({"done": 0, "failed": 0, "cancelled": 0})
        self._pictures = 0
        self._stages: defaultdict[str, Histogram] = defaultdict(Histogram)

    def answered(self, method: str, status: int, seconds: float) -> None:
        """A request was answered; status 0: its client went before."""
        self._requests[method if method in METHODS else "other", str(status)] += 1

    def ended(self, job: JobView) -> None:
        """A job has ended, in whatever way."""
        self._jobs[job.state] += 1
        self._pictures += len(job.images)
        for stage, seconds in job.timings.items():
            self._stages[stage].add(seconds)

    def text(self, queue: int, running: int, workers: Sequence[tuple[str, str, int]]) -> str:
        """All figures; `workers`: device, state and restarts of each."""
        states, restarts = Counter((device, state) for device, state, _ in workers), Counter[str]()
        for device, _, count in workers:
            restarts[device] += count
        processes = [({"device": d, "state": s}, float(n)) for (d, s), n in states.items()]
        restarted = [({"device": device}, float(count)) for device, count in restarts.items()]
        requests = [({"method": m, "status": s}, float(n)) for (m, s), n in sorted(self._requests.items())]
        jobs = [({"state": state}, float(count)) for state, count in self._jobs.items()]
        stages = [line for stage, h in self._stages.items() for line in h.lines("zimage_stage_seconds", stage)]
        families = (
            family("zimage_queue_length", "gauge", "Jobs that wait.", [({}, queue)]),
            family("zimage_jobs_running", "gauge", "Jobs that are being drawn.", [({}, running)]),
            family("zimage_jobs_total", "counter", "Jobs that have ended since the start, by how.", jobs),
            family("zimage_pictures_total", "counter", "Pictures of these jobs.", [({}, self._pictures)]),
            [*heading("zimage_stage_seconds", "histogram", "Seconds that a job spent in a stage."), *stages],
            family("zimage_workers", "gauge", "Worker processes, by device and state.", processes),
            family("zimage_worker_restarts_total", "counter", "Worker processes started anew.", restarted),
            family("zimage_requests_total", "counter", "Answers; status 0: the client went before.", requests),
            family("zimage_uptime_seconds", "gauge", "Since the start.", [({}, time.monotonic() - self._begun)]),
        )
        return "".join(f"{line}\n" for lines in families for line in lines)


class Histogram:
    """How many values were at most so large, for each bound."""

    def __init__(self, bounds: Sequence[float] = BUCKETS):
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self._counts[bisect.bisect_left(self._bounds, value)] += 1
        self._sum += value

    def lines(self, name: str, stage: str) -> Iterable[str]:
        """The samples of one stage."""
        count = 0
        for bound, more in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            count += more
            yield sample(f"{name}_bucket", {"stage": stage, "le": bound}, count)
        yield sample(f"{name}_sum", {"stage": stage}, self._sum)
        yield sample(f"{name}_count", {"stage": stage}, count)


def family(name: str, kind: str, help: str, samples: Iterable[tuple[Labels, float]]) -> list[str]:
    """The lines of a family."""
    return [*heading(name, kind, help), *(sample(name, labels, value) for labels, value in samples)]


def heading(name: str, kind: str, help: str) -> tuple[str, str]:
    escaped = help.replace("\\", "\\\\").replace("\n", "\\n")
    return f"# HELP {name} {escaped}", f"# TYPE {name} {kind}"


def sample(name: str, labels: Labels, value: float) -> str:
    """One line."""
    pairs = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{name}{{{pairs}}} {value:.15g}" if pairs else f"{name} {value:.15g}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
