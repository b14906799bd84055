"""A Ray cluster for tests: some machines, as far as Ray can tell, with a core for each worker.

It runs in a process of its own, which ends it when the test process goes: Ray reads its environment once.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile

STORE = 80 << 20  # bytes of each machine's object store
PATIENCE = 60.0  # seconds that it may take to end


class Cluster:
    """`address` is what servers connect to, in this `environment`: no other cluster knows the token.

    It has `cores` on one machine, and `others` of one core each, which can be lost.
    """

    def __init__(self, cores: int, others: int = 0):
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
        self.environment = {**token, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        self._folder = tempfile.mkdtemp(prefix="zray-", dir="/tmp")  # short: Ray's sockets lie in it
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._folder, str(cores), str(others)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.environment},
            start_new_session=True,
        )
        self.address = self._answer()

    def lose(self) -> None:
        """A machine loses its power; another one comes in its place."""
        assert self._process.stdin
        self._process.stdin.write("lose\n")
        self._process.stdin.flush()
        self._answer()

    def relays(self) -> list[int]:
        """The process numbers of the actors."""
        found = subprocess.run(["pgrep", "-s", str(self._process.pid), "-f", "^ray::Relay"], capture_output=True)
        return [int(number) for number in found.stdout.split()]

    def shutdown(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(PATIENCE)
        finally:
            for number in _of_session(self._process.pid):
                os.kill(number, signal.SIGKILL)
            shutil.rmtree(self._folder, ignore_errors=True)

    def _answer(self) -> str:
        assert self._process.stdout
        while line := self._process.stdout.readline():
            if line.startswith("now "):
                return line.split()[1]
        raise AssertionError("Ray does not start here")


def _of_session(leader: int) -> list[int]:
    found = subprocess.run(["pgrep", "-s", str(leader)], capture_output=True)
    return [int(number) for number in found.stdout.split()]


def run(folder: str, cores: int, others: int) -> None:
    from ray.cluster_utils import Cluster as Machines

    usual = {"object_store_memory": STORE, "include_dashboard": False}
    machines = Machines(True, head_node_args={"num_cpus": cores, "temp_dir": folder, **usual})
    one = {"num_cpus": 1, "object_store_memory": STORE}
    nodes = [machines.add_node(**one) for _ in range(others)]
    print("now", machines.address, flush=True)
    for _ in sys.stdin:
        machines.remove_node(nodes.pop(0), allow_graceful=False)
        nodes.append(machines.add_node(**one))
        print("now", "gone", flush=True)
    machines.shutdown()


if __name__ == "__main__":
    run(sys.argv[1], *map(int, sys.argv[2:]))
