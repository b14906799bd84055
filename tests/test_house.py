"""The house rules that a machine can check: one direction of imports, cheap imports, no prints in the library."""

import ast
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"zimage": ROOT / "zimage"} | {f"zimage.{name}": ROOT / name for name in ("kernels", "templates", "weights")}

# Every room, and the rooms whose names it may import. A room that is not named here may not exist.
LEAVES = {"errors", "interrupts", "settings", "version"}
SHARED = LEAVES | {"events", "flow", "pictures"}
ABOVE = {"batch", "parallel", "experiments"}  # the rooms above the pipeline, for many requests or several devices
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": {"pipeline", "settings", "errors", "version"},
    "__main__": {"cli", "interrupts"},
    "cli": SHARED | {*ABOVE, "serve", "pipeline", "render", "loading", "formats", "text", "weights"},
    "batch": SHARED | {"cluster", "pipeline", "captioner", "render", "loading", "formats", "text"},
    "parallel": SHARED | {"pipeline", "captioner", "render", "loading", "formats", "text", "dit", "vae", "nn"},
    "experiments": SHARED
    | {"batch", "serve", "pipeline", "captioner", "render", "loading", "formats", "text", "nn", "weights"},
    "cluster": {"errors"},
    "serve": LEAVES
    | {"cluster", "events", "pictures", "pipeline", "captioner", "render", "loading", "formats", "text", "weights"},
    "pipeline": SHARED | {"captioner", "render", "loading", "text", "dit", "vae", "weights"},
    "captioner": LEAVES | {"render", "loading", "text", "weights"},
    "render": SHARED | {"loading", "formats", "text", "dit", "vae", "nn", "kernels"},
    "loading": LEAVES | {"formats", "text", "dit", "vae", "nn", "kernels"},
    "text": LEAVES | {"formats", "nn", "kernels", "templates"},
    "dit": LEAVES | {"nn", "kernels"},
    "vae": LEAVES | {"nn", "kernels"},
    "formats": LEAVES | {"nn"},
    "nn": LEAVES | {"kernels"},
    "kernels": set(),
    "pictures": LEAVES | {"formats"},
    "events": {"settings"},
    "flow": {"errors"},
    "settings": {"errors"},
    "errors": set(),
    "interrupts": set(),
    "version": set(),
    "templates": {
        "errors",
        "formats",
        "text",
    },  # its `count`, which is run by hand; the package itself only says where the files lie
    "weights": LEAVES | {"loading", "formats", "text", "dit", "vae"},
    "weights.recipe": SHARED | {"weights", "pipeline", "loading", "formats", "text", "dit", "vae", "nn"},
}
FOREIGN = {"bench", "tests", "diffusers", "transformers"}  # what nothing here may import
Sources = Mapping[str, str]  # module → its text


def sources() -> Sources:
    found = {}
    for package, folder in FOLDERS.items():
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts)] = file.read_text(encoding="utf-8")
    return found


def room(module: str) -> str:
    """The room that a module of zimage lies in."""
    name = [*module.split("."), "__init__"][1]
    return "weights.recipe" if module.startswith("zimage.weights.recipe") else name


def imported(module: str, text: str, known: Collection[str] = ()) -> Iterator[str]:
    """Every module that a file names in an import, wherever and in whatever form it stands.

    What is imported from a package is taken for a module of it where that is `known`.
    """
    package = module.split(".") if module.endswith("__init__") else module.split(".")[:-1]
    package = package[:-1] if module.endswith("__init__") else package
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = ".".join([*base, *filter(None, [node.module])])
            # `from zimage import pipeline` names a room, `from zimage.errors import X` a name in one.
            for name in (f"{whole}.{alias.name}" for alias in node.names):
                yield name if whole == "zimage" or name in known else whole
        elif isinstance(node, ast.Call) and node.args and _imports(node.func):
            yield from _spelt(node.args[0], package)


def _imports(function: ast.expr) -> bool:
    return ast.unparse(function).rpartition(".")[2] in ("import_module", "__import__")


def _spelt(argument: ast.expr, package: list[str]) -> list[str]:
    """The module that a call's argument spells out, as far as it does."""
    if not isinstance(argument, ast.Constant | ast.JoinedStr):
        return []
    text = ast.unparse(argument).strip("f'\"").split("{")[0]
    name = text.lstrip(".")
    above = package[: len(package) - (len(text) - len(name)) + 1] if text.startswith(".") else []
    return [".".join([*above, name]).rstrip(".")]


def violations(modules: Sources) -> list[str]:
    """What goes against MAY_IMPORT, one line each."""
    found = []
    for module, text in modules.items():
        own = room(module)
        if own not in MAY_IMPORT:
            found.append(f"{module} lies in a room that is not in the plan")
            continue
        for target in imported(module, text):
            top, there = target.split(".")[0], room(target)
            if top in FOREIGN:
                found.append(f"{module} imports {target}")
            elif top == "zimage" and there not in MAY_IMPORT[own] | {own} and there in MAY_IMPORT:
                found.append(f"{module} imports {target}: {own} may not know {there}")
    return found


