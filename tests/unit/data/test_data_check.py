from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from personvit.data.__main__ import main
from personvit.data.check import scan
from personvit.data.parallel import ordered_map
from personvit.data.quality import Oddity, inspect_image
from personvit.data.reid_sets import PUBLISHED, ReIDSet, ReIDSplit, read_reid_set
from personvit.data.sources import FolderSource, ListSource
from personvit.data.split_report import identified, split_problems
from personvit.errors import ConfigError, DataError


@pytest.mark.parametrize("workers", [0, 2])
def test_scan_measures_and_lists(make_images, truncate, write_image, workers):
    folder = make_images(600)
    truncate(folder / "00300.jpg")
    write_image(folder / "wide.png", 0, size=(100, 50))
    report = scan(FolderSource(folder), workers)
    assert (report.total, len(report.heights)) == (601, 600)
    assert list(report.bad) == [str(folder / "00300.jpg")]
    assert (report.heights.max(), report.widths.max(), report.widths.min()) == (50, 100, 24)
    assert report.heights[-1] == 50


def test_text_holds_counts_and_both_histograms(make_images):
    text = scan(FolderSource(make_images(4)), 0).text()
    assert text.splitlines()[0] == "4 files, 4 readable, 0 unreadable"
    assert "height 48 to 48 pixels" in text
    assert "32 to 64          4 100.0% " + "#" * 40 in text
    assert "0.5 to 0.6667          4 100.0%" in text


def test_command_prints_and_writes_the_bad_files(make_images, truncate, tmp_path, capsys):
    folder = make_images(3)
    truncate(folder / "00001.jpg")
    assert main(["check", f"data.root={folder}", "data.num_workers=0", "--bad", str(tmp_path / "bad.txt")]) == 0
    assert "3 files, 2 readable, 1 unreadable" in capsys.readouterr().out
    assert (tmp_path / "bad.txt").read_text() == f"{folder / '00001.jpg'}\n"


def test_command_shows_the_table_of_a_labelled_set(tmp_path, write_image, capsys):
    for name in ("bounding_box_train/0001_c1.jpg", "query/0002_c1.jpg", "bounding_box_test/0002_c2.jpg"):
        write_image(tmp_path / name, 0)
    assert main(["check", f"data.root={tmp_path}", "data.num_workers=0"]) == 0
    out = capsys.readouterr().out
    assert "3 files, 3 readable" in out  # training images, queries and gallery
    assert "gallery        1        1        1" in out


def test_command_checks_own_data_before_and_after_its_split(tmp_path, write_image, truncate, capsys):
    for number in range(4):
        write_image(tmp_path / f"{number}.jpg", number)
    truncate(write_image(tmp_path / "4.jpg", 4))
    rows = [f"{number}.jpg,p{number % 2},{number // 2}" for number in range(5)]
    (tmp_path / "own.csv").write_text("path,pid,camid\n" + "\n".join(rows))
    assert main(["check", str(tmp_path / "own.csv"), "data.num_workers=0"]) == 0
    out = capsys.readouterr().out
    assert "5 files, 4 readable, 1 unreadable" in out
    assert "gallery" not in out
    splits = ["query", "query", "gallery", "gallery", "train"]
    lines = [f"{row},{split}" for row, split in zip(rows, splits, strict=True)]
    (tmp_path / "split.csv").write_text("path,pid,camid,split\n" + "\n".join(lines))
    assert main(["check", str(tmp_path / "split.csv"), "data.num_workers=0"]) == 0
    out = capsys.readouterr().out
    assert "5 files, 4 readable, 1 unreadable" in out
    assert "gallery        2        2        1" in out
    assert "problem: 1 identity (p0) in both train and query" in out


def test_command_checks_a_set_without_training_images(tmp_path, write_image, capsys):
    for folder in ("occluded_body_images", "whole_body_images"):
        write_image(tmp_path / folder / "001" / "1.png", 0)
    assert main(["check", str(tmp_path), "data.num_workers=0"]) == 0
    out = capsys.readouterr().out
    assert "2 files, 2 readable" in out
    assert "occluded_reid in" in out


