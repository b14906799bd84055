"""What workers do with rows that tests have poisoned; their processes find this file by PYTHONPATH."""

import json
import os
import signal

from zimage.batch.actors import Worker

work = Worker.work


def poisoned(self, row, attempt):
    if json.loads(row["request"])["prompt"] == "kill the process":
        os.kill(os.getpid(), signal.SIGKILL)
    return work(self, row, attempt)


Worker.work = poisoned