def circles(modules: Sources) -> list[str]:
    """Modules that import one another, directly or by others, at import time or later."""
    known = {name.removesuffix(".__init__"): name for name in modules}
    arrows = {
        m: {known[t] for t in imported(m, text, known) if t in known and known[t] != m} for m, text in modules.items()
    }
    reach = {m: set(targets) for m, targets in arrows.items()}
    for middle in reach:
        for m in reach:
            if middle in reach[m]:
                reach[m] |= reach[middle]
    return sorted(m for m in reach if m in reach[m] and not m.endswith("__init__"))


def test_imports_go_one_way():
    assert violations(sources()) == []


def test_no_modules_import_one_another():
    assert circles(sources()) == []


PLANTED = {
    "a leaf that looks up": ("zimage.flow", "from zimage.pipeline import ZImage"),
    "a leaf's import of a room": ("zimage.errors", "import zimage.loading.planner"),
    "settings that know torch's rooms": ("zimage.settings.fields", "from zimage.nn.attention import attention"),
    "in relative form": ("zimage.loading.planner", "from ..render.stages import encode"),
    "in relative form, of a package": ("zimage.dit.model", "from .. import pipeline"),
    "behind a function": ("zimage.nn.layers", "def f():\n    from zimage.dit import ZImageDiT"),
    "for type checkers only": ("zimage.render.stages", "if TYPE_CHECKING:\n    from zimage.pipeline import ZImage"),
    "by its name from the top": ("zimage.vae.kl", "from zimage import render"),
    "by importlib": ("zimage.text.chat", 'import importlib\nimportlib.import_module("zimage.cli.gen")'),
    "by importlib, in relative form": ("zimage.render.job", 'import_module("..pipeline", __package__)'),
    "of the bench": ("zimage.loading.memory", "from bench.machine import describe_machine"),
    "of the recipe": ("zimage.weights.fetch", "from zimage.weights.recipe.scenes import draw"),
    "of a reference library": ("zimage.pipeline", "import diffusers.models"),
    "of a kernel's user": ("zimage.kernels.norm", "from zimage.nn.layers import RMSNorm"),
    "in a room that nobody planned": ("zimage.helpers.misc", "import os"),
    "a render that knows the server": ("zimage.render.job", "from zimage.serve.jobs import Queue"),
    "a server that computes by itself": ("zimage.serve.forms.own", "from zimage.dit.model import ZImageDiT"),
    "of the command line": ("zimage.render.rewriting", "from zimage.cli.progress import Progress"),
}


@pytest.mark.parametrize("kind", PLANTED)
def test_a_planted_violation_is_found(kind):
    module, text = PLANTED[kind]
    assert len(violations({module: text})) == 1


def test_a_planted_circle_is_found():
    pair = {"zimage.nn.a": "from zimage.nn.b import x", "zimage.nn.b": "def f():\n    from zimage.nn import a, c"}
    pair |= {"zimage.nn.c": "import zimage.nn.a"}
    assert circles({**pair, "zimage.nn.b": "import zimage.nn.c"}) == ["zimage.nn.a", "zimage.nn.b", "zimage.nn.c"]


def test_components_are_rows_and_settings_know_each():
    """The registry lists them; what must be quick to import repeats their names, and must repeat all of them."""
    from zimage.cli.options import COMPONENTS
    from zimage.cli.weights import COMPONENT
    from zimage.loading.registry import CONTROL, REQUIRED, ROWS
    from zimage.settings import LoadSettings

    assert COMPONENTS == REQUIRED
    assert tuple(COMPONENT.choices) == (*REQUIRED, CONTROL)
    assert {*REQUIRED, *(f"{name}_device" for name in REQUIRED)} <= set(LoadSettings.names())
    assert all(row.inside in ROWS for row in ROWS.values() if row.inside)


def test_the_library_never_prints():
    for name, text in sources().items():
        calls = {
            n.func.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)
        }
        if room(name) not in ("cli", "weights.recipe"):
            assert "print" not in calls, name


@pytest.mark.parametrize(
    "module", ["zimage", "zimage.cli", "zimage.settings", "zimage.settings.profiles", "zimage.text.templates"]
)
def test_importing_loads_nothing_heavy(module):
    heavy = (
        "torch",
        "numpy",
        "tokenizers",
        "safetensors",
        "PIL",
        "yaml",
        "httpx",
        "zimage.batch",
        "zimage.experiments",
    )
    code = f"import {module}; import sys; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_importing_is_quick():
    code = "import time; start = time.perf_counter(); import zimage; print(time.perf_counter() - start)"
    assert min(float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(5)) <= 0.02


def test_help_is_quick():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "cli.py", "gen", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) <= 0.3  # 0.12 on an idle machine


def test_attributes_of_the_package_load_on_demand():
    import zimage

    assert zimage.flow.sigmas(8, 3.0).tolist()[-1] == 0
    assert zimage.dit.ZImageDiT.__name__ == "ZImageDiT"
    assert zimage.text.Qwen3.__name__ == "Qwen3"
    assert zimage.vae.AutoencoderKLWan.__name__ == "AutoencoderKLWan"
    with pytest.raises(AttributeError, match="nothing"):
        _ = zimage.nothing


def test_a_command_ends_with_the_garbage_collector_as_it_found_it():
    code = "import gc; from zimage.cli import main; main(['tokens', 'a']); print(gc.isenabled())"
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said.splitlines()[-1] == "True"
