"""The history: pictures found, deleted and brought back, and an index that always agrees with the folder."""

import json
import os
import time
from pathlib import Path

import pytest
from histories import START, consistent, draw, fill, folder, history, ids, job_id
from PIL import Image

from zimage.errors import RequestError
from zimage.pictures.files import read_metadata
from zimage.serve import history as module
from zimage.serve.refusals import NoRoom, NotFound

ID = "20261127-174501-3fa9c2-1"


@pytest.fixture
def kept(tmp_path):
    found = history(tmp_path)
    yield found
    found.database.close()


def again(kept, **limits):
    """The history after the server was started anew."""
    kept.database.close()
    return history(kept.files.pictures.parent, **limits)


# ------------------------------------------------------------------ looking


def test_a_picture_says_what_its_file_says(kept):
    path = draw(kept.files.path(ID), "a cat", seed=7, size=(48, 32), created=START + 0.5)
    picture = kept.add(path, ID, "20261127-174501-3fa9c2")
    assert kept.get(ID) == picture
    plain = json.loads(json.dumps(picture.plain(), allow_nan=False))
    assert plain == {
        "id": ID,
        "job": "20261127-174501-3fa9c2",
        "url": f"/api/images/{ID}",
        "thumbnail": f"/api/images/{ID}/thumbnail",
        "width": 48,
        "height": 32,
        "seed": 7,
        "prompt": "a cat",
        "created": START + 0.5,
        "bytes": path.stat().st_size,
        "settings": read_metadata(path),
    }
    assert kept.file(ID) == path


def test_a_picture_from_elsewhere_is_moved_in(kept, tmp_path):
    kept.add(draw(tmp_path / "part.png"), ID, "job")
    assert kept.file(ID).is_file()
    assert not (tmp_path / "part.png").exists()
    assert [picture.id for picture in kept.of_job("job")] == [ID]


def test_a_picture_that_is_drawn_again_has_one_row(kept):
    kept.add(draw(kept.files.path(ID), "first"), ID, "job")
    kept.add(draw(kept.files.path(ID), "second"), ID, "job")
    assert [p.prompt for p in kept.page().pictures] == ["second"]


def test_the_largest_seed_is_told_to_the_last_digit(kept):
    kept.add(draw(kept.files.path(ID), seed=2**64 - 1), ID, "job")
    assert kept.get(ID).seed == 2**64 - 1


def test_pages_have_every_picture_once_newest_first(kept):
    made, found, cursor = fill(kept, 23), [], None
    while True:
        page = kept.page(before=cursor, limit=5)
        found += ids(page)
        assert page.total == 23
        if (cursor := page.next) is None:
            break
    assert found == made


def test_pictures_of_one_moment_are_all_paged(kept):
    for i in range(7):
        kept.add(draw(kept.files.path(f"x-{i}"), created=START), f"x-{i}", "")
    first = kept.page(limit=4)
    assert ids(first) + ids(kept.page(before=first.next, limit=4)) == [f"x-{i}" for i in reversed(range(7))]


def test_a_page_stays_where_it_is_while_pictures_come_and_go(kept):
    made = fill(kept, 12)
    first = kept.page(limit=4)
    kept.add(draw(kept.files.path("newest")), "newest", "")
    kept.delete([made[3], made[1], made[6]])  # the cursor's own among them
    assert ids(kept.page(before=first.next, limit=4)) == [made[4], made[5], made[7], made[8]]


PROMPTS = {
    "a": "A Red fox at 100% speed, file_name.txt",
    "b": "a red cat on a blue ground",
    "c": "一只红色的狐狸在雪地里",
    "d": "Straße im Schnee, CAFÉ",
    "e": "ｆｕｌｌ width",
    "f": "",
}


@pytest.mark.parametrize(
    ("q", "found"),
    [
        ("", "abcdef"),
        ("red", "ab"),
        ("RED fox", "a"),
        ("fox red", "a"),
        ("red cat fox", ""),
        ("  red   cat ", "b"),
        ("狐狸", "c"),
        ("狐狸 雪", "c"),
        ("红", "c"),
        ("狐狸 cat", ""),
        ("100%", "a"),
        ("%", "a"),
        ("_", "a"),
        ("e_n", "a"),
        ("r_d", ""),
        ("STRASSE", "d"),
        ("café", "d"),
        ("cafe\u0301", "d"),
        ("full", "e"),
        ("'\"; DROP TABLE images --", ""),
        ("\0", ""),
        ("\ud800", ""),
    ],
)
def test_a_search_finds_prompts_with_every_word(tmp_path_factory, q, found, request):
    kept = request.getfixturevalue("searched")
    page = kept.page(q)
    assert "".join(sorted(ids(page))) == found
    assert kept.total(q) == page.total == len(found)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    kept = history(tmp_path_factory.mktemp("searched"))
    for id, prompt in PROMPTS.items():
        kept.add(draw(kept.files.path(id), prompt), id, "")
    yield kept
    kept.database.close()


