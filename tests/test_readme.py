"""Our documents are part of the interface: their commands, code, help blocks, tables, maps and links hold.

`python -m tests.test_readme` writes the help blocks anew.
"""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from bench.__main__ import main as bench
from bench.tables import filled
from zimage.cli import cli

ROOT = Path(__file__).parent.parent
ROOMS = (
    "zimage",
    "zimage/cli",
    "zimage/serve",
    "zimage/batch",
    "zimage/parallel",
    "zimage/experiments",
    "zimage/experiments/metrics",
    "kernels",
    "weights",
    "templates",
    "bench",
    "tests",
    "zimage/serve/page",
    "zimage/experiments/page",
)
MAPS = [ROOT / "README.md", *(ROOT / room / "README.md" for room in ROOMS)]
DOCUMENTS = [
    *MAPS,
    ROOT / "CHANGELOG.md",
    ROOT / ".github" / "SECURITY.md",
    ROOT / "bench" / "NOTES.md",
    ROOT / "weights" / "demo" / "README.md",
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
INSTALL = 'pip install -c constraints.txt -e . && python cli.py gen "a cat face on a blue background"'
TEST = 'pip install -c constraints.txt -e ".[test]" && pytest'
HELP = re.compile(r"<!-- help: ([\w ]+) -->\n```text\n(.*?)```\n<!-- end -->", re.DOTALL)
IGNORED = ("__pycache__", "zimage_torch.egg-info", "build", "dist")


def python(*arguments, **options):
    environment = {**os.environ, "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, env=environment, **options
    )


def found(pattern: str) -> list:
    """(document, match) of every place, to parametrise a test with."""
    return [
        pytest.param(name, match, id=f"{name}-{i}")
        for name, text in TEXTS.items()
        for i, match in enumerate(re.findall(pattern, text, re.DOTALL | re.MULTILINE))
    ]


# ------------------------------------------------------------------ commands, code and help


def test_the_two_commands_stand_near_the_top():
    top = TEXTS["README.md"].splitlines()[:25]
    assert INSTALL in top
    assert TEST in top


def test_the_readme_is_short():
    assert len(TEXTS["README.md"].splitlines()) <= 220


def test_the_first_command_draws_a_picture(tmp_path):
    arguments = shlex.split(INSTALL.split("&& python cli.py ")[1])
    done = python(ROOT / "cli.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "bundled demo" in done.stderr
    assert "--model PATH" in done.stderr
    (picture,) = tmp_path.iterdir()
    assert picture.name == done.stdout.strip()


@pytest.mark.parametrize(("name", "code"), found(r"^```python\n(.*?)```"))
def test_code_runs(name, code, tmp_path):
    done = python("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "block"), found(HELP.pattern))
def test_help_blocks_are_current(name, block):
    command, text = block
    assert text == help_of(command), "run: python -m tests.test_readme"


def help_of(command: str) -> str:
    return python(ROOT / "cli.py", *command.split(), "--help").stdout


def commands() -> Iterator:
    """(document, words) of every command in a block of shell."""
    for name, text in TEXTS.items():
        for block in re.findall(r"^```sh\n(.*?)```", text, re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                for command in line.split(" && "):
                    if words := shlex.split(command, comments=True):
                        yield pytest.param(words, id=f"{name}: {' '.join(words)[:50]}")


@pytest.mark.parametrize("words", list(commands()))
def test_commands_exist_and_know_their_options(words):
    """Without running them: most need a model, a network or minutes."""
    words = words[: words.index(">")] if ">" in words else words
    if words[0] == "zimage" or words[:2] == ["python", "cli.py"]:
        parse(cli, words[1 if words[0] == "zimage" else 2 :])
    elif words[:3] == ["python", "-m", "bench"]:
        parse(bench, words[3:])
    elif words[:2] == ["python", "-c"]:
        compile(words[2], "-c", "exec")
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
    elif words[0] == "ray":
        parse(importlib.import_module("ray.scripts.scripts").cli, words[1:])
    elif words[0] == "pytest":
        assert all((ROOT / word).exists() for word in words if word.startswith("tests/"))
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    else:
        assert words[0] == "pip" or (ROOT / words[0]).is_file()


def parse(command: click.Command, arguments: list[str]) -> None:
    """Raise click's error where a command, an option or a number of arguments is wrong."""
    if isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        return parse(command.commands[arguments[0]], arguments[1:])
    options, _, _ = command.make_parser(click.Context(command)).parse_args(arguments)
    needed = [p.name for p in command.params if isinstance(p, click.Argument) and p.required]
    assert all(options.get(name) for name in needed), needed


# ------------------------------------------------------------------ tables, maps and links


@pytest.mark.parametrize("name", TEXTS)
def test_result_tables_are_current(name):
    assert filled(TEXTS[name]) == TEXTS[name], "run: python -m bench tables"


def rows(document: Path) -> list[str]:
    """What the first column of a document's tables names, seen from the root: files, folders, patterns."""
    text = document.read_text(encoding="utf-8")
    cells = re.findall(r"^\| ([^|]*`[^|]*) \|", text, re.MULTILINE)
    names = [name for cell in cells for name in re.findall(r"`([^`\s]+)`", cell)]
    folder = document.parent.relative_to(ROOT)
    return [(folder / name).as_posix() for name in names if re.search(r"[./*]|^[A-Z]+$", name)]


def files(document: Path) -> set[str]:
    """Every file below a document's folder, but for folders with a document of their own and what is generated."""
    folder = document.parent
    inner = {other.parent for other in DOCUMENTS if folder in other.parent.parents}
    if folder == ROOT:  # where people's pictures, settings and git's own files may lie as well
        junk = (".png", ".jpg", ".webp")
        there = [p for p in folder.iterdir() if p.is_file() and p.name[0] != "." and p.suffix not in junk]
        there = [p for p in there if p.name not in ("zimage.toml", "run")]
    else:
        there = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {
        path.relative_to(ROOT).as_posix()
        for path in there
        if path.name != "README.md"
        and not inner & set(path.parents)
        and not any(name in IGNORED for name in path.relative_to(ROOT).parts)
    }


@pytest.mark.parametrize("document", MAPS, ids=lambda path: path.parent.name)
def test_a_map_has_files_to_name(document):
    assert len(files(document)) > 3


@pytest.mark.parametrize("document", MAPS, ids=lambda path: path.parent.name)
def test_every_file_stands_in_its_folders_map(document):
    missing = {
        file
        for file in files(document)
        if not any(Path(file).match(row) for row in rows(document)) and not is_plain_init(ROOT / file)
    }
    assert not missing, f"{document.relative_to(ROOT)} lacks rows"


def is_plain_init(file: Path) -> bool:
    """Whether a file only makes a folder a package: the room's heading speaks for it."""
    return file.name == "__init__.py" and ROOT / "zimage" in (file.parents[1], file.parents[2])


@pytest.mark.parametrize("document", MAPS, ids=lambda path: path.parent.name)
def test_every_row_of_a_map_exists(document):
    gone = [row for row in rows(document) if not any(ROOT.glob(row))]
    assert not gone, f"{document.relative_to(ROOT)} names what does not exist"


def links(name: str) -> Iterator[tuple[Path, str]]:
    """(file, anchor) of every link to one of our own files."""
    prose = re.sub(r"```.*?```", "", TEXTS[name], flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            yield ((ROOT / name).parent / path).resolve() if path else ROOT / name, anchor


def anchors(text: str) -> set[str]:
    """The headings of a document as GitHub's anchors."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for path, anchor in links(name):
        assert path.exists(), path
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{path.name}#{anchor}"


@pytest.mark.parametrize(
    "task", ["add-a-sampler", "add-an-attention-backend", "add-a-lora-naming", "add-an-op", "add-a-setting"]
)
def test_a_newcomer_finds_how_to_extend_it_in_two_links(task):
    known = {(ROOT / name).resolve(): name for name in TEXTS}
    first = {known[path] for path, _ in links("README.md") if path in known}
    second = {known[path] for name in first for path, _ in links(name) if path in known}
    assert any(task in anchors(TEXTS[name]) for name in first | second)


if __name__ == "__main__":
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        anew = HELP.sub(lambda m: f"<!-- help: {m[1]} -->\n```text\n{help_of(m[1])}```\n<!-- end -->", text)
        path.write_text(anew, encoding="utf-8")
