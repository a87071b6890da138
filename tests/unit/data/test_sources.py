from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from personvit.config import DataConfig
from personvit.data.sources import FolderSource, ListSource, PathTable, open_source
from personvit.errors import ConfigError, DataError


def relative_paths(source: FolderSource | ListSource) -> list[str]:
    return [os.path.relpath(source.path(i), source.root) for i in range(len(source))]


def test_path_table_keeps_any_bytes_and_order():
    paths = [b"b/1.jpg", "ü.png".encode(), b"latin\xe9.jpg", b"", b"a b.jpg"]
    table = PathTable(paths)
    assert [os.fsencode(table[i]) for i in range(len(table))] == paths
    with pytest.raises(IndexError):
        table[len(paths)]


def test_folder_is_recursive_sorted_by_bytes_and_takes_extensions_in_any_case(tmp_path, write_image):
    for number, name in enumerate(["b/2.PNG", "a.jpeg", "Z.jpg", "b/1.webp", "b/c/3.bmp", "b.JPG", "ä.jpg"]):
        write_image(tmp_path / name, number)
    (tmp_path / "notes.txt").write_text("not an image")
    write_image(tmp_path / ".hidden.jpg", 0)
    write_image(tmp_path / ".thumbnails" / "x.jpg", 0)
    expected = ["Z.jpg", "a.jpeg", "b.JPG", "b/1.webp", "b/2.PNG", "b/c/3.bmp", "ä.jpg"]
    assert relative_paths(FolderSource(tmp_path)) == expected


def test_links_that_leave_the_root_or_lead_to_folders_are_skipped_and_counted(tmp_path, write_image):
    outside = write_image(tmp_path / "outside" / "secret.jpg", 0)
    inside = write_image(tmp_path / "root" / "one.jpg", 1)
    root = inside.parent
    (root / "out.jpg").symlink_to(outside)
    (root / "out_folder").symlink_to(outside.parent)
    (root / "circle").symlink_to(root)
    (root / "dangling.jpg").symlink_to(root / "gone.jpg")
    (root / "again.jpg").symlink_to(inside)
    (tmp_path / "root_twin").mkdir()
    (root / "twin.jpg").symlink_to(write_image(tmp_path / "root_twin" / "t.jpg", 2))
    source = FolderSource(root)
    assert relative_paths(source) == ["again.jpg", "one.jpg"]
    assert source.skipped_links == 5


def test_a_root_that_is_itself_a_link_is_followed(tmp_path, write_image):
    write_image(tmp_path / "store" / "one.jpg", 1)
    (tmp_path / "data").symlink_to(tmp_path / "store")
    assert len(FolderSource(tmp_path / "data")) == 1


def test_empty_folder_names_folder_extensions_and_remedy(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(DataError) as caught:
        FolderSource(tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert all(word in message for word in (".jpg", ".webp", "data.root"))


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        FolderSource(tmp_path / "absent")


def test_only_outside_links_explains_itself(tmp_path, write_image):
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "x.jpg").symlink_to(write_image(tmp_path / "y.jpg", 0))
    with pytest.raises(DataError, match="1 links were skipped"):
        FolderSource(tmp_path / "root")


def test_load_gives_rgb_of_the_file(tmp_path):
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "grey.png")
    Image.new("RGBA", (5, 9), (10, 20, 30, 0)).save(tmp_path / "rgba.png")
    source = FolderSource(tmp_path)
    grey, rgba = np.asarray(source.load(0)), np.asarray(source.load(1))
    np.testing.assert_array_equal(grey, np.arange(64).reshape(8, 8, 1).repeat(3, axis=2))
    np.testing.assert_array_equal(rgba, np.broadcast_to([10, 20, 30], (9, 5, 3)))


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "webp"])
def test_truncated_image_is_an_error_that_names_the_file(tmp_path, write_image, truncate, ending):
    truncate(write_image(tmp_path / f"cut.{ending}", 0))
    with pytest.raises(DataError, match=rf"cut\.{ending}"):
        FolderSource(tmp_path).load(0)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_rubbish_is_an_error(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        FolderSource(tmp_path).load(0)


def test_vanished_file_is_an_error(tmp_path, write_image):
    path = write_image(tmp_path / "x.png", 0)
    source = FolderSource(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        source.load(0)


def test_list_keeps_the_order_and_starts_from_its_folder(tmp_path, write_image):
    for number in range(3):
        write_image(tmp_path / "img" / f"{number}.jpg", number)
    absolute = write_image(tmp_path / "elsewhere" / "x y.jpg", 9)
    list_file = tmp_path / "list.txt"
    list_file.write_text(f"img/2.jpg\r\n\nimg/sub/../0.jpg\n{absolute}\n", encoding="utf-8-sig")
    source = ListSource(list_file)
    assert [source.path(i) for i in range(3)] == [f"{tmp_path}/img/2.jpg", f"{tmp_path}/img/0.jpg", str(absolute)]
    assert len(source) == 3
    assert source.load(2).size == (24, 48)


def test_list_with_another_root(tmp_path, write_image):
    write_image(tmp_path / "store" / "0.jpg", 0)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "a.txt").write_text("0.jpg\n")
    assert ListSource(tmp_path / "lists" / "a.txt", root=tmp_path / "store").load(0).size == (24, 48)


@pytest.mark.parametrize("line", ["../x.jpg", "a/../../x.jpg", ".."])
def test_list_may_not_climb_out(tmp_path, write_image, line):
    write_image(tmp_path / "x.jpg", 0)
    write_image(tmp_path / "root" / "ok.jpg", 0)
    (tmp_path / "root" / "l.txt").write_text(f"ok.jpg\n{line}\n")
    with pytest.raises(DataError, match=r"l\.txt, line 2: .*climbs out"):
        ListSource(tmp_path / "root" / "l.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no path in it"), (b"\x80\x04\x00pickle", "not a text file"), (b"gone.jpg\n", "does not exist")],
)
def test_unusable_lists(tmp_path, content, message):
    (tmp_path / "l.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        ListSource(tmp_path / "l.txt")


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (["pool/a.jpg", "bounding_box_train/0001_c1s1_000001_00.jpg"], "pool/a.jpg"),
        (["bounding_box_train/t.jpg", "query/q.jpg", "bounding_box_test/g.jpg"], "bounding_box_train/t.jpg"),
        (["train/t.jpg", "test/q.jpg", "list_train.txt"], "train/t.jpg"),
        (["train/t.jpg"], "train/t.jpg"),
        (["some/where/x.jpg"], "some/where/x.jpg"),
    ],
)
def test_auto_finds_the_training_images(tmp_path, write_image, layout, expected):
    for name in layout:
        if name.endswith(".txt"):
            (tmp_path / name).write_text("")
        else:
            write_image(tmp_path / name, 0)
    source = open_source(DataConfig(root=str(tmp_path)))
    assert [source.path(i) for i in range(len(source))] == [str(tmp_path / expected)]


