"""The house rules that a machine can check: cheap imports, one direction of imports, no prints in the library."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"zimage": ROOT / "zimage"} | {f"zimage.{name}": ROOT / name for name in ("kernels", "templates", "weights")}

# What each part may import of the project, besides itself and the leaves.
LEAVES = {
    "errors",
    "settings",
    "fields",
    "files",
    "version",
    "flow",
    "image",
    "sources",
    "state",
    "picture_file",
    "events",
    "places",
    "schedule",
}
MAY_IMPORT = {
    "cli": {"pipeline", "config", "state", "text", "weights"},
    "pipeline": {
        "render",
        "rewriting",
        "defaults",
        "captions",
        "parts",
        "state",
        "components",
        "plan",
        "dit",
        "text",
        "runtime",
        "weights",
    },
    "config": {"toml_file"},
    "toml_file": set(),
    "render": {"defaults", "state", "runtime"},
    "rewriting": {"captions", "components", "parts", "plan", "runtime", "text"},
    "defaults": {"captions", "components", "sources", "text"},
    "captions": {"parts", "components", "text", "runtime"},
    "parts": {"components", "plan", "loras", "runtime", "nn"},
    "loras": {"components", "runtime", "nn"},
    "plan": {"components", "runtime", "nn"},
    "components": {"architecture", "dit", "text", "vae", "runtime", "nn", "kernels"},
    "architecture": {"runtime"},
    "dit": {"nn", "kernels"},
    "text": {"nn", "kernels", "templates"},
    "vae": {"nn", "kernels"},
    "runtime": {"nn"},
    "nn": {"kernels"},
    "kernels": set(),
    "templates": {"text"},  # its `count`, which is run by hand; the package itself only says where the files lie
    "weights": {"components", "dit", "text", "vae", "runtime"},
}


def modules():
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            name = ".".join([package, *file.relative_to(folder).with_suffix("").parts])
            yield name, ast.parse(file.read_text(encoding="utf-8"))


def imported(tree) -> set[str]:
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def part(name: str) -> str:
    return [*name.split("."), ""][1]


def test_imports_go_one_way():
    for name, tree in modules():
        own = part(name)
        if own in LEAVES | {"__init__"}:
            continue
        for target in imported(tree):
            if target.startswith("zimage.") and part(target) not in LEAVES | {own}:
                assert part(target) in MAY_IMPORT[own], f"{name} must not import {target}"


def test_reference_libraries_are_never_imported():
    for name, tree in modules():
        assert not {t for t in imported(tree) if t.split(".")[0] in ("diffusers", "transformers")}, name


def test_the_library_never_prints():
    for name, tree in modules():
        calls = {n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        if part(name) != "cli" and not name.startswith("zimage.weights.recipe"):
            assert "print" not in calls, name


@pytest.mark.parametrize(
    "module", ["zimage", "zimage.cli", "zimage.settings", "zimage.config", "zimage.text.templates"]
)
def test_importing_loads_nothing_heavy(module):
    heavy = ("torch", "numpy", "tokenizers", "safetensors", "PIL", "yaml")
    code = f"import {module}; import sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_help_is_quick():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "cli.py", "gen", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) <= 0.5


def test_attributes_of_the_package_load_on_demand():
    import zimage

    assert zimage.flow.sigmas(8, 3.0).tolist()[-1] == 0
    assert zimage.dit.ZImageDiT.__name__ == "ZImageDiT"
    assert zimage.text.Qwen3.__name__ == "Qwen3"
    assert zimage.vae.AutoencoderKLWan.__name__ == "AutoencoderKLWan"
    with pytest.raises(AttributeError, match="nothing"):
        _ = zimage.nothing