def test_pages_of_a_search_go_on_with_the_search(kept):
    made = fill(kept, 9, prompt=lambda i: "odd one" if i % 2 else "even one")
    first = kept.page("odd", limit=2)
    assert first.total == 4
    assert ids(first) + ids(kept.page("odd", first.next, limit=2)) == made[1::2]


@pytest.mark.parametrize(
    "before", ["", "x", "1", "1_", "_a", "99999999999999999999_a", "9999999999999999999_a", "1_a b", "٣_a"]
)
def test_what_is_not_a_cursor_is_refused(kept, before):
    with pytest.raises(RequestError, match="is not a cursor") as caught:
        kept.page(before=before)
    assert caught.value.fields == ("before",)


def test_words_beyond_number_are_refused(kept):
    with pytest.raises(RequestError, match="at most 32") as caught:
        kept.page("a " * 33)
    assert caught.value.fields == ("q",)


OUTSIDE = [
    "",
    ".",
    "..",
    "../x",
    "a/../../x",
    "/etc/passwd",
    "a\\b",
    "a\0b",
    "a\n",
    ".hidden",
    "-x",
    "é",
    "a" * 101,
    "\ud800",
]


@pytest.mark.parametrize("id", OUTSIDE)
def test_an_id_never_names_a_file_outside(kept, tmp_path, id):
    draw(tmp_path / "x.png")
    for look in (kept.get, kept.file, kept.thumbnail, lambda id: kept.add(tmp_path / "x.png", id, "")):
        with pytest.raises(NotFound):
            look(id)
    assert kept.delete([id]) == kept.restore([id]) == []
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize("name", ["get", "file", "thumbnail"])
def test_a_picture_that_is_not_there_is_not_found(kept, name):
    with pytest.raises(NotFound, match="no picture 20261127"):
        getattr(kept, name)(ID)


# ------------------------------------------------------------------ thumbnails


def opened(data, tmp_path):
    (tmp_path / "t.webp").write_bytes(data)
    with Image.open(tmp_path / "t.webp") as image:
        image.load()
        return image


def test_a_thumbnail_is_small_and_kept(kept, tmp_path):
    kept.add(draw(kept.files.path(ID), size=(640, 960)), ID, "job")
    image = opened(kept.thumbnail(ID), tmp_path)
    assert (image.format, image.size) == ("WEBP", (213, 320))
    (file,) = kept.files.thumbnails.iterdir()
    file.write_bytes(b"kept")
    assert kept.thumbnail(ID) == b"kept"


def test_a_thumbnail_follows_its_picture(kept, tmp_path):
    kept.add(draw(kept.files.path(ID)), ID, "job")
    kept.thumbnail(ID)
    later = time.time() + 5
    kept.add(draw(kept.files.path(ID), seed=3, created=later), ID, "job")
    assert abs(opened(kept.thumbnail(ID), tmp_path).convert("RGB").getpixel((9, 9))[0] - 120) < 6


def test_a_small_picture_is_not_enlarged(kept, tmp_path):
    kept.add(draw(kept.files.path(ID)), ID, "job")
    assert opened(kept.thumbnail(ID), tmp_path).size == (32, 32)


def test_a_thumbnail_is_shown_also_where_it_cannot_be_kept(kept, monkeypatch, caplog):
    kept.add(draw(kept.files.path(ID)), ID, "job")
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert kept.thumbnail(ID)[8:12] == b"WEBP"
    assert "cannot be kept" in caplog.text


def test_a_picture_whose_pixels_are_damaged_has_no_thumbnail(kept):
    path = draw(kept.files.path(ID), size=(64, 64))
    whole = path.read_bytes()
    at = whole.index(b"IDAT")
    path.write_bytes(whole[: at + 6] + bytes(len(whole) - at - 18) + whole[-12:])
    kept.add(path, ID, "job")
    with pytest.raises(NotFound, match="cannot be shown"):
        kept.thumbnail(ID)


# ------------------------------------------------------------------ deleting


def test_what_is_deleted_can_be_brought_back_as_it_was(kept):
    made = fill(kept, 5)
    before = kept.page()
    assert kept.delete([made[1], "unknown", made[3], made[1]]) == [made[1], made[3]]
    assert ids(kept.page()) == [made[0], made[2], made[4]]
    for look in (kept.get, kept.file, kept.thumbnail):
        with pytest.raises(NotFound):
            look(made[1])
    assert kept.restore([made[3], made[1], made[0], "unknown"]) == [made[3], made[1]]
    assert kept.page() == before


