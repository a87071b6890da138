"""Two gloo ranks under torchrun give the losses and weights of one rank at the same global batch."""

from __future__ import annotations

import numpy as np
import torch
from tiny_runs import finish, start, train_rows, write_crops

from personvit.engine.checkpoint import read_checkpoint

RUN = ["train.batch_size=8", "train.epochs=2", "optim.eps=1e-3"]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")


def test_two_ranks_equal_one(tmp_path):
    crops = write_crops(tmp_path / "crops", count=33)
    (crops / "0003.jpg").write_bytes(b"not a picture")
    single = start(crops, tmp_path / "one", *RUN)
    double = start(crops, tmp_path / "two", *RUN, launcher=TORCHRUN)
    finish(single)
    output = finish(double)
    one, two = (train_rows(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    one, two = ([row for row in rows if row["kind"] == "train"] for rows in (one, two))
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(1, 9))
    for key in ("loss", "loss_cls", "loss_patch"):
        np.testing.assert_allclose([row[key] for row in two], [row[key] for row in one], rtol=2e-6, err_msg=key)
    np.testing.assert_allclose([r["grad_norm"] for r in two], [r["grad_norm"] for r in one], rtol=1e-4)
    left, right = (read_checkpoint(tmp_path / name / "checkpoints/last.pth") for name in ("one", "two"))
    for part in ("student", "teacher", "ibot_loss"):
        for name, tensor in left[part].items():
            torch.testing.assert_close(
                right[part][name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
    assert (tmp_path / "two/bad_images.txt").read_text().splitlines() == [str(crops / "0003.jpg")]
    assert output.count("done: 8 steps") == 1  # rank 1 keeps quiet


def test_ranks_that_do_not_divide_the_batch_stop_with_advice(tmp_path):
    crops = write_crops(tmp_path / "crops", count=8)
    process = start(crops, tmp_path / "run", "train.batch_size=1", launcher=TORCHRUN)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "train.batch_size=1 does not divide" in output
    assert "train.batch_size=2" in output