def test_nothing_readable_is_an_error(make_images, truncate):
    truncate(make_images(1) / "00000.jpg")
    with pytest.raises(DataError, match="none of the 1 files can be read"):
        main(["check", f"data.root={make_images(0).parent / 'images'}", "data.num_workers=0"])


def test_help_and_unknown_verb(capsys):
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no such verb"):
        main(["chek"])


def encoded(pixels: np.ndarray, mode: str | None = None, **options) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    image = image.convert(mode) if mode else image
    image.save(stream, **{"format": "JPEG", **options})
    return stream.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (48, 24, 3), dtype=np.uint8)
PLAIN = encoded(NOISE)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(NOISE, exif=exif)


def deep_png() -> bytes:
    return encoded(np.arange(48 * 24, dtype=np.uint16).reshape(48, 24) * 50, format="PNG")


def chunk(kind: bytes, content: bytes) -> bytes:
    """A part of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def deep_rgb_png() -> bytes:
    """Pillow cannot write 16 bits a channel."""
    rows = b"".join(b"\0" + (NOISE[row].astype(">u2") << 8).astype(">u2").tobytes() for row in range(48))
    header = struct.pack(">IIBBBBB", 24, 48, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def animated_png() -> bytes:
    frames = [Image.fromarray(NOISE), Image.fromarray(255 - NOISE)]
    stream = io.BytesIO()
    frames[0].save(stream, format="PNG", save_all=True, append_images=frames[1:])
    return stream.getvalue()


ODD = {
    "plain.jpg": (PLAIN, Oddity(0)),
    "plain.JPEG": (PLAIN, Oddity(0)),
    "plain.png": (encoded(NOISE, format="PNG"), Oddity(0)),
    "plain.webp": (encoded(NOISE, format="WEBP"), Oddity(0)),
    "cmyk.jpg": (encoded(NOISE, "CMYK"), Oddity.CMYK),
    "grey.jpg": (encoded(NOISE, "L"), Oddity.GREY),
    "deep.png": (deep_png(), Oddity.GREY | Oddity.DEEP),
    "deep_rgb.png": (deep_rgb_png(), Oddity.DEEP),
    "palette.png": (encoded(NOISE, "P", format="PNG"), Oddity.PALETTE),
    "animated.png": (animated_png(), Oddity.ANIMATED),
    "rotated.jpg": (rotated(), Oddity.ROTATED),
    "dot.png": (encoded(NOISE[:1, :1], format="PNG"), Oddity.SMALL | Oddity.FLAT),
    "flat.jpg": (encoded(np.full((48, 24, 3), 90, np.uint8)), Oddity.FLAT),
    "nearly_flat.png": (encoded(np.eye(48, 24, 3, dtype=np.uint8)[..., None] * NOISE[:1, :1], format="PNG"), Oddity(0)),
    "banner.jpg": (encoded(NOISE[:10].repeat(4, axis=1)), Oddity.ASPECT),
    "trailing.jpg": (PLAIN + b"more", Oddity.TRAILING),
    "trailing.webp": (encoded(NOISE, format="WEBP") + b"more", Oddity.TRAILING),
    "no_end.jpg": (PLAIN[:-2] + bytes(64), Oddity.NO_END),
    "liar.png": (PLAIN, Oddity.ENDING),
}


@pytest.mark.parametrize("name", ODD)
def test_oddities(name):
    data, expected = ODD[name]
    facts = inspect_image(data, name)
    assert facts.oddities == expected
    assert facts.width == Image.open(io.BytesIO(data)).width


def bomb(width: int, height: int) -> bytes:
    """A PNG that is small as a file and names a large size; its pixels are missing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"")