def test_all_are_deleted_and_brought_back(kept, monkeypatch):
    monkeypatch.setattr(module, "TOGETHER", 3)
    made = fill(kept, 8)
    assert sorted(kept.delete_all()) == sorted(made)
    assert kept.page().total == 0
    assert kept.restore(made) == made
    assert ids(kept.page()) == made


def test_the_trash_is_emptied_after_ten_minutes(kept, monkeypatch):
    made = fill(kept, 3)
    kept.thumbnail(made[0])
    kept.delete(made[:1])
    kept.tidy()
    assert folder(kept)["trash"] == [f"{made[0]}.png"]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 599)
    kept.tidy()
    assert kept.restore(made[:1]) == made[:1]
    kept.delete(made[:1])
    monkeypatch.setattr(time, "time", lambda: now + 599 + 601)
    kept.tidy()
    assert folder(kept)["trash"] == []
    assert list(kept.files.thumbnails.iterdir()) == []
    assert kept.restore(made[:1]) == []


def test_a_start_empties_the_trash_and_leaves_what_is_fresh(kept, monkeypatch):
    made = fill(kept, 2)
    kept.delete(made[:1])
    kept = again(kept)
    assert kept.restore(made[:1]) == made[:1]
    kept.delete(made[:1])
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 601)
    kept = again(kept)
    assert folder(kept)["trash"] == []
    kept.database.close()


def test_what_somebody_took_away_is_forgotten_when_it_is_deleted(kept):
    made = fill(kept, 2)
    kept.file(made[0]).unlink()
    assert kept.delete(made) == made[1:]
    assert kept.page().total == 0
    kept.files.in_trash(made[1]).unlink()
    assert kept.restore(made) == []


def test_a_name_that_is_taken_is_not_overwritten_by_what_comes_back(kept):
    (made,) = fill(kept, 1)
    kept.delete([made])
    draw(kept.files.path(made), "another")
    assert kept.restore([made]) == []
    assert read_metadata(kept.files.path(made))["request"]["prompt"] == "another"


