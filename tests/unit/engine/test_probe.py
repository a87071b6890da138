from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from personvit.data.reid_sets import open_reid_set
from personvit.engine.probe import RetrievalProbe, subset
from personvit.errors import DataError
from personvit.models import vit_micro
from personvit.retrieval.features import RawPixels

SIZE, MEAN, STD = (16, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def reid_root(tmp_path_factory):
    """12 identities in two cameras (identity 12 in one camera only), each of a colour of its own, and distractors."""
    root = tmp_path_factory.mktemp("reid")
    rng = np.random.default_rng(0)
    for folder in ("query", "bounding_box_test"):
        (root / folder).mkdir()
    colours = rng.integers(0, 256, (13, 3))
    for pid in range(1, 13):
        for camera in (1, 2):
            shown = camera if pid < 12 else 1
            for folder, frames in (("query", 1), ("bounding_box_test", 2)):
                for frame in range(frames):
                    noisy = np.clip(colours[pid] + rng.integers(-9, 9, (20, 10, 3)), 0, 255).astype(np.uint8)
                    Image.fromarray(noisy).save(root / folder / f"{pid:04}_c{shown}s1_{camera}{frame:05}_00.jpg")
    for i in range(20):
        noise = rng.integers(0, 256, (20, 10, 3), dtype=np.uint8)
        Image.fromarray(noise).save(root / "bounding_box_test" / f"0000_c1s1_{i:06}_00.jpg")
    return root


def test_colours_are_found_by_pixels(reid_root):
    result = RetrievalProbe(reid_root, SIZE, MEAN, STD).run(RawPixels())
    assert set(result) == {"probe_mAP", "probe_rank1"}
    assert result["probe_mAP"] > 0.8


def test_backbone_keeps_its_mode_and_gives_the_same_again(reid_root):
    backbone = vit_micro(img_size=SIZE, patch_size=8, drop_path_rate=0.5).train()
    probe = RetrievalProbe(reid_root, SIZE, MEAN, STD)
    state = torch.get_rng_state()
    first = probe.run(backbone)
    assert backbone.training
    assert torch.equal(torch.get_rng_state(), state)
    assert probe.run(backbone) == first


@pytest.mark.parametrize("limit", [1, 20, 40, 60])
def test_subset_keeps_whole_identities_and_is_always_the_same(reid_root, limit):
    whole = open_reid_set("market1501", reid_root)
    part = subset(whole, limit)
    assert subset(whole, limit).query.paths == part.query.paths
    kept = set(part.query.pids)
    for split, original in ((part.query, whole.query), (part.gallery, whole.gallery)):
        expected = [path for path, pid in zip(original.paths, original.pids, strict=True) if pid in kept]
        assert [path for path, pid in zip(split.paths, split.pids, strict=True) if pid in kept] == expected
    total = len(part.query) + len(part.gallery)
    assert total <= max(limit, 6 + 1)  # one identity has 6 images
    assert 12 not in kept  # its queries could not match
    assert RetrievalProbe(reid_root, SIZE, MEAN, STD, max_images=limit).run(RawPixels())["probe_mAP"] > 0


def test_small_set_is_used_whole(reid_root):
    whole = open_reid_set("market1501", reid_root)
    assert subset(whole, 4000) is whole


def test_no_labelled_set_there(tmp_path):
    with pytest.raises(DataError):
        RetrievalProbe(tmp_path, SIZE, MEAN, STD)