def test_a_set_with_every_kind_of_bad_file(tmp_path, write_image):
    good = [write_image(tmp_path / f"good {number} é.jpg", 7 + number) for number in range(3)]
    wrong = {
        "cut.jpg": PLAIN[: len(PLAIN) // 2],
        "empty.jpg": b"",
        "html.jpg": b"<html>no such page</html>",
        "tall.png": bomb(4096, 20000),
        "wide.png": bomb(20000, 100),
        "wide_whole.jpg": encoded(np.zeros((2, 20000, 3), np.uint8)),
    }
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "dangling.png").symlink_to(tmp_path / "gone.png")
    for name, (content, _) in ODD.items():
        (tmp_path / f"odd_{name}").write_bytes(content)
    source = FolderSource(tmp_path)
    report = scan(source, 2)
    assert [Path(path).name for path in report.bad] == sorted(wrong)
    assert all(message.startswith(path) for path, message in report.bad.items())
    assert "20000 x 100 pixels are refused" in report.bad[str(tmp_path / "wide.png")]
    assert len(report.heights) == len(good) + len(ODD) == report.total - len(wrong)
    assert report.oddities["CMYK"] == (1, str(tmp_path / "odd_cmyk.jpg"))
    assert report.oddities["greyscale"][0] == 2
    assert (report.copies, report.copy_groups) == (2, 1)  # plain.jpg, plain.JPEG, liar.png
    assert "2 byte-identical copies, in 1 groups" in report.text()
    assert report.bad[str(tmp_path / "empty.jpg")].endswith("(empty file)")
    assert report.bad[str(tmp_path / "html.jpg")].endswith("(not of a known format)")
    # What the scan calls bad is what training cannot read, and nothing else.
    unreadable = []
    for index in range(len(source)):
        try:
            source.load(index)
        except DataError:
            unreadable.append(source.path(index))
    assert unreadable == list(report.bad)


def test_sixteen_bits_keep_their_upper_half(tmp_path):
    (tmp_path / "deep.png").write_bytes(deep_png())
    pixels = np.asarray(FolderSource(tmp_path).load(0))
    expected = (np.arange(48 * 24).reshape(48, 24) * 50 % 65536) >> 8
    np.testing.assert_array_equal(pixels, expected[..., None].repeat(3, axis=2))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_reported(make_images):
    folder = make_images(2)
    (folder / "00000.jpg").chmod(0)
    report = scan(FolderSource(folder), 0)
    assert "Permission denied" in report.bad[str(folder / "00000.jpg")]


def test_copies_are_grouped_in_the_order_of_the_source(tmp_path, write_image):
    for name, seed in (("a", 1), ("b", 2), ("c", 1), ("d", 3), ("e", 2), ("f", 1)):
        write_image(tmp_path / f"{name}.jpg", seed)
    report = scan(FolderSource(tmp_path), 0)
    assert (report.copies, report.copy_groups) == (3, 2)
    assert [[Path(path).stem for path in group] for group in report.copied] == [["a", "c", "f"], ["b", "e"]]
    (tmp_path / "l.txt").write_text("a.jpg\na.jpg\n")
    assert scan(ListSource(tmp_path / "l.txt"), 0).copies == 1


def test_bad_list_is_a_quarantine_that_makes_a_file_list(make_images, truncate, tmp_path):
    folder = make_images(4)
    truncate(folder / "00002.jpg")
    assert main(["check", str(folder), "data.num_workers=0", "--bad", str(tmp_path / "bad.txt")]) == 0
    bad = set((tmp_path / "bad.txt").read_text().splitlines())
    good = [str(path) for path in sorted(folder.iterdir()) if str(path) not in bad]
    (tmp_path / "good.txt").write_text("\n".join(good))
    report = scan(ListSource(tmp_path / "good.txt"), 0)
    assert (report.total, len(report.bad)) == (3, 0)
    with pytest.raises(DataError, match=r"bad\.txt: exists already"):
        main(["check", str(folder), "--bad", str(tmp_path / "bad.txt")])


def _die(item: int) -> int:
    if item == 3:
        os._exit(9)
    return item


def _nothing() -> None:
    pass


def test_results_come_in_order_and_a_dead_worker_is_told():
    assert list(ordered_map(abs, range(-50, 0), 2, _nothing, ())) == list(range(50, 0, -1))
    with pytest.raises(DataError, match="a worker process died"):
        list(ordered_map(_die, range(20), 1, _nothing, ()))


