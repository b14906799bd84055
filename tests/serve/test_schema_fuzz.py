"""Requests made from the server's own description, right and wrong ones, by schemathesis against a real server.

None of them may end in a status that the description does not name, in a body that is not as it says, or in a 5xx; nor
may what the description forbids be taken. (That what it allows is taken cannot be asked: settings have to go together.)
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from running import Server

pytest.importorskip("schemathesis", reason="it is part of the extra test")

PROGRAM = (sys.executable, "-m", "schemathesis.cli")
LIMITS = ("--max-steps", "1", "--max-pixels", "16384", "--max-images", "2", "--max-prompt-tokens", "128")
SETTINGS = """
[checks]
positive_data_acceptance.enabled = false
negative_data_rejection.expected-statuses = [
  "400", "401", "403", "404", "405", "408", "409", "413", "414", "415", "422", "429", "431", "5xx",
]
"""
ENDLESS = ("/api/events",)  # streams of all jobs, which nothing but their client ends


def fuzzed(server, folder: Path, examples: int, phases: str, *options: str) -> dict:
    """schemathesis' report on a running server."""
    (folder / "schemathesis.toml").write_text(SETTINGS)
    report = folder / "report.json"
    command = [*PROGRAM, "run", f"{server.url}/openapi.json"]
    command += [word for path in ENDLESS for word in ("--exclude-path", path)]
    command += ["--max-examples", str(examples), "--phases", phases, "--request-timeout", "60", "--warnings", "off"]
    command += ["--continue-on-failure", "--report", "json", "--report-json-path", report, *options]
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert report.exists(), done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert done.returncode == 0, done.stdout[-20_000:]
    assert found["failures"] == found["errors"] == []
    assert found["operations"]["tested"] == found["operations"]["total"] - len(ENDLESS)
    assert server.http.get("/health").json()["status"] == "ok"
    assert all(worker["restarts"] == 0 for worker in server.http.get("/health").json()["workers"])
    return found


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    """A server whose pictures cost little."""
    server = Server(tmp_path_factory.mktemp("fuzzed") / "data", *LIMITS).start()
    yield server
    assert server.stop() == 0
    assert "Traceback" not in server.said()
    assert "error" not in server.said()


def test_a_few_requests_of_every_kind(fast, tmp_path):
    assert fuzzed(fast, tmp_path, 3, "fuzzing", "--seed", "1", "--no-shrink")["test_cases"]["generated"] > 40


@pytest.mark.full
def test_five_thousand_requests(fast, tmp_path):
    found = fuzzed(fast, tmp_path, 40, "examples,coverage,fuzzing,stateful")
    assert found["test_cases"]["generated"] >= 5000


def test_a_fault_would_be_found(fast, tmp_path):
    """A description that says something else than the server does: the check is not vacuous."""
    description = fast.http.get("/openapi.json").json()
    description["paths"] = {"/health": {"get": description["paths"]["/health"]["get"]}}
    description["components"]["schemas"]["Health"] = {"type": "string"}
    description["paths"]["/health"]["get"]["responses"]["200"]["content"]["application/json"]["schema"] = {
        "type": "string"
    }
    (tmp_path / "openapi.json").write_text(json.dumps(description))
    command = [*PROGRAM, "run", "openapi.json", "--url", fast.url]
    done = subprocess.run([*command, "--max-examples", "1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "violates schema" in done.stdout
