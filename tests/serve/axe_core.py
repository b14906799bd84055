"""axe-core in a page: faults of access that a machine can find."""

import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

AXE = "axe-core@4.14.1"
THEMES = ("light", "dark")


def axe_source(cache):
    """axe-core's source, by npm's own client; kept in pytest's cache."""
    folder = Path(cache.mkdir("axe-core"))
    source = folder / "axe.min.js"
    if not source.exists():
        npm = shutil.which("npm") or pytest.skip("npm is not installed")
        done = subprocess.run([npm, "pack", AXE], cwd=folder, capture_output=True, text=True, timeout=120)
        if done.returncode:
            pytest.skip(f"npm pack {AXE} failed: {done.stderr.strip().splitlines()[-1:]}")
        with tarfile.open(folder / done.stdout.strip().splitlines()[-1]) as packed:
            source.write_bytes(packed.extractfile("package/axe.min.js").read())
    return source.read_text()


def findings(page, axe, place="html", rules=None):
    """Serious and critical ones: the rule, and where."""
    page.evaluate(axe)
    options = {"resultTypes": ["violations"], **({"runOnly": rules} if rules else {})}
    result = page.evaluate("([place, options]) => axe.run(place, options)", [place, options])
    bad = [one for one in result["violations"] if one["impact"] in ("serious", "critical")]
    return [(one["id"], str(node["target"]), node["failureSummary"][:300]) for one in bad for node in one["nodes"]]


def findings_by_theme(page, axe, place="html"):
    """All rules in the light, and in the dark the one that knows colours."""
    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    light = findings(page, axe, place)
    page.emulate_media(color_scheme="dark", reduced_motion="reduce")
    return {"light": light, "dark": findings(page, axe, place, ["color-contrast"])}