def labelled(name: str, counts, root: str = "/d", version: str = "") -> ReIDSet:
    splits = []
    for ids, images in counts:
        pids = np.arange(images) % max(ids, 1)
        splits.append(ReIDSplit([f"{root}/{n}.jpg" for n in range(images)], pids, pids % 2))
    return ReIDSet(name, *splits, root, version=version)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("market1501", "Market-1501"),
        ("dukemtmcreid", "DukeMTMC-reID"),
        ("occluded_duke", "Occluded-Duke"),
        ("msmt17", "MSMT17, version 1"),
    ],
)
def test_published_sets_are_named_by_their_counts(name, line):
    version = "version 1" if name == "msmt17" else ""
    assert identified(labelled("market1501", PUBLISHED[name], version=version)) == (name, f"by its counts: {line}")
    train, query, (ids, images) = PUBLISHED[name]
    told = identified(labelled("market1501", (train, query, (ids, images - 5))))
    assert told[0] == name
    assert f"but gallery has {ids:,} identities in {images - 5:,} images instead of {ids:,} in {images:,}" in told[1]
    assert identified(labelled("x", ((3, 6), (2, 4), (2, 4)))) == ("x", "by its counts: none of the published sets")


def test_cuhk_and_msmt_variants():
    cuhk = labelled("market1501", ((767, 7365), (700, 1400), (700, 5332)))
    assert identified(cuhk) == ("cuhk03_detected", "by its counts: CUHK03-NP, detected boxes")
    short = labelled("msmt17", ((1041, 30248), (3060, 11659), (3060, 82161)))
    assert "MSMT17 without its validation list" in identified(short)[1]


def lay_out(root: Path, write_image, train, query, gallery) -> Path:
    for start, folder, names in (
        (0, "bounding_box_train", train),
        (100, "query", query),
        (200, "bounding_box_test", gallery),
    ):
        for number, name in enumerate(names, start):
            write_image(root / folder / f"{name}_{number:03}.jpg", number)
    return root


def test_split_problems_are_told_with_identities(tmp_path, write_image, capsys):
    root = lay_out(
        tmp_path,
        write_image,
        ["0001_c1", "0007_c2"],
        ["0001_c1", "0002_c1", "0002_c3", "0003_c1", "0004_c2"],
        ["0001_c2", "0002_c1", "0004_c2", "0000_c1", "-1_c1"],
    )
    write_image(root / "bounding_box_test" / "0001_c1_100.jpg", 100)
    write_image(root / "bounding_box_test" / "0001_c7_300.jpg", 300)
    problems = split_problems(read_reid_set("market1501", root))
    assert len(problems) == 5
    assert "1 query identity (3) not in the gallery; their 1 queries are not scored" in problems[0]
    assert "2 queries have their identity in the gallery under their own camera only" in problems[1]
    assert "2 identities (2, 4)" in problems[1]
    assert "1 identity (1) in both train and query" in problems[2]
    assert "1 file names in both query and gallery (first: 0001_c1_100.jpg)" in problems[3]
    assert problems[4].startswith("cameras: 7 (first: ")
    assert main(["check", str(root), "data.num_workers=0", "data.name=market1501"]) == 0
    assert capsys.readouterr().out.count("problem: ") == 5


def test_a_set_that_cannot_be_scored_is_reported_not_refused(tmp_path, write_image, capsys):
    root = lay_out(tmp_path, write_image, ["0009_c1"], ["0001_c1"], ["0002_c2"])
    assert main(["check", str(root), "data.num_workers=0"]) == 0
    assert "problem: 1 query identity (1) not in the gallery" in capsys.readouterr().out


def test_a_sound_split_has_no_problems(tmp_path, write_image):
    root = lay_out(tmp_path, write_image, ["0009_c1"], ["0001_c1"], ["0001_c2", "0000_c1"])
    assert split_problems(read_reid_set("market1501", root)) == []
