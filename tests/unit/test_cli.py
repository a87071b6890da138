from __future__ import annotations

import pytest
from tiny_runs import arguments, one_thread, write_crops

from personvit import __main__ as command
from personvit import __version__
from personvit.config import PretrainConfig, load_config
from personvit.pretrain import main as pretrain_main
from personvit.runtime.entry import run


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def test_help_lists_only_verbs_that_exist(capsys):
    assert command.main([]) == 0
    text = capsys.readouterr().out
    assert "pretrain" in text
    assert set(command.verbs()) <= set(text.split())
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_unknown_verb_gets_the_nearest_one(capsys):
    assert command.main(["pretrian"]) == 2
    assert "Did you mean pretrain?" in capsys.readouterr().err


def test_verb_is_dispatched_with_its_arguments(capsys):
    assert command.main(["pretrain", "--print-config", "train.epochs=7", "--fused"]) == 0
    printed = capsys.readouterr().out
    assert "epochs: 7" in printed
    assert "backend: fused" in printed


def test_printed_config_is_complete(capsys, tmp_path):
    assert pretrain_main(["--config", "vit_small_luperson", "optim.lr=0.1", "--print-config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    expected = load_config(PretrainConfig, "vit_small_luperson", ["optim.lr=0.1"])
    assert load_config(PretrainConfig, str(tmp_path / "printed.yaml")) == expected


def test_a_key_wins_over_a_flag(capsys):
    assert pretrain_main(["--fused", "kernels.backend=reference", "--print-config"]) == 0
    assert "backend: reference" in capsys.readouterr().out


def test_flags_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as caught:
        pretrain_main(["--resume", "auto", "--overwrite"])
    assert caught.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "exit_code", "words"),
    [
        (["train.batchsize=3"], 2, "Did you mean train.batch_size?"),
        (["data.root=/no/such/folder"], 3, "data.root=/no/such/folder"),
        (["train.batch_size=64"], 3, "Set train.batch_size=4"),
        (["train.accumulate=3"], 2, "does not divide into 3 equal parts"),
        (["--resume", "/no/such/file.pth"], 4, "/no/such/file.pth: no such file"),
        (["model.weights=/no/such/weights.pth"], 4, "/no/such/weights.pth"),
    ],
)
def test_bad_input_ends_in_one_line(tmp_path, capsys, extra, exit_code, words):
    crops = write_crops(tmp_path / "crops", count=5)
    assert run(pretrain_main, arguments(crops, tmp_path / "run", *extra)) == exit_code
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message


def test_empty_folder(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run(pretrain_main, arguments(tmp_path / "empty", tmp_path / "run")) == 3
    assert "no image in this folder" in capsys.readouterr().err
