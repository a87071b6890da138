from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from personvit.config import CropsConfig, PretrainConfig, load_config
from personvit.data.loaders import CropBatch
from personvit.engine.health import HealthMonitor, embedding_spread, view_retrieval
from personvit.engine.step import PretrainStep
from personvit.models.ssl import SSLOutputs
from personvit.runtime.distributed import Ranks

K, D, B = 64, 16, 32


def outputs(teacher_cls, features, student_cls=None, teacher_patch=None):
    patch = torch.zeros(0, K) if teacher_patch is None else teacher_patch
    return SSLOutputs(
        student_cls=teacher_cls if student_cls is None else student_cls,
        student_patch=patch,
        teacher_cls=teacher_cls,
        teacher_patch=patch,
        teacher_patch_mean=torch.zeros(K),
        teacher_features=features,
        student_features=features,
    )


def healthy(seed=0):
    """Two agreeing views of B different images; each image has a prototype of its own choice."""
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(B, D, generator=g).repeat(2, 1)
    features = features + 0.1 * torch.randn(2 * B, D, generator=g)
    choice = torch.randint(0, K, (B,), generator=g).repeat(2)
    logits = 0.3 * F.one_hot(choice, K).float() + 0.02 * torch.randn(2 * B, K, generator=g)
    student = 0.2 * F.one_hot(choice, K).float() + 0.02 * torch.randn(2 * B, K, generator=g)
    return outputs(logits, features, student)


def watch(make, rows=20, teacher_temp=0.1, **options):
    """Rows of one step each; by default the teacher is as flat as the student, so that no plateau is waited for."""
    monitor = HealthMonitor(K, D, **options)
    heard = []
    for step in range(rows):
        monitor.update(make(step), torch.zeros(1, K), teacher_temp, 0.1)
        monitor.row()
        heard.append(monitor.warnings())
    return monitor, heard


