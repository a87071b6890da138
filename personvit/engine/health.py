"""Label-free signs of health and collapse of self-distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from personvit.config import CropsConfig
from personvit.data.crops import MultiCrop
from personvit.data.sources import ImageSource
from personvit.models.ssl import SSLOutputs
from personvit.retrieval.features import Backbone, device_of
from personvit.runtime.seed import stream_seed

_POINT_STD = 0.02
_POINT_RANK = 1.5
_UNIFORM_ENTROPY = 0.99  # of ln K
_CONSTANT_INFORMATION = 0.02  # of ln K
_AGREED_KL = 0.02  # nats
_DOMINANT_SHARE = 0.9
_SHARPENED = 0.8  # teacher temperature over student temperature, below which uniform targets are unstable
_REPEAT = 10  # rows between two reminders of the same condition


@dataclass(frozen=True)
class _Sums:
    """Sums over the steps since the last row, on the device of the logits, so that no step waits for them."""

    entropy: Tensor
    marginal: Tensor  # [K], sum of the teacher's distributions
    divergence: Tensor
    hits: Tensor
    patch_entropy: Tensor
    updates: int
    images: int
    patches: int


_SUM_NAMES = tuple(field.name for field in fields(_Sums))


class _Ring:
    """The last `size` rows written, in no particular order."""

    def __init__(self, size: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.data = torch.zeros((size, *shape), dtype=dtype)
        self.written = 0

    def write(self, rows: Tensor) -> None:
        size = len(self.data)
        rows = rows[-size:].to(self.data.dtype)
        if self.data.device != rows.device:
            self.data = self.data.to(rows.device)
        start = self.written % size
        head = min(len(rows), size - start)
        self.data[start : start + head] = rows[:head]
        self.data[: len(rows) - head] = rows[head:]
        self.written += len(rows)

    def rows(self) -> Tensor:
        return self.data[: min(self.written, len(self.data))]


class HealthMonitor:
    """Watches the teacher for collapse. Needs no labels.

    `update` runs at each step: a few small reductions over at most `samples` images, nothing that makes the host wait
    for the device. `row` turns what has gathered since the last row into numbers. Statistics are those of this rank.

    Self-distillation collapses in two ways (Caron et al. 2021, "Emerging Properties in Self-Supervised Vision
    Transformers", section 5.3): every image gets the same prototype, or every prototype gets the same probability.
    In both, the target no longer depends on the image, the student's divergence falls to 0, and nothing is learnt.
    Such targets, nearly uniform, are also an ordinary stage of a run that goes well later: with a teacher sharper than
    the student they are an unstable balance, which takes hundreds of steps to leave. They become a warning soon where
    the teacher is not sharper, and only after `plateau` rows where it is.

    Args:
        prototypes: K of the CLS head.
        embed_dim: D of the backbone.
        window: embeddings that standard deviation and effective rank are computed over.
        usage_window: teacher samples that prototype usage is counted over.
        samples: images per step that are looked at.
        warm_up: rows before the first warning: a random network has near-uniform targets and near-equal embeddings.
        persistence: rows in a row that must show a condition before it becomes a warning.
        plateau: the same for constant targets of a sharpened teacher.
    """

    def __init__(
        self,
        prototypes: int,
        embed_dim: int,
        *,
        window: int = 1024,
        usage_window: int = 4096,
        samples: int = 64,
        warm_up: int = 8,
        persistence: int = 4,
        plateau: int = 40,
    ) -> None:
        self.prototypes = prototypes
        self.samples = samples
        self.warm_up = warm_up
        self.persistence = persistence
        self.plateau = plateau
        self._embeddings = _Ring(window, (embed_dim,), torch.float32)
        self._assignments = _Ring(usage_window, (), torch.int64)
        self._patch_assignments = _Ring(usage_window, (), torch.int64)
        self._patch_prototypes = prototypes
        self._sums: _Sums | None = None
        self._rows = 0
        self._temperatures = (0.0, 0.0)  # teacher, student
        self._streaks = dict.fromkeys(_MESSAGES, 0)
        self._last: dict[str, float] = {}

    @torch.no_grad()
    def update(
        self,
        outputs: SSLOutputs,
        centre: Tensor | None,
        teacher_temp: float,
        student_temp: float,
        *,
        patch_centre: Tensor | None = None,
        patch_temp: float | None = None,
        masked: int | None = None,
    ) -> None:
        """Take in one micro-batch.

        Args:
            outputs: of the step; nothing of it is kept.
            centre: [1, K], what is subtracted from the teacher's CLS logits. None: their mean over this batch, which
                is what Sinkhorn-Knopp balances to first order.
            teacher_temp: temperature of the teacher's CLS distribution.
            student_temp: temperature of the student.
            patch_centre: [1, 1, K'] for the patch statistics; None leaves them out.
            patch_temp: temperature of the teacher's patch distribution; None: `teacher_temp`.
            masked: rows of `outputs.teacher_patch` that are of masked patches, padding lies behind them; None: all.
        """
        self._temperatures = teacher_temp, student_temp
        batch = len(outputs.teacher_cls) // 2
        count = min(batch, self.samples)
        views = torch.cat([torch.arange(count), torch.arange(batch, batch + count)]).to(outputs.teacher_cls.device)
        logits = outputs.teacher_cls.index_select(0, views).float()  # [2b, K], crop-major
        centred = logits - (logits.mean(0, keepdim=True) if centre is None else centre.float())
        student = outputs.student_cls.index_select(0, views).float()
        log_teacher = F.log_softmax(centred / teacher_temp, dim=1)
        log_student = F.log_softmax(student / student_temp, dim=1).roll(count, 0)  # row i: the other view of image i
        teacher = log_teacher.exp()
        embeddings = F.normalize(outputs.teacher_features.index_select(0, views).float(), dim=1)
        nearest = (embeddings[:count] @ embeddings[count:].t()).argmax(1)

        patch_entropy, patches = logits.new_zeros(()), 0
        patch_logits = outputs.teacher_patch[:masked][: 4 * self.samples]
        if patch_centre is not None and len(patch_logits):
            patch_logits = patch_logits.float() - patch_centre.flatten().float()
            log_patch = F.log_softmax(patch_logits / (patch_temp or teacher_temp), dim=1)
            patch_entropy, patches = -(log_patch.exp() * log_patch).sum(), len(log_patch)
            self._patch_assignments.write(log_patch.argmax(1))
            self._patch_prototypes = log_patch.shape[1]

        self._embeddings.write(embeddings)
        self._assignments.write(centred.argmax(1))
        self._add(
            _Sums(
                entropy=-(teacher * log_teacher).sum(),
                marginal=teacher.sum(0),
                divergence=(teacher * (log_teacher - log_student)).sum(),
                hits=(nearest == torch.arange(count, device=nearest.device)).sum(),
                patch_entropy=patch_entropy,
                updates=1,
                images=count,
                patches=patches,
            )
        )

    def _add(self, new: _Sums) -> None:
        old = self._sums
        if old is not None:
            device = new.entropy.device  # sums of a resumed run come on the CPU
            before = {n: v.to(device) if isinstance(v := getattr(old, n), Tensor) else v for n in _SUM_NAMES}
            new = _Sums(**{name: before[name] + getattr(new, name) for name in _SUM_NAMES})
        self._sums = new

    def row(self) -> dict[str, float]:
        """Statistics since the last row; an empty dict if there was no update. This call waits for the device.

        Returns:
            teacher_entropy: mean entropy of the teacher's distribution (centred, sharpened), nats.
            marginal_entropy: entropy of its mean over images, nats. Healthy: well above teacher_entropy.
            entropy_max: ln K, what both cannot exceed.
            student_teacher_kl: KL(teacher || student) on the other view of the same image, nats.
            embedding_std: standard deviation of L2-normalised CLS embeddings, mean over dimensions, times sqrt(D);
                1 = spread over the sphere, 0 = one point.
            effective_rank: exp(entropy of the normalised singular values) of the centred embeddings (Roy and
                Vetterli 2007, "The effective rank").
            prototype_usage: share of the K prototypes that some recent image prefers.
            prototype_perplexity: exp(entropy of the counts), the number of prototypes in even use.
            prototype_top_share: share of recent images that prefer the most popular prototype.
            view_top1: share of images whose nearest neighbour among the other views of the batch is their own.
            view_chance: what guessing would score.
            patch_entropy, patch_usage: as above for masked patches, where `update` was told their centre.
        """
        sums, self._sums = self._sums, None
        if sums is None:
            return {}
        samples = 2 * sums.images
        marginal = sums.marginal.double() / samples
        row = {
            "teacher_entropy": float(sums.entropy) / samples,
            "marginal_entropy": float(torch.special.entr(marginal).sum()),
            "entropy_max": math.log(self.prototypes),
            "student_teacher_kl": float(sums.divergence) / samples,
            **embedding_spread(self._embeddings.rows()),
            **_usage(self._assignments.rows(), self.prototypes),
            "view_top1": float(sums.hits) / sums.images,
            "view_chance": sums.updates / sums.images,
        }
        if sums.patches:
            row["patch_entropy"] = float(sums.patch_entropy) / sums.patches
            row["patch_usage"] = _usage(self._patch_assignments.rows(), self._patch_prototypes)["prototype_usage"]
        self._judge(row)
        return row

    def warnings(self) -> list[str]:
        """Plain-language messages on what is wrong; empty in a healthy run.

        A condition is told when it has lasted long enough, and again every few rows while it lasts.
        """
        teacher_temp, student_temp = self._temperatures
        heard = []
        for name, streak in self._streaks.items():
            passing = name == "constant" and teacher_temp < _SHARPENED * student_temp
            overdue = streak - (self.plateau if passing else self.persistence)
            if overdue >= 0 and overdue % _REPEAT == 0:
                heard.append(_MESSAGES[name]({**self._last, "teacher_temp": teacher_temp, "rows": streak}))
        return heard

    def _judge(self, row: dict[str, float]) -> None:
        self._rows += 1
        self._last = row
        limit = row["entropy_max"]
        information = row["marginal_entropy"] - row["teacher_entropy"]  # mutual, of image and prototype
        agreed = row["student_teacher_kl"] < _AGREED_KL
        found = {
            "point": row["embedding_std"] < _POINT_STD or row["effective_rank"] < _POINT_RANK,
            "constant": agreed and information < _CONSTANT_INFORMATION * limit,
            "dominant": row["prototype_top_share"] > _DOMINANT_SHARE and row["marginal_entropy"] < limit / 2,
        }
        judged = self._rows > self.warm_up
        self._streaks = {name: self._streaks[name] + 1 if judged and found[name] else 0 for name in _MESSAGES}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next rows depend on, as plain tensors, numbers and dicts."""
        state: dict[str, Any] = {
            "rows": self._rows,
            "temperatures": list(self._temperatures),
            "streaks": dict(self._streaks),
            "last": dict(self._last),
            "patch_prototypes": self._patch_prototypes,
            "sums": None if self._sums is None else {name: getattr(self._sums, name) for name in _SUM_NAMES},
        }
        for name, ring in self._rings():
            state[name] = {"data": ring.data.clone(), "written": ring.written}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`. Tensors stay on the device they come on; the next update moves them."""
        self._rows = int(state["rows"])
        self._temperatures = float(state["temperatures"][0]), float(state["temperatures"][1])
        self._streaks = {name: int(state["streaks"][name]) for name in _MESSAGES}
        self._last = dict(state["last"])
        self._patch_prototypes = int(state["patch_prototypes"])
        self._sums = None if state["sums"] is None else _Sums(**state["sums"])
        for name, ring in self._rings():
            ring.data.copy_(state[name]["data"])
            ring.written = int(state[name]["written"])

    def _rings(self) -> list[tuple[str, _Ring]]:
        return [("embeddings", self._embeddings), ("choices", self._assignments), ("patches", self._patch_assignments)]


def embedding_spread(embeddings: Tensor) -> dict[str, float]:
    """`embedding_std` and `effective_rank` (see `HealthMonitor.row`) of L2-normalised embeddings [N, D]."""
    if not torch.isfinite(embeddings).all():
        return {"embedding_std": math.nan, "effective_rank": math.nan}
    centred = embeddings.double().cpu()
    centred = centred - centred.mean(0)
    samples, dim = centred.shape
    # The smaller Gram matrix: its eigenvalues are the squared singular values.
    gram = centred @ centred.t() if samples < dim else centred.t() @ centred
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    total = singular.sum()
    rank = float(torch.special.entr(singular / total).sum().exp()) if total > 0 else 1.0
    std = float(centred.square().mean(0).sqrt().mean()) * math.sqrt(dim)
    return {"embedding_std": std, "effective_rank": rank}


def _usage(assignments: Tensor, prototypes: int) -> dict[str, float]:
    counts = torch.bincount(assignments.cpu(), minlength=prototypes)
    shares = counts.double() / counts.sum()
    return {
        "prototype_usage": float((counts > 0).double().mean()),
        "prototype_perplexity": float(torch.special.entr(shares).sum().exp()),
        "prototype_top_share": float(shares.max()),
    }


def _point_message(row: dict[str, float]) -> str:
    return (
        f"Collapse to a point: the teacher gives nearly the same embedding to every image (embedding_std "
        f"{row['embedding_std']:.4f}, healthy above {_POINT_STD}; effective_rank {row['effective_rank']:.2f}, healthy "
        f"above {_POINT_RANK}). Likely causes: a learning rate that is too high, a centre that does not follow the "
        f"logits, or images that are all alike. Try a lower optim.lr, loss.centre_momentum=0.9, "
        f"a lower loss.teacher_temp, and look at the crops."
    )


def _constant_message(row: dict[str, float]) -> str:
    if row["teacher_entropy"] > _UNIFORM_ENTROPY * row["entropy_max"]:
        seen = f"nearly uniform (teacher_entropy {row['teacher_entropy']:.3f} of at most {row['entropy_max']:.3f} nats)"
        cause = (
            f"the teacher is not sharp enough (temperature {row['teacher_temp']:.3g}), or it moves too slowly for so "
            f"short a run. Try loss.teacher_temp=[0.04,0.04] with loss.student_temp=0.1, a lower first optim.momentum, "
            f"or more steps"
        )
    else:
        seen = (
            f"the same for every image (teacher_entropy {row['teacher_entropy']:.3f}, marginal_entropy "
            f"{row['marginal_entropy']:.3f} nats)"
        )
        cause = (
            f"the teacher's logits are not centred, or not sharpened (temperature {row['teacher_temp']:.3g}). Try "
            f"loss.centre_momentum=0.9 (1.0 switches centring off) and loss.teacher_temp=[0.04,0.04]"
        )
    return (
        f"Targets that do not depend on the image, for {row['rows']:.0f} rows: they are {seen} and the student copies "
        f"them (student_teacher_kl {row['student_teacher_kl']:.4f}), so nothing is learnt. Likely cause: {cause}."
    )


def _dominant_message(row: dict[str, float]) -> str:
    return (
        f"One prototype dominates: {row['prototype_top_share']:.0%} of recent images prefer the same one "
        f"(prototype_perplexity {row['prototype_perplexity']:.1f}). Likely cause: the centre does not balance the "
        f"prototypes, or the temperature is so low ({row['teacher_temp']:.3g}) that it cannot. Try "
        f"loss.centre_momentum=0.9 (1.0 switches centring off), a higher loss.teacher_temp, or a lower optim.lr."
    )


_MESSAGES = {
    "point": _point_message,
    "constant": _constant_message,
    "dominant": _dominant_message,
}


@torch.no_grad()
def view_retrieval(
    backbone: Backbone,
    source: ImageSource,
    crops_cfg: CropsConfig,
    count: int,
    seed: int,
    *,
    batch_size: int = 64,
) -> float:
    """Share of images whose first global view finds the image's second one among those of all `count` images.

    Nearest neighbour by the cosine of CLS tokens. Images (evenly spaced over the source) and views depend on the seed
    alone, so that two backbones are asked the same question. The backbone is evaluated where it is, in eval mode.

    Args:
        backbone: a model, or raw pixels.
        source: unlabelled images.
        crops_cfg: augmentation of the training; local crops are left out.
        count: images, at most the length of the source.
        seed: of the views.
        batch_size: images per forward pass.

    Returns:
        Top-1 in [0, 1]; guessing scores 1 / count.
    """
    count = min(count, len(source))
    crops = MultiCrop(replace(crops_cfg, local_crops=0))
    device = device_of(backbone)
    training = backbone.training
    backbone.train(False)
    parts: list[list[Tensor]] = [[], []]
    for start in range(0, count, batch_size):
        numbers = range(start, min(start + batch_size, count))
        pairs = [crops(source.load(i * len(source) // count), stream_seed(seed, i))[0] for i in numbers]
        for view, part in enumerate(parts):
            images = torch.stack([pair[view] for pair in pairs]).to(device)
            part.append(F.normalize(backbone.embed(images).float(), dim=1))
    backbone.train(training)
    first, second = (torch.cat(part) for part in parts)
    nearest = (first @ second.t()).argmax(1)
    return float((nearest == torch.arange(count, device=device)).float().mean())
