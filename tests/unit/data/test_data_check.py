from __future__ import annotations

import pytest

from personvit.data.__main__ import main
from personvit.data.check import scan
from personvit.data.sources import FolderSource
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
    assert "1 files, 1 readable" in out
    assert "gallery        1        1        1" in out


def test_nothing_readable_is_an_error(make_images, truncate):
    truncate(make_images(1) / "00000.jpg")
    with pytest.raises(DataError, match="none of the 1 files can be read"):
        main(["check", f"data.root={make_images(0).parent / 'images'}", "data.num_workers=0"])


def test_help_and_unknown_verb(capsys):
    assert main([]) == 0
    assert "generate" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no such verb"):
        main(["chek"])