def test_auto_takes_a_file_as_list(tmp_path, write_image):
    write_image(tmp_path / "a.jpg", 0)
    (tmp_path / "l.txt").write_text("a.jpg\n")
    assert isinstance(open_source(DataConfig(root=str(tmp_path / "l.txt"))), ListSource)


def test_folder_by_name_takes_everything(tmp_path, write_image):
    for name in ("pool/a.jpg", "bounding_box_train/t.jpg"):
        write_image(tmp_path / name, 0)
    assert len(open_source(DataConfig(name="folder", root=str(tmp_path)))) == 2


def test_layout_by_name_below_a_common_root(tmp_path, write_image):
    write_image(tmp_path / "Market-1501-v15.09.15" / "bounding_box_train" / "0001_c1.jpg", 0)
    source = open_source(DataConfig(name="market1501", root=str(tmp_path)))
    assert Path(source.path(0)).name == "0001_c1.jpg"


def test_named_layout_without_training_folder(tmp_path, write_image):
    write_image(tmp_path / "x.jpg", 0)
    with pytest.raises(DataError, match="bounding_box_train"):
        open_source(DataConfig(name="market1501", root=str(tmp_path)))


def test_unknown_name():
    with pytest.raises(ConfigError, match=r"data\.name=lup .*market1501"):
        open_source(DataConfig(name="lup", root="x"))


def test_the_walk_is_in_the_order_of_the_bytes_of_whole_paths(tmp_path):
    names = [
        "a.jpg",
        "a/z.jpg",
        "a/b/1.jpg",
        "a-b/1.jpg",
        "a b/ü.jpg",
        "ab.jpg",
        "a/b.jpg",
        "B/1.png",
        "a0/1.jpg",
        "é/x y.jpg",
    ]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert relative_paths(FolderSource(tmp_path)) == sorted(names, key=os.fsencode)


def test_thousands_of_empty_folders(tmp_path, write_image):
    for number in range(3000):
        (tmp_path / "root" / f"{number:05}").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no image .*3,001 folders"):
        FolderSource(tmp_path / "root")
    write_image(tmp_path / "root" / "02999" / "x.jpg", 0)
    assert relative_paths(FolderSource(tmp_path / "root")) == ["02999/x.jpg"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_folder_without_permission_is_named(tmp_path, write_image):
    write_image(tmp_path / "shut" / "x.jpg", 0)
    (tmp_path / "shut").chmod(0)
    with pytest.raises(DataError, match="shut: cannot be listed"):
        FolderSource(tmp_path)
    (tmp_path / "shut").chmod(0o700)


def test_lists_longer_than_a_block(tmp_path, monkeypatch):
    monkeypatch.setattr("personvit.data.path_sources._BLOCK", 64)
    monkeypatch.setattr("personvit.data.path_sources._BATCH", 7)
    names = [f"{number}/" + "n" * (number % 90) + ".jpg" for number in range(200)]
    (tmp_path / "0").mkdir()
    (tmp_path / names[0]).touch()
    (tmp_path / "l.txt").write_bytes("\r\n".join(names).encode())
    assert relative_paths(ListSource(tmp_path / "l.txt")) == names
    (tmp_path / "l.txt").write_text("\n".join([*names, "../out.jpg"]))
    with pytest.raises(DataError, match="line 201: "):
        ListSource(tmp_path / "l.txt")


def test_four_million_paths_cost_no_objects(tmp_path):
    """Scaled down: memory after opening is that of the text, not of as many Python objects."""
    import tracemalloc

    count = 200_000
    (tmp_path / "0.jpg").touch()
    (tmp_path / "l.txt").write_text("0.jpg\n" + "".join(f"00_00_{n:04}_{n:08}.jpg\n" for n in range(count)))
    tracemalloc.start()
    source = ListSource(tmp_path / "l.txt")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == count + 1
    assert kept < 40 * count  # 24 bytes of name, 8 of offset, room to grow
    assert peak < kept + (16 << 20)


def test_formats_that_start_other_programs_are_refused(tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(DataError, match=r"x\.jpg: cannot be read as an image \(not of a known format"):
        FolderSource(tmp_path).load(0)
