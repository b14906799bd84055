"""Prompt templates: strict reading, the user's own before the shipped ones, search, the commands, the shipped set."""

import json
import os
import random
import re
import subprocess
import sys
import time
from itertools import combinations
from pathlib import Path

import pytest

import zimage.text.templates as module
from zimage.cli import main
from zimage.errors import RequestError, TemplateError
from zimage.templates import FOLDER
from zimage.text.templates import (
    MAX_BYTES,
    OPTIONAL,
    REQUIRED,
    REWRITER,
    Template,
    Templates,
    count_added_tokens,
    read_template,
    user_folder,
)
from zimage.text.tokenizer import Tokenizer
from zimage.weights import DEMO

ROOT = Path(__file__).parent.parent
GOOD = "---\nname: my-own\ndescription: Mine\ncategory: photo\n---\nThe text.\n"


@pytest.fixture(scope="session")
def shipped() -> list[Template]:
    return Templates.open().list(hidden=True)


@pytest.fixture
def own(tmp_path) -> Path:
    """A folder with one template of the user's and one in the place of a shipped one."""
    (tmp_path / "my-own.md").write_text(GOOD)
    (tmp_path / "photo-overcast.md").write_text(GOOD.replace("my-own", "photo-overcast").replace("Mine", "曇り"))
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `templates …` with no folder of the user's; returns (status, stdout, stderr)."""
    monkeypatch.setenv("ZIMAGE_TEMPLATES", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/nowhere")
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(*arguments):
        status = main(["templates", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def written(folder: Path, text: str | bytes, name: str = "my-own.md") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


# Reading -------------------------------------------------------------------------------------------------------------


def test_every_key_is_read(tmp_path):
    path = written(
        tmp_path,
        "---\nname: my-own\ndescription: 'A: colon'\ncategory: art-movement\nmodel: other\nadd_think_block: true\n"
        "thinking_content: |\n  First.\n  Then.\nassistant_content: Done.\n---\n\nOne.\n\n---\nTwo.\n\n",
    )
    assert read_template(path) == Template(
        "my-own", "A: colon", "art-movement", "other", True, "First.\nThen.", "Done.", "One.\n\n---\nTwo.", path
    )


def test_what_may_be_left_out(tmp_path):
    path = written(tmp_path, GOOD)
    assert read_template(path) == Template("my-own", "Mine", "photo", "z-image", None, None, None, "The text.", path)
    bodyless = written(tmp_path, GOOD.replace("The text.\n", "").replace("photo", "photo\nadd_think_block: false"))
    assert read_template(bodyless) == Template("my-own", "Mine", "photo", add_think_block=False, path=bodyless)


@pytest.mark.parametrize("change", [lambda b: b"\xef\xbb\xbf" + b, lambda b: b.replace(b"\n", b"\r\n")])
def test_other_editors_files_read_the_same(tmp_path, change):
    path = written(tmp_path, GOOD)
    plain = read_template(path)
    assert read_template(written(tmp_path, change(GOOD.encode()))) == plain


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("---\nname", "name", 1, "first line should be '---'"),
        ("photo\n---", "photo", 6, "not closed"),
        (GOOD, "", 1, "first line should be '---'"),
        (GOOD, "---\n---\nText", 2, "lines of the form `key: text`"),
        (GOOD, "---\n- a\n---\nText", 2, "lines of the form `key: text`"),
        ("category: photo\n", "", 1, "lacks category"),
        ("name: my-own\ndescription: Mine\n", "", 1, "lacks name and description"),
        ("category: photo", "category: photo\ncategroy: photo", 5, "no key 'categroy'; did you mean 'category'?"),
        ("category: photo", "category: photo\nxyz: photo", 5, "no key 'xyz'; known: name, description"),
        ("category: photo", "category: photo\nname: my-own", 5, "name was already set on line 2"),
        ("Mine", "35", 3, "description is a number; it should be text; if it is meant as text, put it in quotes"),
        ("Mine", "yes", 3, "description is true or false; it should be text"),
        ("Mine", "2026-01-01", 3, "description is a date; it should be text"),
        ("Mine", "", 3, "description is empty; it should be text"),
        ("Mine", "' '", 3, "description is empty; it should be text"),
        ("Mine", "[a, b]", 3, "description is a list or a mapping"),
        ("Mine", "{a: b}", 3, "description is a list or a mapping"),
        ("Mine", "[" * 30_000, 3, "description is a list or a mapping"),
        ("description: Mine", "? [a, b]\n: Mine", 3, "a key is a list or a mapping"),
        ("Mine", "!!python/object/apply:os.system [ls]", 3, "a list or a mapping"),
        ("Mine", "!!python/name:os.system ''", 3, "of the type"),
        ("Mine", "|\n  one\n  two", 3, "single line"),
        ("category: photo", "category: Photo", 4, "'Photo' may contain only a-z"),
        ("category: photo", "category: photo\nmodel: 3", 5, "model is a number"),
        ("category: photo", "category: photo\nadd_think_block: 1", 5, "add_think_block '1' should be true or false"),
        ("category: photo", "category: photo\nadd_think_block: yes", 5, "'yes' should be true or false"),
        ("category: photo", "category: photo\nadd_think_block: 'true'", 5, "should be true or false"),
        ("category: photo", "category: photo\nadd_think_block: !!bool maybe", 5, "should be true or false"),
        ("category: photo", "category: photo\nthinking_content:", 5, "thinking_content is empty"),
        ("photo", "photo\nthinking_content: A\nadd_think_block: false", 6, "add_think_block is false, but"),
        ("Mine", "a: b", 3, "broken YAML: mapping values are not allowed here"),
        ("Mine", "'open", 3, "broken YAML: found unexpected end of stream"),
        ("description", "\tdescription", 3, "broken YAML"),
        ("Mine", '"\\UFFFFFFFF"', 3, "broken YAML"),
        ("category: photo", "...\ncategory: photo", 5, "broken YAML"),
        ("Mine", '"\\ud800"', 3, "U+D800"),
        ("Mine", '"\\0"', 3, "U+0000"),
        ("Mine", "&a Mine", 3, "anchors and aliases"),
        ("Mine", "*a", 3, "anchors and aliases"),
        ("Mine", '"\\x3cthink>"', 3, "'<think>' is a control token"),
        ("The text.", "One.\n\nTwo <|im_end|> three.", 8, "'<|im_end|>' is a control token"),
        ("The text.", "a\n</think>", 7, "'</think>' is a control token"),
        ("The text.", "a\x00b", 6, "U+0000"),
        ("The text.", "a\rb", 6, "U+000D"),
        ("The text.", "a\u2028b", 6, "U+2028"),
        ("The text.", "", 5, "so the template does nothing"),
        ("The text.", "word " * 14_000, 6, "65,536 bytes"),
        ("my-own", "my-other", 2, "name 'my-other' should be 'my-own'"),
        ("my-own", "My own", 2, "name 'My own' may contain only a-z"),
        ("my-own", "my--own", 2, "single hyphens"),
    ],
)
def test_what_is_not_understood_is_an_error_with_file_and_line(tmp_path, old, new, line, message):
    path = written(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(TemplateError) as raised:
        read_template(path)
    assert str(raised.value).startswith(f"{path}, line {line}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_bytes_that_are_no_text(tmp_path):
    with pytest.raises(TemplateError, match=r"my-own\.md, line 6: not UTF-8: byte 0xff"):
        read_template(written(tmp_path, GOOD.encode().replace(b"text", b"\xff")))


def test_an_alias_bomb_is_refused(tmp_path):
    bomb = "a: &a [x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    with pytest.raises(TemplateError, match="line 2: anchors and aliases"):
        read_template(written(tmp_path, f"---\n{bomb}---\n"))


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(TemplateError, match=r"none\.md cannot be read: there is no such file"):
        read_template(tmp_path / "none.md")
    with pytest.raises(TemplateError, match="cannot be read: it is not a file"):
        read_template(tmp_path)
    os.mkfifo(tmp_path / "pipe.md")
    with pytest.raises(TemplateError, match="cannot be read: it is not a file"):
        read_template(tmp_path / "pipe.md")


# A thousand damaged files: (bytes, must it be refused?)


def a_line(rng, lines, front):
    return rng.randrange(1, front) if rng.random() < 0.7 else rng.randrange(len(lines))


def truncated(rng, data, front):
    cut = rng.randrange(len(data))
    return data[:cut], data[:cut].count(b"\n") < front


def line_deleted(rng, data, front):
    lines = data.split(b"\n")
    at = a_line(rng, lines, front)
    needed = at in (0, front) or lines[at].split(b":")[0].decode() in REQUIRED
    return b"\n".join(lines[:at] + lines[at + 1 :]), needed and at <= front


def line_doubled(rng, data, front):
    lines = data.split(b"\n")
    at = a_line(rng, lines, front)
    return b"\n".join(lines[: at + 1] + lines[at:]), at < front


def key_renamed(rng, data, front):
    lines = data.split(b"\n")
    at, sign = rng.randrange(1, front), rng.choice([b"x", b"_", b"-", b" ", b"E", b"\xc3\xa9"])
    lines[at] = lines[at].replace(b":", sign + b":", 1)
    return b"\n".join(lines), sign != b" "


def bytes_flipped(rng, data, front):
    damaged = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(damaged), False


def wrong_type(rng, data, front):
    lines = data.split(b"\n")
    at = rng.randrange(1, front)
    value = rng.choice(
        [b"3", b"1.5", b"[a]", b"{a: b}", b"", b"~", b"2026-01-01", b"!!binary aGk=", b"\n  a: b", b"*x"]
    )
    lines[at] = lines[at].split(b":")[0] + b": " + value
    return b"\n".join(lines), True


def tab_put_in(rng, data, front):
    lines = data.split(b"\n")
    at = a_line(rng, lines, front)
    lines[at] = b"\t" + lines[at]
    return b"\n".join(lines), at <= front


def made_huge(rng, data, front):
    at = rng.choice([0, data.index(b"category"), len(data)])
    return data[:at] + rng.choice([b"x", b"[", b"- ", b"\n", b"a: b\n"]) * MAX_BYTES + data[at:], True


def intruder(rng, data, front):
    at = rng.randrange(len(data))
    token = rng.choice(
        [b"<|im_start|>", b"<|im_end|>", b"<think>", b"</think>", b"\x00", b"\x1b[31m", b"\xff", b"\xc2\x85"]
    )
    return data[:at] + token + data[at:], True


def noise(rng, data, front):
    at = rng.randrange(len(data))
    signs = bytes(rng.choice(b" \t\n:#-'\"[]{}&*!|>%@`?,x\\") for _ in range(rng.randrange(1, 12)))
    return data[:at] + signs + data[at:], False


MUTATIONS = (
    truncated,
    line_deleted,
    line_doubled,
    key_renamed,
    bytes_flipped,
    wrong_type,
    tab_put_in,
    made_huge,
    intruder,
    noise,
)


def assert_valid(template: Template):
    assert template.name == template.path.stem
    for key in (*REQUIRED, "model"):
        assert getattr(template, key).strip(), key
    assert template.add_think_block in (None, True, False)
    parts = [template.system_prompt, template.thinking_content, template.assistant_content]
    assert template.add_think_block is not None or any(parts)
    assert all(part is None or isinstance(part, str) for part in parts)
    "\n".join(filter(None, parts)).encode()


def read_or_refuse(path: Path) -> tuple[Template | None, str | None]:
    try:
        return read_template(path), None
    except TemplateError as error:
        return None, str(error)


def test_a_thousand_damaged_files(tmp_path):
    names = sorted(p.name for p in FOLDER.glob("*.md") if p.name != "README.md")
    chosen = ["reasoned-text-layout.md", "illustration-decided-caption.md", "rewrite-photo.md", *names[::23]]
    refused, seconds = 0, 0.0
    for seed in range(1000):
        mutate, name = MUTATIONS[seed % len(MUTATIONS)], chosen[seed // len(MUTATIONS) % len(chosen)]
        data = (FOLDER / name).read_bytes()
        damaged, must_fail = mutate(random.Random(seed), data, data.split(b"\n").index(b"---", 1))
        path, start = written(tmp_path, damaged, name), time.perf_counter()
        template, message = read_or_refuse(path)
        seconds += time.perf_counter() - start
        refused += message is not None
        if message is None:
            assert not must_fail, (seed, mutate.__name__, damaged[:400])
            assert_valid(template)
        else:
            line = re.fullmatch(rf"{re.escape(str(path))}, line (\d+): .+", message)
            assert line, (seed, message)
            assert 1 <= int(line[1]) <= damaged.count(b"\n") + 1, (seed, message)
    assert 500 < refused < 950
    assert seconds < 4


# Which templates there are -------------------------------------------------------------------------------------------


def test_the_users_own_go_before_the_shipped(own):
    templates = Templates.open(own)
    assert templates.get("photo-overcast").description == "曇り"
    assert templates.get("photo-golden-hour").path.parent == FOLDER
    assert [templates.origin(n) for n in ("my-own", "photo-overcast", "photo-golden-hour")] == [
        "own",
        "override",
        "shipped",
    ]
    names = [t.name for t in templates.list()]
    assert "my-own" in names
    assert names.count("photo-overcast") == 1
    assert templates.stored_count("photo-overcast") is None, "the stored count is of the shipped one"


def test_getting_one_reads_one_file(own, monkeypatch):
    (own / "broken.md").write_text("?")
    read = []
    monkeypatch.setattr(module, "read_template", lambda path: read.append(path) or read_template(path))
    templates = Templates.open(own)
    assert templates.get("my-own") is templates.get("my-own")
    assert read == [own / "my-own.md"]
    with pytest.raises(TemplateError, match=r"broken\.md, line 1"):
        templates.list()


def test_unknown_names_offer_the_nearest():
    templates = Templates.open()
    with pytest.raises(RequestError, match="no template 'photo-overcats'; did you mean 'photo-overcast'"):
        templates.get("photo-overcats")
    with pytest.raises(RequestError, match=r"no template '\.\./secret'"):
        templates.get("../secret")
    with pytest.raises(RequestError, match="no category 'lettring'; did you mean 'lettering'"):
        templates.list("lettring")


def test_two_files_of_one_name(own):
    (own / "my-own.MD").write_text(GOOD)
    if len(list(own.iterdir())) == 2:
        pytest.skip("this file system knows no capitals")
    with pytest.raises(TemplateError, match=r"my-own\.md, line 1: my-own\.MD beside it has the same name"):
        Templates.open(own)


def test_what_editors_leave_is_no_template(own):
    (own / "README.md").write_text("# My templates")
    (own / ".my-own.md.swp").write_text("?")
    (own / "._my-own.md").write_text("?")
    (own / "notes.txt").write_text("?")
    assert len(Templates.open(own).list(hidden=True)) == len(Templates.open().list(hidden=True)) + 1


def test_rewriters_are_hidden_until_asked_for():
    templates = Templates.open()
    assert REWRITER not in {t.category for t in templates.list()}
    assert {t.category for t in templates.list(REWRITER)} == {REWRITER}
    assert {t.category for t in templates.search(["rewrite"])} == {REWRITER}
    assert REWRITER not in {t.category for t in templates.search(["prompt"])}


def test_search_ranks_the_name_before_the_text():
    templates = Templates.open()
    assert templates.search(["neon"])[0].name in ("lighting-neon-practical", "signage-neon-tube")
    assert templates.search(["HARBOUR fog"])[0].name == "season-harbour-fog"
    grain = templates.search(["grain"])
    assert len(grain) > 10
    assert all(re.search(r"\bgrain", f"{t.description} {t.system_prompt}", re.IGNORECASE) for t in grain)
    assert templates.search(["(["]) == templates.search([" "]) == templates.search([]) == []


def test_where_the_users_folder_is(tmp_path, monkeypatch):
    monkeypatch.setenv("ZIMAGE_TEMPLATES", str(tmp_path))
    assert user_folder() == tmp_path
    monkeypatch.delenv("ZIMAGE_TEMPLATES")
    monkeypatch.setenv("APPDATA" if sys.platform == "win32" else "XDG_CONFIG_HOME", str(tmp_path))
    assert user_folder() is None
    (tmp_path / "zimage" / "templates").mkdir(parents=True)
    assert user_folder() == tmp_path / "zimage" / "templates"


# What ships ----------------------------------------------------------------------------------------------------------


def test_the_shipped_set_is_large_and_varied(shipped):
    categories = Templates.open().categories()
    assert len(shipped) >= 145
    assert len(categories) >= 22
    assert categories[REWRITER] >= 4
    assert min(categories.values()) >= 4
    assert len({t.description for t in shipped}) == len({t.system_prompt for t in shipped}) == len(shipped)


def test_shipped_templates_keep_to_their_form(shipped):
    for t in shipped:
        assert 40 <= len(t.system_prompt.split()) <= 120, t.name
        assert 15 <= len(t.description) <= 70, t.name
        assert '"' not in t.system_prompt, f"{t.name}: the model paints quoted text"
        assert not re.search(r"masterpiece|\b[48]k\b|best quality|ultra-|trending", t.system_prompt, re.IGNORECASE), (
            t.name
        )
        assert t.model == ("qwen3" if t.category == REWRITER else "z-image"), t.name
    assert {key for t in shipped for key in OPTIONAL if getattr(t, key) is not None} == set(OPTIONAL)


def test_no_two_shipped_templates_are_alike(shipped):
    def grams(text):
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    sets = {t.name: grams(t.system_prompt) for t in shipped}
    for a, b in combinations(sets, 2):
        assert len(sets[a] & sets[b]) <= 0.1 * min(len(sets[a]), len(sets[b])), (a, b)


def test_rewriters_ask_for_the_prompt_alone(shipped):
    for t in shipped:
        if t.category == REWRITER:
            assert re.search(r"\b(only|alone|nothing else)\b", t.system_prompt[-60:]), t.name
            assert "quote" in t.system_prompt.lower(), t.name


# Token counts --------------------------------------------------------------------------------------------------------


def test_every_shipped_template_has_a_plausible_count(shipped):
    counts = json.loads((FOLDER / "tokens.json").read_text(encoding="utf-8"))
    assert list(counts) == sorted(t.name for t in shipped), "run: python -m zimage.templates.count TOKENIZER_FOLDER"
    for t in shipped:
        parts = (t.system_prompt, t.thinking_content, t.assistant_content)
        words = sum(len(re.findall(r"\w+|[^\w\s]", part)) for part in parts if part)
        assert 0.95 <= counts[t.name] / words <= 1.35, t.name


def test_added_tokens_are_those_of_the_parts():
    def count(**parts):
        return count_added_tokens(Template("a", "b", "c", **parts), list)  # a character each

    assert count() == count(add_think_block=False) == 0
    assert count(system_prompt="abc") == len("<|im_start|>system\nabc<|im_end|>\n")
    assert count(add_think_block=True) == len("<think>\n\n</think>\n\n")
    assert count(thinking_content="abc") == len("<think>\nabc\n</think>\n\n")
    assert count(assistant_content="abc") == len("abc<|im_end|>")


def test_the_counts_can_be_made_anew(tmp_path, shipped):
    command = [sys.executable, "-m", "zimage.templates.count", DEMO / "tokenizer", "-o", tmp_path / "t.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    encode = Tokenizer.load(DEMO / "tokenizer").encode
    made = json.loads((tmp_path / "t.json").read_text())
    assert made == {t.name: count_added_tokens(t, encode) for t in shipped}
    assert (tmp_path / "t.json").read_text().count("\n") == len(shipped) + 2
    assert os.listdir(tmp_path) == ["t.json"]
    failed = subprocess.run([*command[:3], tmp_path], capture_output=True, text=True)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert "should hold tokenizer.json" in failed.stderr


# Commands ------------------------------------------------------------------------------------------------------------


def test_list_shows_columns_by_category(run, shipped):
    status, out, err = run("list")
    assert status == 0
    lines = out.splitlines()
    assert re.fullmatch("3d +tokens", lines[0])
    rows = [re.fullmatch(r"  ([a-z0-9-]+) +(\d+)  (\S.*)", line) for line in lines if line.startswith("  ")]
    assert all(rows)
    assert {row[1] for row in rows} == {t.name for t in shipped if t.category != REWRITER}
    assert {row.end(2) for row in rows} == {len(lines[0])}
    assert len({row.start(3) for row in rows}) == 1
    assert re.fullmatch(r"\d+ templates in \d+ categories; zimage templates show \S+\n", err)
    assert not any(line.startswith(REWRITER) for line in lines)
    assert any(line.startswith(REWRITER) for line in run("list", "--all")[1].splitlines())


def test_list_of_one_category_and_as_json(run, shipped):
    out = run("list", "--category", "rewriter", "--json")[1]
    facts = json.loads(out)
    assert [f["name"] for f in facts] == [t.name for t in shipped if t.category == REWRITER]
    assert set(facts[0]) == {*REQUIRED, *OPTIONAL, "system_prompt", "path", "tokens", "origin"}
    assert run("list", "--category", "lettering")[1].startswith("lettering ")


def test_rows_are_cut_to_the_width(run, own, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    (own / "my-own.md").write_text(GOOD.replace("Mine", "曇り" * 30))
    out = run("list", "--category", "photo", "--templates", own)[1]
    row = next(line for line in out.splitlines() if "my-own" in line)
    assert row.endswith("…")
    wide = sum(1 + (sign > "\u3000") for sign in row)
    assert wide in (49, 50)
    assert max(map(len, out.splitlines())) <= 50


def test_own_templates_are_marked(run, own, monkeypatch):
    monkeypatch.setenv("ZIMAGE_TEMPLATES", str(own))
    out = run("list", "--category", "photo")[1]
    assert re.search(r"  my-own +-  \[own\] Mine\n", out)
    assert re.search(r"  photo-overcast +-  \[own, overrides shipped\] 曇り\n", out)
    assert "tokens       - (not counted: pass --model)" in run("show", "my-own")[1]


def test_a_models_tokenizer_counts_all(run, own):
    expected = count_added_tokens(read_template(own / "my-own.md"), Tokenizer.load(DEMO / "tokenizer").encode)
    for model in (DEMO, DEMO / "tokenizer", DEMO / "model_index.json"):
        assert (
            json.loads(run("show", "my-own", "--json", "--templates", own, "--model", model)[1])["tokens"] == expected
        )
    status, out, err = run("list", "--model", own / "none")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "none does not exist" in err


def test_show_prints_facts_and_parts(run, monkeypatch):
    status, out, err = run("show", "reasoned-text-layout")
    assert (status, err) == (0, "")
    template = Templates.open().get("reasoned-text-layout")
    assert out.endswith(
        f"\nsystem prompt\n{template.system_prompt}\n\nthinking content\n{template.thinking_content}\n"
    ), "in a pipe the text is as it is"
    assert re.search(r"^tokens       \d+$", out, re.MULTILINE)
    assert f"file         {template.path} (shipped)" in out
    monkeypatch.setenv("COLUMNS", "60")
    wrapped = run("show", "illustration-decided-caption")[1].split("\nsystem prompt\n")
    assert max(map(len, wrapped[1].splitlines())) <= 60
    assert "think block  on" in wrapped[0]


def test_search_prints_what_it_found(run):
    status, out, err = run("search", "harbour", "fog")
    assert (status, out.count("\n")) == (0, 1)
    assert re.match(r"season-harbour-fog  season +\d+ tokens  ", out)
    assert err == "1 template with the most of these words; zimage templates show season-harbour-fog\n"
    assert [f["name"] for f in json.loads(run("search", "harbour", "fog", "--json")[1])] == ["season-harbour-fog"]
    assert run("search", "xyzzy") == (0, "", "no match; zimage templates list shows all\n")


def test_failures_are_one_line(run, own):
    (own / "broken.md").write_text("---\nname: broken\n---\nx")
    for arguments, message in (
        (("show", "none-such"), "there is no template"),
        (("list", "--category", "fotografie"), "there is no category"),
        (("list", "--templates", own / "none"), "cannot be read"),
        (("list", "--templates", own), "broken.md, line 1: the front matter lacks description and category"),
    ):
        status, out, err = run(*arguments)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert message in err
        assert err.count("\n") == 1
    assert run("show", "my-own", "--templates", own)[0] == 0, "a broken file beside it does not matter"


def test_listing_is_quick_and_loads_no_torch():
    code = "import sys; from zimage.cli import main; main(['templates', 'list']); sys.exit('torch' in sys.modules)"
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) <= 0.5


# ------------------------------------------------------------------ folders and front matter of any shape


SHAPES = (
    "- - a", "[[a]]", "- a\n- b", "? [a]\n: b", "? - a\n: b", "[]", "{}", "-\n  -\n    - a", "{a: [b]}", "!!set {a}",
    "*a", "- &a b", "<<: {a: b}", "<<: [a]", "%YAML 1.1", "...", ": :", "'", "? |\n  x\n: y", 'a: "\\U00110000"',
    "[" * 20_000, "- " * 20_000, "? " * 20_000, "a: " * 20_000, "&" * 60_000, "!" * 60_000, "'" * 60_000,
    "{a: " * 15_000,
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape[:12])
def test_front_matter_of_any_shape_is_a_line(tmp_path, shape):
    path = tmp_path / "x.md"
    path.write_text(f"---\n{shape}\n---\nbody\n")
    begun = time.perf_counter()
    with pytest.raises(TemplateError, match=r"x\.md, line \d+: ") as error:
        read_template(path)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - begun < 5


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_what_is_no_file_is_not_waited_for(tmp_path, make):
    make(tmp_path / "x.md")
    with pytest.raises(TemplateError, match=r"x\.md cannot be read: it is not a file"):
        Templates.open(tmp_path).list()


def test_a_folder_of_a_thousand_templates(tmp_path):
    text = "---\nname: t{0}\ndescription: x\ncategory: c{0}\n---\nbody\n"
    for i in range(1000):
        (tmp_path / f"t{i}.md").write_text(text.format(i))
    begun = time.perf_counter()
    templates = Templates.open(tmp_path)
    assert templates.categories()["c7"] == 1
    assert len(templates.list("c999")) == 1
    assert time.perf_counter() - begun < 20  # 1.5 s on an idle core
    with pytest.raises(RequestError) as error:
        templates.get("y" * 100_000)
    assert len(str(error.value)) < 300