def test_deleting_fails_as_a_whole(kept, monkeypatch):
    made, move = fill(kept, 3), os.replace

    def failing(source, target):
        if made[2] in str(source):
            raise OSError(28, "No space left on device")
        move(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(NoRoom):
        kept.delete(made)
    assert ids(kept.page()) == made
    assert folder(kept) == {"pictures": sorted(f"{id}.png" for id in made), "trash": []}


# ------------------------------------------------------------------ limits


def test_nothing_goes_unless_a_limit_is_configured(kept):
    fill(kept, 3)
    kept = again(kept)
    assert kept.tidy() == []
    assert kept.total() == 3
    kept.database.close()


def test_pictures_go_by_age(kept, caplog):
    day, now = 86_400, time.time()
    for i, age in enumerate((1, 29, 31, 400)):
        kept.add(draw(kept.files.path(f"x-{i}"), created=now - age * day), f"x-{i}", "")
    kept.keep_days = 30
    assert sorted(kept.tidy()) == ["x-2", "x-3"]
    assert ids(kept.page()) == ["x-0", "x-1"]
    assert "2 pictures past 30 days of age are deleted" in caplog.text
    assert "x-3" in caplog.text


def test_the_oldest_go_by_size(kept, caplog):
    made = fill(kept, 5)
    sizes = {id: kept.get(id).bytes for id in made}
    kept.keep_gb = (sizes[made[0]] + sizes[made[1]]) / 1e9
    assert sorted(kept.tidy()) == sorted(made[2:])
    assert "3 pictures past" in caplog.text
    assert kept.restore(made[2:]) == made[2:]


def test_no_limit_takes_what_has_just_been_drawn(kept):
    kept.add(draw(kept.files.path(ID)), ID, "job")
    kept.keep_gb = 1e-9
    assert kept.tidy() == []


# ------------------------------------------------------------------ the folder is the truth


def rows(kept):
    with kept.database.reading() as db:
        return db.execute("SELECT * FROM images ORDER BY id").fetchall()


def test_an_index_is_rebuilt_from_the_folder_alone(kept):
    made = fill(kept, 6)
    kept.delete(made[:2])
    before, page = rows(kept), kept.page()
    (kept.files.pictures.parent / "index.sqlite").touch()
    kept.database.close()
    for file in kept.files.pictures.parent.glob("index.sqlite*"):
        file.unlink()
    kept = history(kept.files.pictures.parent)
    assert [row[:-1] for row in rows(kept)] == [row[:-1] for row in before]
    assert kept.page() == page
    assert kept.restore(made[:2]) == made[:2]
    kept.reindex()
    assert ids(kept.page()) == made
    assert kept.get(made[0]).job == job_id(5)
    kept.database.close()


def test_pictures_that_are_put_there_are_taken_in_and_others_named(kept, caplog):
    place = kept.files.pictures
    draw(place / "my-cat_1.png", "dropped in")
    Image.new("RGB", (8, 8)).save(place / "holiday.png")
    draw(place / "a name with blanks.png")
    draw(place / "other.jpg")
    whole = draw(place / "cut.png", size=(256, 256)).read_bytes()
    (place / "cut.png").write_bytes(whole[:-30])
    (place / "empty.png").touch()
    (place / "folder.png").mkdir()
    (place / "link.png").symlink_to(place / "my-cat_1.png")
    (place / "listing.txt").write_text("mine")
    (place / ".hidden").touch()
    before = folder(kept)["pictures"]
    caplog.clear()
    kept.reindex()
    assert ids(kept.page()) == ["my-cat_1"]
    assert folder(kept)["pictures"] == before
    named = {line.getMessage().split("pictures/")[1].split(".")[0] for line in caplog.records}
    assert named == {"holiday", "a name with blanks", "other", "cut", "empty", "folder", "link", "listing"}
    assert all("left alone" in line.getMessage() for line in caplog.records)


def test_ten_thousand_strange_files_do_not_fill_the_log(kept, caplog):
    for i in range(50):
        (kept.files.pictures / f"{i}.txt").touch()
    caplog.clear()
    kept.recover()
    assert len(caplog.records) == 21
    assert "30 more" in caplog.text


HOSTILE = {
    "half a character": '{"request": {"prompt": "a \\ud800 cat", "seed": 1}}',
    "half a character in a name": '{"request": {"prompt": "a", "seed": 1}, "\\udfff": 1}',
    "zero bytes": '{"request": {"prompt": "a\\u0000b", "seed": 1}}',
}
NONE = (
    '{"request": {"prompt": "a", "seed": 1, "shift": NaN}}',
    '{"request": {"prompt": "a", "seed": 1, "shift": 1e999}}',
    '{"request": {"prompt": "a"}}',
    '{"request": {"prompt": ["a"], "seed": 1}}',
    '{"request": {"prompt": "a", "seed": "1"}}',
    '{"request": []}',
    "{",
    "[1]",
    '{"a": 1}',
)


@pytest.mark.parametrize("kind", HOSTILE)
def test_settings_of_any_kind_can_be_answered(kept, kind):
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_itxt("zimage", HOSTILE[kind])
    Image.new("RGB", (8, 8)).save(kept.files.path("x"), pnginfo=chunks)
    kept.recover()
    (picture,) = kept.page().pictures
    json.dumps(picture.plain(), ensure_ascii=False, allow_nan=False).encode()


@pytest.mark.parametrize("text", NONE)
def test_settings_that_are_none_are_left_alone(kept, text, caplog):
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_itxt("zimage", text)
    Image.new("RGB", (8, 8)).save(kept.files.path("x"), pnginfo=chunks)
    kept.recover()
    assert kept.page().total == 0
    assert "x.png" in caplog.text


def test_a_start_puts_right_whatever_was_interrupted(kept):
    made = fill(kept, 6)
    files = kept.files
    draw(files.path("written-only"))
    files.path(made[0]).unlink()  # a row without a file
    files.throw_away(made[1])  # moved, and not marked
    kept.delete([made[2], made[3]])
    files.bring_back(made[2])  # brought back, and not marked
    kept.thumbnail(made[4])
    os.replace(files.thumbnails / f"{made[4]}.webp", files.thumbnails / "unknown.webp")
    leftovers = (files.pictures / f".x-{'0' * 32}.png", files.thumbnails / f".x-{'0' * 32}.webp")
    for left in leftovers:
        left.write_bytes(b"half")
    kept = again(kept)
    assert consistent(kept) == {made[1]: 1, made[2]: 0, made[3]: 1, made[4]: 0, made[5]: 0, "written-only": 0}
    assert list(files.thumbnails.iterdir()) == []
    assert kept.restore([made[1]]) == [made[1]]
    kept.database.close()


def test_a_picture_that_was_changed_from_outside_is_read_again(kept):
    (made,) = fill(kept, 1)
    draw(kept.files.path(made), "changed", created=START + 9)
    kept = again(kept)
    assert kept.get(made).prompt == "changed"
    assert kept.get(made).job == job_id(0)
    kept.database.close()


def test_of_two_of_one_id_the_deleted_one_goes(kept):
    (made,) = fill(kept, 1)
    kept.delete([made])
    draw(kept.files.path(made), "another")
    kept.recover()
    assert kept.get(made).prompt == "another"
    assert consistent(kept) == {made: 0}
