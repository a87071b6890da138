from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from personvit.engine.health import HealthMonitor, embedding_spread
from personvit.models.ssl import SSLOutputs

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


def watch(make, rows=20, centre=None, teacher_temp=0.04, **options):
    monitor = HealthMonitor(K, D, **options)
    heard = []
    for step in range(rows):
        monitor.update(make(step), torch.zeros(1, K) if centre is None else centre, teacher_temp, 0.1)
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


def test_healthy_run_is_silent():
    assert not any(watch(healthy, rows=30)[1])


def test_uniform_targets_early_in_a_run_are_silent():
    flat = lambda step: outputs(torch.zeros(2 * B, K), torch.randn(2 * B, D))  # noqa: E731
    _, heard = watch(flat, rows=8, warm_up=8)
    assert not any(heard)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda step: outputs(torch.zeros(2 * B, K), torch.randn(2 * B, D)), ["uniform", "loss.teacher_temp"]),
        (
            lambda step: outputs(torch.eye(K)[:1].repeat(2 * B, 1), torch.randn(2 * B, D)),
            ["One prototype dominates: 100%", "loss.centre_momentum=0.9"],
        ),
        (
            lambda step: outputs(torch.randn(2 * B, K), 1 + 1e-4 * torch.randn(2 * B, D)),
            ["Collapse to a point", "embedding_std 0.000", "optim.lr"],
        ),
    ],
)
def test_each_collapse_has_its_message(make, words):
    _, heard = watch(make)
    assert heard[-1]
    assert all(word in " ".join(heard[-1]) for word in words)


def test_a_passing_condition_is_no_warning():
    flat = outputs(torch.zeros(2 * B, K), torch.randn(2 * B, D))
    _, heard = watch(lambda step: flat if step in (12, 13, 16) else healthy(step))
    assert not any(heard)


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