def test_statistics_of_known_distributions():
    # Half of the images on prototype 0, half on 1, with certainty; the student is uniform.
    logits = torch.zeros(2 * B, K)
    logits[::2, 0] = 100.0
    logits[1::2, 1] = 100.0
    features = F.one_hot(torch.arange(2 * B) % D, D).float()
    monitor = HealthMonitor(K, D)
    monitor.update(outputs(logits, features, torch.zeros(2 * B, K)), torch.zeros(1, K), 0.04, 0.1)
    row = monitor.row()
    assert row["teacher_entropy"] == pytest.approx(0, abs=1e-6)
    assert row["marginal_entropy"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["entropy_max"] == pytest.approx(math.log(K))
    assert row["student_teacher_kl"] == pytest.approx(math.log(K), rel=1e-5)
    assert row["prototype_usage"] == pytest.approx(2 / K)
    assert row["prototype_perplexity"] == pytest.approx(2, rel=1e-6)
    assert row["prototype_top_share"] == pytest.approx(0.5)
    assert row["view_chance"] == pytest.approx(1 / B)
    assert row["effective_rank"] == pytest.approx(D - 1, rel=1e-6)  # D one-hot clusters less their mean


def test_kl_compares_the_teacher_with_the_student_on_the_other_view():
    teacher, student = torch.randn(2, K), torch.randn(2, K)  # one image, two views
    monitor = HealthMonitor(K, D)
    monitor.update(outputs(teacher, torch.randn(2, D), student), torch.zeros(1, K), 0.07, 0.1)
    p, log_s = (teacher / 0.07).softmax(1), (student / 0.1).log_softmax(1)
    crossed = sum((p[i] * (p[i].log() - log_s[1 - i])).sum() for i in range(2)) / 2
    assert monitor.row()["student_teacher_kl"] == pytest.approx(float(crossed), rel=1e-5)


def test_centre_is_subtracted_and_none_is_the_batch_mean():
    logits, features = torch.randn(2 * B, K), torch.randn(2 * B, D)
    rows = []
    for given in (logits.mean(0, keepdim=True), None):
        monitor = HealthMonitor(K, D)
        monitor.update(outputs(logits, features), given, 0.04, 0.1)
        rows.append(monitor.row())
    assert rows[0] == rows[1]
    monitor = HealthMonitor(K, D)
    monitor.update(outputs(logits, features), torch.zeros(1, K), 0.04, 0.1)
    assert monitor.row()["teacher_entropy"] != rows[0]["teacher_entropy"]


def test_view_top1_and_spread():
    monitor = HealthMonitor(K, D)
    monitor.update(healthy(), torch.zeros(1, K), 0.04, 0.1)
    row = monitor.row()
    assert row["view_top1"] == 1.0
    assert row["embedding_std"] > 0.8
    assert row["effective_rank"] > D / 2
    monitor.update(outputs(torch.randn(2 * B, K), torch.randn(2 * B, D)), torch.zeros(1, K), 0.04, 0.1)
    assert monitor.row()["view_top1"] < 0.3


def test_spread_of_known_clouds():
    one_point = F.normalize(torch.ones(20, D), dim=1)
    assert embedding_spread(one_point)["embedding_std"] == pytest.approx(0, abs=1e-6)
    isotropic = F.normalize(torch.randn(20000, D), dim=1)
    spread = embedding_spread(isotropic)
    assert spread["embedding_std"] == pytest.approx(1, abs=0.01)
    assert spread["effective_rank"] == pytest.approx(D, abs=0.05)
    line = F.normalize(torch.randn(50, 1), dim=1) * F.normalize(torch.ones(1, D), dim=1)
    assert embedding_spread(line)["effective_rank"] == pytest.approx(1, abs=1e-5)
    assert math.isnan(embedding_spread(torch.full((4, D), math.nan))["effective_rank"])


def test_patch_statistics_only_with_their_centre():
    patch = torch.zeros(10, K)
    patch[:, 3] = 100.0
    monitor = HealthMonitor(K, D)
    monitor.update(outputs(torch.randn(2 * B, K), torch.randn(2 * B, D), teacher_patch=patch), None, 0.04, 0.1)
    assert "patch_entropy" not in monitor.row()
    monitor.update(
        outputs(torch.randn(2 * B, K), torch.randn(2 * B, D), teacher_patch=patch),
        None,
        0.04,
        0.1,
        patch_centre=torch.zeros(1, 1, K),
        patch_temp=0.04,
    )
    row = monitor.row()
    assert row["patch_entropy"] == pytest.approx(0, abs=1e-6)
    assert row["patch_usage"] == pytest.approx(1 / K)


def test_rows_average_over_their_steps_only():
    monitor = HealthMonitor(K, D)
    assert monitor.row() == {}
    sharp, flat = torch.zeros(2 * B, K), torch.zeros(2 * B, K)
    sharp[:, 0] = 100.0
    features = torch.randn(2 * B, D)
    monitor.update(outputs(sharp, features), torch.zeros(1, K), 0.04, 0.1)
    monitor.update(outputs(flat, features), torch.zeros(1, K), 0.04, 0.1)
    assert monitor.row()["teacher_entropy"] == pytest.approx(math.log(K) / 2, rel=1e-5)
    monitor.update(outputs(sharp, features), torch.zeros(1, K), 0.04, 0.1)
    assert monitor.row()["teacher_entropy"] == pytest.approx(0, abs=1e-6)


def flat(step):
    return outputs(torch.zeros(2 * B, K), torch.randn(2 * B, D))


def same_for_all(step):
    """Neither uniform nor one prototype: a third of the prototypes, equally, for every image."""
    return outputs((torch.arange(K) % 3 == 0).float().repeat(2 * B, 1), torch.randn(2 * B, D))


def one_prototype(step):
    return outputs(torch.eye(K)[:1].repeat(2 * B, 1) * 2, torch.randn(2 * B, D))


def one_point(step):
    return outputs(torch.randn(2 * B, K), 1 + 1e-4 * torch.randn(2 * B, D))


def test_healthy_statistics_are_silent():
    assert not any(watch(healthy, rows=30, teacher_temp=0.04)[1])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (flat, ["nearly uniform", "4.159 of at most 4.159", "temperature 0.1", "loss.teacher_temp"]),
        (same_for_all, ["the same for every image", "loss.centre_momentum=0.9"]),
        (one_prototype, ["One prototype dominates: 100%", "loss.centre_momentum=0.9"]),
        (one_point, ["Collapse to a point", "embedding_std 0.000", "optim.lr"]),
    ],
)
def test_each_collapse_has_its_message(make, words):
    _, heard = watch(make, warm_up=3, persistence=4)
    assert not any(heard[:6])
    assert any(all(word in message for word in words) for message in heard[6])


def test_a_warning_is_repeated_now_and_then_but_not_in_each_row():
    _, heard = watch(flat, rows=40, warm_up=0, persistence=1)
    assert [row for row, messages in enumerate(heard) if messages] == [0, 10, 20, 30]


def test_a_sharpened_teacher_is_given_time_to_leave_the_uniform_plateau():
    _, heard = watch(flat, rows=60, teacher_temp=0.04, warm_up=8, plateau=40)
    assert [row for row, messages in enumerate(heard) if messages] == [8 + 40 - 1, 8 + 50 - 1]


def test_a_passing_condition_is_no_warning():
    _, heard = watch(lambda step: flat(step) if step in (12, 13, 16) else healthy(step), teacher_temp=0.04)
    assert not any(heard)


def batches(count, size):
    """Global crops of 64 images (stripes of colours): noise and brightness differ between views."""
    colours = torch.randn(64, 3, 4, 1)
    masks = torch.zeros(2 * size, 8, dtype=torch.bool)
    masks[:size, :3] = True
    indices = masks.flatten().nonzero().flatten()
    result = []
    for _ in range(count):
        positions = torch.randint(0, 64, (size,))
        images = colours[positions].repeat_interleave(8, 2).expand(-1, -1, -1, 16)
        views = [images * (1 + 0.2 * torch.randn(size, 1, 1, 1)) + 0.3 * torch.randn(size, 3, 32, 16) for _ in range(2)]
        result.append(
            CropBatch(
                global_crops=torch.cat(views),
                local_crops=None,
                masks=masks,
                mask_indices=indices,
                mask_weights=torch.full((len(indices),), 1 / 3),
                positions=positions,
                bad=[],
            )
        )
    return result


