"""Cameras handed to the model, and two gloo ranks that share an extraction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from personvit.data.reid_sets import ReIDSet, ReIDSplit
from personvit.errors import DataError
from personvit.models import ReIDModel, VisionTransformer
from personvit.retrieval import features as feature_module
from personvit.retrieval.evaluation import backbone_features, evaluate_backbone
from personvit.retrieval.features import extract_features
from personvit.runtime.distributed import Ranks

SIZE, MEAN, STD = (32, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def _model(cameras=0):
    torch.manual_seed(0)
    base = VisionTransformer(SIZE, embed_dim=16, depth=1, num_heads=2, num_cameras=cameras)
    return ReIDModel(base, 4)


def _pictures(count=7):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (32, 16, 3), dtype=np.uint8)) for _ in range(count)]


def _files(folder, count):
    paths = [str(folder / f"{number}.png") for number in range(count)]
    for picture, path in zip(_pictures(count), paths, strict=True):
        picture.save(path)
    return paths


def test_every_image_meets_its_own_camera():
    model, pictures, camids = _model(3), _pictures(), np.array([2, 0, 1, 1, 0, 2, 2])
    together = extract_features(model, pictures, SIZE, MEAN, STD, 3, camids=camids)
    np.testing.assert_array_equal(together.camids, camids)
    for number, picture in enumerate(pictures):
        alone = extract_features(model, [picture], SIZE, MEAN, STD, camids=camids[[number]]).features[0]
        torch.testing.assert_close(together.features[number], alone)
    other = extract_features(model, pictures, SIZE, MEAN, STD, 3, camids=(camids + 1) % 3)
    assert (other.features - together.features).abs().max() > 1e-3


def test_flipped_images_keep_their_camera():
    model, camids = _model(3), [2]
    picture = _pictures(1)[0]
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    left, right = (
        extract_features(model, [image], SIZE, MEAN, STD, camids=camids, flip=True).features
        for image in (picture, mirrored)
    )
    torch.testing.assert_close(left, right)


def test_cameras_that_are_unknown_or_too_many_stop_with_the_remedy():
    model, pictures = _model(3), _pictures(2)
    with pytest.raises(DataError, match=r"3 cameras.*unknown: give camids.*model\.camera_embed=false"):
        extract_features(model, pictures, SIZE, MEAN, STD)
    with pytest.raises(DataError, match=r"Camera 3 .*cameras 0 to 2"):
        extract_features(model, pictures, SIZE, MEAN, STD, camids=[0, 3])
    with pytest.raises(DataError, match=r"Camera -1 "):
        extract_features(model, pictures, SIZE, MEAN, STD, camids=[0, -1])
    assert len(extract_features(_model(), pictures, SIZE, MEAN, STD)) == 2
    assert len(extract_features(model, [], SIZE, MEAN, STD)) == 0


@pytest.mark.parametrize(("count", "batch_size", "size"), [(0, 4, 2), (1, 4, 3), (10, 3, 2), (12, 4, 3), (100, 7, 8)])
def test_shares_are_whole_batches_and_cover_the_list_once(count, batch_size, size):
    shares = [
        feature_module._share(count, batch_size, Ranks(rank, size, rank, torch.device("cpu"))) for rank in range(size)
    ]
    assert [index for share in shares for index in range(count)[share]] == list(range(count))
    assert all(share.start % batch_size == 0 or share.start == count for share in shares)
    batches = [-(-len(range(count)[share]) // batch_size) for share in shares]
    assert max(batches) - min(batches) <= 1


def _camids(count):
    """Not the same from the first image of rank 0 as from that of rank 1."""
    return np.arange(count) // 4 % 3


def _split(paths):
    return ReIDSplit(paths, np.arange(len(paths)) // 2 % 3, _camids(len(paths)))


def _reid_set(paths):
    nothing = ReIDSplit([], np.zeros(0, np.int64), np.zeros(0, np.int64))
    return ReIDSet("few", nothing, _split(paths[:4]), _split(paths), "", np.zeros(0, np.int64))


def _work_of_a_rank(rank, folder, paths):
    """Body of one of two processes: what it got goes to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, rank, torch.device("cpu"))
    feature_module._GATHERED = 4  # several rounds
    results = {}
    for count in (0, 1, 3, len(paths)):  # nothing; no share for rank 1; one batch; the last batch incomplete
        camids = _camids(count)
        found = extract_features(_model(3), paths[:count], SIZE, MEAN, STD, 3, camids=camids, flip=True, ranks=ranks)
        results[count] = found.features
        assert found.paths == paths[:count]
    query, gallery = backbone_features(_model(3), _reid_set(paths), SIZE, MEAN, STD, 3, ranks=ranks)
    results["set"] = torch.cat([query.features, gallery.features])
    results["mAP"] = evaluate_backbone(_model(3), _reid_set(paths), SIZE, MEAN, STD, 3, ranks=ranks).mAP
    try:
        extract_features(_model(3), [*paths, f"{folder}/absent.png"], SIZE, MEAN, STD, 3, camids=[0] * 12, ranks=ranks)
    except DataError as error:
        results["error"] = str(error)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_get_the_features_of_one_to_the_bit(tmp_path):
    paths = _files(tmp_path, 11)
    torch.multiprocessing.spawn(_work_of_a_rank, (str(tmp_path), paths), nprocs=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    one = {
        count: extract_features(_model(3), paths[:count], SIZE, MEAN, STD, 3, camids=_camids(count), flip=True).features
        for count in (0, 1, 3, 11)
    }
    query, gallery = backbone_features(_model(3), _reid_set(paths), SIZE, MEAN, STD, 3)
    expected_map = evaluate_backbone(_model(3), _reid_set(paths), SIZE, MEAN, STD, 3).mAP
    torch.set_num_threads(threads)
    errors = []
    for rank in range(2):
        found = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        for count, features in one.items():
            assert len(found[count]) == count
            assert not count or torch.equal(found[count], features)
        assert torch.equal(found["set"], torch.cat([query.features, gallery.features]))
        assert found["mAP"] == expected_map
        errors.append(found["error"])
    assert "Another rank" in errors[0]  # the damaged file lies in the share of rank 1: both stop, it says which
    assert "absent.png" in errors[1]
