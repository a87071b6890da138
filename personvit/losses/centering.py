"""What turns teacher logits into targets: centre and temperature, or Sinkhorn-Knopp."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from personvit.runtime.distributed import all_reduce_sum, world_size


def temperature_schedule(
    first: float, final: float, warmup_epochs: int, epochs: int, delay: int = 0
) -> NDArray[np.float64]:
    """Teacher temperature of each epoch (bytedance/ibot main_ibot.py, iBOTLoss).

    Args:
        first: temperature at the start.
        final: temperature from the end of the warm-up on.
        warmup_epochs: linear from `first` to `final`, both included.
        epochs: length of the run.
        delay: epochs at `first` before the warm-up begins (patches, when masking starts late).

    Returns:
        [epochs] float64.
    """
    ramp = np.linspace(first, final, warmup_epochs)
    constant = np.full(max(0, epochs - delay - warmup_epochs), float(final))
    schedule: NDArray[np.float64] = np.concatenate([np.full(delay, float(first)), ramp, constant])
    return schedule[:epochs]


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Targets whose rows sum to 1 and whose columns share the batch evenly, over all ranks.

    facebookresearch/dinov2, dinov2/loss/dino_clstoken_loss.py (after SwAV, arXiv 2006.09882): alternately scale the
    prototypes to equal mass and the samples to mass 1.

    Args:
        logits: [M, K] teacher logits of this rank; M may be 0 and may differ between ranks.
        temperature: softmax temperature.
        iterations: alternations.

    Returns:
        [M, K] float32.
    """
    return ((logits.float() - sinkhorn_offset(logits, temperature, iterations)) / temperature).softmax(dim=-1)


@torch.no_grad()
def sinkhorn_offset(logits: Tensor, temperature: float, iterations: int = 3, counted: Tensor | None = None) -> Tensor:
    """What Sinkhorn-Knopp takes from the logits: its targets are softmax((logits - offset) / temperature).

    Each iteration divides the columns by their mass, then the rows by theirs. In the log domain these are terms that
    are subtracted, and a softmax over rows does not see the rows' terms: the columns' terms, added up, are all that is
    left. The published code multiplies exp(logits / temperature) up and down, which overflows or leaves a prototype
    without mass for sharp logits; here the same steps stay finite.

    Args:
        logits: [M, K] teacher logits of this rank; M may be 0 and may differ between ranks.
        temperature: softmax temperature.
        iterations: alternations.
        counted: [M] bool, rows that have mass; None: all.

    Returns:
        [K] float32, the same on all ranks.
    """
    scaled = logits.float() / temperature
    columns = scaled.new_zeros(scaled.shape[1])
    for iteration in range(iterations):
        log_mass = (scaled - columns).log_softmax(dim=1) if iteration else scaled
        if counted is not None:
            log_mass = log_mass.masked_fill(~counted.unsqueeze(1), -torch.inf)
        mass = _logsumexp_over_ranks(log_mass.logsumexp(dim=0))
        columns = columns + mass.masked_fill(mass == -torch.inf, 0.0)  # no row on any rank
    return temperature * columns


def _logsumexp_over_ranks(values: Tensor) -> Tensor:
    """Log of the sum over ranks of exp(values) [K]; a sum of rows, of which each rank fills its own, gathers them."""
    if world_size() == 1:
        return values
    rows = values.new_zeros(world_size(), len(values))
    rows[dist.get_rank()] = values
    return all_reduce_sum(rows).logsumexp(dim=0)


class TeacherTargets(nn.Module):
    """What the teacher's logits are compared against: the moving centre, or the offset of Sinkhorn-Knopp.

    The centre follows bytedance/ibot main_ibot.py: c <- m * c + (1 - m) * mean(raw teacher logits over all ranks),
    after the loss that used the old c. Micro-batches only add to a sum; `apply_centre` does the update, once per
    optimiser step, so that n micro-batches give the centre of one large batch.

    A subclass names the buffer and gives its number of axes, of which the last has K entries.

    Args:
        prototypes: K.
        student_temp: student temperature.
        centre_momentum: m; 1 never moves the centre.
        centering: "centre" or "sinkhorn" (no centre is used).
        sinkhorn_iterations: alternations of Sinkhorn-Knopp.
    """

    centre_name: ClassVar[str]
    centre_axes: ClassVar[int]

    def __init__(
        self,
        prototypes: int,
        student_temp: float = 0.1,
        centre_momentum: float = 0.9,
        centering: str = "centre",
        sinkhorn_iterations: int = 3,
    ) -> None:
        super().__init__()
        self.student_temp = student_temp
        self.centre_momentum = centre_momentum
        self.centering = centering
        self.sinkhorn_iterations = sinkhorn_iterations
        self.register_buffer(self.centre_name, torch.zeros((1,) * (self.centre_axes - 1) + (prototypes,)))
        self._pending: Tensor | None = None  # [K + 1] float32: sum of logits, and how many

    @property
    def centre(self) -> Tensor:
        """The buffer that holds the centre."""
        return self.get_buffer(self.centre_name)

    def offset(self, teacher_logits: Tensor, temperature: float, counted: Tensor | None = None) -> Tensor:
        """What is taken from raw teacher logits [M, K] before their softmax, [K] float32: the centre.

        With Sinkhorn-Knopp it depends on the logits of all ranks, and every rank must call it. Rows that are not
        `counted` [M] bool (None: all are) have no part in it.
        """
        if self.centering == "sinkhorn":
            return sinkhorn_offset(teacher_logits, temperature, self.sinkhorn_iterations, counted)
        return self.centre.flatten()

    @torch.no_grad()
    def _add(self, logit_sum: Tensor, count: int) -> None:
        """Add a sum of logits [K] over `count` rows to the next centre; Sinkhorn-Knopp needs none."""
        if self.centering == "sinkhorn":
            return
        entry = torch.cat([logit_sum.float(), logit_sum.new_full((1,), count, dtype=torch.float32)])
        self._pending = entry if self._pending is None else self._pending + entry

    @torch.no_grad()
    def apply_centre(self) -> None:
        """Move the centre by what was accumulated on all ranks since the last call; every rank must call it."""
        if self._pending is None:
            return
        total = all_reduce_sum(self._pending)
        self._pending = None
        mean = (total[:-1] / total[-1]).view_as(self.centre)
        self.centre.lerp_(mean, 1.0 - self.centre_momentum)

    def discard(self) -> None:
        """Forget what was accumulated (a step that is skipped because it is not finite)."""
        self._pending = None