def train(*overrides, steps=110, every=8):
    """A real training, tiny; returns the last row and every warning."""
    recipe = """crops.global_size=[32,16] crops.local_crops=0 crops.local_size=[16,8] model.arch=vit_micro
        model.patch_size=8 model.drop_path=0.0 head.prototypes=64 head.patch_prototypes=64 head.hidden_dim=64
        head.bottleneck_dim=32 train.batch_size=16 train.epochs=10 train.precision=fp32 optim.warmup_epochs=1
        optim.lr=8e-3 optim.momentum=[0.95,1.0] optim.freeze_last_layer_epochs=0 loss.teacher_temp_warmup_epochs=1"""
    cfg = load_config(PretrainConfig, None, [*recipe.split(), *overrides])
    trainer = PretrainStep(cfg, Ranks(rank=0, world_size=1, local_rank=0, device=torch.device("cpu")), steps // 10)
    monitor = HealthMonitor(64, 128)
    pool, heard, row = batches(16, 16), [], {}
    for step in range(steps):
        seen = trainer.forward_backward(pool[step % 16], step, 0)
        centre = trainer.dino_loss.centre.clone()
        trainer.finish(step)
        monitor.update(seen, centre, trainer.teacher_temp(0), cfg.loss.student_temp)
        if step % every == every - 1:
            row = monitor.row()
            heard += monitor.warnings()
    return row, heard


def test_healthy_training_stays_silent():
    row, heard = train()
    assert not heard
    assert row["view_top1"] > 5 * row["view_chance"]
    assert row["marginal_entropy"] - row["teacher_entropy"] > 1


def test_training_without_centring_and_sharpening_is_reported():
    row, heard = train(
        "loss.centre_momentum=1.0",
        "loss.student_temp=0.2",
        "loss.teacher_temp=[0.2,0.2]",
        "loss.teacher_patch_temp=[0.2,0.2]",
    )
    assert row["student_teacher_kl"] < 0.02
    assert any("Targets that do not depend on the image" in message for message in heard)


def test_state_continues_exactly(tmp_path):
    def run(monitor, steps):
        for step in steps:
            monitor.update(healthy(step), torch.zeros(1, K), 0.04, 0.1)
            if step % 3 == 2:
                monitor.row()
        return monitor

    whole = run(HealthMonitor(K, D, window=100), range(10))  # stops between two rows
    torch.save(run(HealthMonitor(K, D, window=100), range(4)).state_dict(), tmp_path / "state.pth")
    resumed = HealthMonitor(K, D, window=100)
    resumed.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    run(resumed, range(4, 10))
    assert resumed.row() == whole.row()


def test_update_leaves_the_outputs_and_generators_alone():
    batch = healthy()
    before, state = batch.teacher_cls.clone(), torch.get_rng_state()
    monitor = HealthMonitor(K, D)
    monitor.update(batch, None, 0.04, 0.1)
    monitor.row()
    assert torch.equal(batch.teacher_cls, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_large_batches_are_sampled_and_odd_ones_fit_the_window():
    monitor = HealthMonitor(K, D, window=20, usage_window=24, samples=8)
    for _ in range(5):
        monitor.update(healthy(), None, 0.04, 0.1)
    row = monitor.row()
    assert row["view_chance"] == pytest.approx(1 / 8)
    assert all(math.isfinite(value) for value in row.values())


class Colours:
    """Source of images of one colour each."""

    def __init__(self, count):
        self.colours = torch.randint(0, 256, (count, 3), generator=torch.Generator().manual_seed(0)).tolist()

    def __len__(self):
        return len(self.colours)

    def path(self, index):
        return str(index)

    def load(self, index):
        return Image.new("RGB", (20, 40), tuple(self.colours[index]))


class MeanColour(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def embed(self, images):
        assert not self.training
        return torch.cat([images.mean((2, 3)) * self.scale, torch.ones(len(images), 1)], dim=1)


PLAIN = CropsConfig(
    global_size=(16, 8), local_size=(8, 8), jitter_probability=0.0, grayscale=0.0, solarize=(0.0, 0.0, 0.0)
)


def test_view_retrieval_finds_what_the_backbone_tells_apart():
    source = Colours(60)
    backbone = MeanColour(1.0).train()
    assert view_retrieval(backbone, source, PLAIN, 40, seed=0, batch_size=7) == 1.0
    assert backbone.training
    assert view_retrieval(MeanColour(0.0), source, PLAIN, 40, seed=0) == pytest.approx(1 / 40)


def test_view_retrieval_asks_the_same_question_again():
    source, state = Colours(30), torch.get_rng_state()
    cfg = CropsConfig(global_size=(16, 8), local_size=(8, 8))
    scores = [view_retrieval(MeanColour(1.0), source, cfg, 30, seed) for seed in (0, 0, 1, 2, 3)]
    assert scores[0] == scores[1]
    assert len(set(scores)) > 1
    assert 1 / 30 < scores[0] < 1
    assert torch.equal(torch.get_rng_state(), state)
