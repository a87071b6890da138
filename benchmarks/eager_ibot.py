"""The step of iBOT in plain eager torch: the baseline that the pre-training benchmark compares with.

Written from the recipe (bytedance/ibot main_ibot.py, utils.py, models/): one forward for each resolution, attention as
two matrix products and a softmax, both heads on every patch token, a loop over the pairs of views for the CLS loss, the
patch loss of all tokens multiplied by the mask. Weight names are the project's, so both can start from the same ones.

It is tuned where that changes nothing of the above: clipping, AdamW and the moving average run as few launches over
all tensors and nothing waits for the GPU before the step's numbers are read; drop path is left out (rate 0).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from personvit.config import PretrainConfig
from personvit.data.loaders import CropBatch
from personvit.engine.step import StepResult
from personvit.losses import temperature_schedule
from personvit.models.ssl import StudentTeacher
from personvit.models.vit import ARCHITECTURES
from personvit.optim import build_schedules, clip_gradients, param_groups
from personvit.runtime.seed import seed_everything


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        weights = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1)  # [B, H, N, N]
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)


class Backbone(nn.Module):
    """A ViT on crops of one size; positions of other sizes by bicubic interpolation."""

    def __init__(self, cfg: PretrainConfig, student: bool) -> None:
        super().__init__()
        dim, depth, heads = ARCHITECTURES[cfg.model.arch]
        patch = cfg.model.patch_size
        self.grid = (cfg.crops.global_size[0] // patch, cfg.crops.global_size[1] // patch)
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], dim))
        self.masked_embed = nn.Parameter(torch.zeros(1, dim)) if student else None
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def positions(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return self.pos_embed
        table = self.pos_embed[:, 1:].reshape(1, *self.grid, -1).permute(0, 3, 1, 2)
        factor = tuple((new + 0.1) / old for new, old in zip(grid, self.grid, strict=True))
        table = F.interpolate(table, scale_factor=factor, mode="bicubic", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], table.flatten(2).transpose(1, 2)], dim=1)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """[B, 3, H, W], [B, N] bool -> [B, 1 + N, D], CLS first."""
        cells = self.patch_embed.proj(images)  # [B, D, h, w]
        grid = (cells.shape[2], cells.shape[3])
        patches = cells.flatten(2).transpose(1, 2)
        if masks is not None:
            patches = torch.where(masks.unsqueeze(-1), self.masked_embed.to(patches.dtype), patches)
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.positions(grid)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Prototypes(nn.Module):
    def __init__(self, dim: int, count: int, norm_last_layer: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not norm_last_layer)
        self.weight_v = nn.Parameter(torch.zeros(count, dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True)))


class Head(nn.Module):
    def __init__(self, cfg: PretrainConfig) -> None:
        super().__init__()
        width, hidden, bottleneck = ARCHITECTURES[cfg.model.arch][0], cfg.head.hidden_dim, cfg.head.bottleneck_dim
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        frozen = cfg.head.norm_last_layer
        self.last_layer = Prototypes(bottleneck, cfg.head.prototypes, frozen)
        shared = cfg.head.shared
        self.last_layer2 = self.last_layer if shared else Prototypes(bottleneck, cfg.head.patch_prototypes, frozen)

    def bottleneck(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.mlp(tokens).float(), dim=-1)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 1 + N, D] -> CLS logits [B, K], patch logits [B, N, K']."""
        vectors = self.bottleneck(tokens)
        return self.last_layer(vectors[:, 0]), self.last_layer2(vectors[:, 1:])


class Network(nn.Module):
    def __init__(self, cfg: PretrainConfig, student: bool) -> None:
        super().__init__()
        self.backbone = Backbone(cfg, student)
        self.head = Head(cfg)


class EagerStep:
    """A drop-in for `personvit.engine.step.PretrainStep` on one process, with the same weights for the same seed.

    Args:
        cfg: without drop path; `loss.centering` is the centre.
        device: where it runs.
        steps_per_epoch: of the schedules.
        masked_heads: only masked patches enter the student's head and the teacher's prototypes (the teacher's mean
            logit for the centre then comes from the mean vector: the last layer is linear). Same losses, less work.
    """

    def __init__(self, cfg: PretrainConfig, device: torch.device, steps_per_epoch: int, masked_heads: bool) -> None:
        if cfg.model.drop_path or {cfg.loss.centering, cfg.loss.patch_centering} != {"centre"}:
            raise ValueError("the baseline knows no drop path and no Sinkhorn: model.drop_path=0 loss.centering=centre")
        self.cfg, self.masked_heads, self._device, self._per_epoch = cfg, masked_heads, device, steps_per_epoch
        seed_everything(cfg.train.seed)
        weights = StudentTeacher(cfg)
        self.student, self.teacher = Network(cfg, student=True), Network(cfg, student=False)
        self.student.load_state_dict(weights.student.state_dict())
        self.teacher.load_state_dict(weights.teacher.state_dict())
        self.student.to(device)
        self.teacher.to(device).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            param_groups(self.student), betas=cfg.optim.betas, eps=cfg.optim.eps, fused=device.type == "cuda"
        )
        averages = dict(self.teacher.named_parameters())
        self._pairs = [(averages[name], p) for name, p in self.student.named_parameters() if name in averages]
        self.schedules = build_schedules(cfg.optim, cfg.train.batch_size, cfg.train.epochs, steps_per_epoch)
        warmup, epochs = cfg.loss.teacher_temp_warmup_epochs, cfg.train.epochs
        self._cls_temps = temperature_schedule(*cfg.loss.teacher_temp, warmup, epochs)
        self._patch_temps = temperature_schedule(*cfg.loss.teacher_patch_temp, warmup, epochs, cfg.masks.start_epoch)
        self.centre = torch.zeros(1, cfg.head.prototypes, device=device)
        self.centre2 = torch.zeros(1, 1, cfg.head.patch_prototypes, device=device)

    def forward_backward(self, batch: CropBatch, step: int, micro: int) -> None:
        """Losses and gradients of the only micro-batch (0) of a step."""
        assert micro == 0
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self.cfg.train.precision == "bf16"):
            epoch = step // self._per_epoch
            if self.masked_heads:
                cls, patch = self._masked(batch, float(self._patch_temps[epoch]))
            else:
                cls, patch = self._all_tokens(batch, float(self._patch_temps[epoch]))
            loss_cls = self._pairs_of_views(*cls, float(self._cls_temps[epoch]))
        loss = self.cfg.loss.lambda_cls * loss_cls + self.cfg.loss.lambda_patch * patch
        loss.backward()
        self._losses = torch.stack([loss, loss_cls, patch]).detach()

    def _all_tokens(self, batch: CropBatch, temp: float) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """(student CLS logits, teacher CLS logits), patch loss; as published."""
        with torch.no_grad():
            teacher_cls, teacher_patch = self.teacher.head(self.teacher.backbone(batch.global_crops))
        student_cls, student_patch = self.student.head(self.student.backbone(batch.global_crops, batch.masks))
        student = [student_cls]
        if batch.local_crops is not None:
            student.append(self.student.head(self.student.backbone(batch.local_crops))[0])
        loss = torch.zeros((), device=self._device)
        targets = ((teacher_patch.float() - self.centre2) / temp).softmax(dim=-1).chunk(2)
        views = (student_patch.float() / self.cfg.loss.student_temp).chunk(2)
        for target, view, mask in zip(targets, views, batch.masks.chunk(2), strict=True):
            token = -(target * F.log_softmax(view, dim=-1)).sum(dim=-1)  # [B, N]
            crop = (token * mask).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)
            loss = loss + crop.mean() / 2
        self._means = teacher_cls.float().mean(dim=0, keepdim=True), teacher_patch.float().mean(dim=(0, 1))
        return (torch.cat(student), teacher_cls), loss

    def _masked(self, batch: CropBatch, temp: float) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The same, with heads on masked patches only."""
        teacher, student, indices = self.teacher.head, self.student.head, batch.mask_indices
        with torch.no_grad():
            vectors = teacher.bottleneck(self.teacher.backbone(batch.global_crops))
            teacher_cls = teacher.last_layer(vectors[:, 0])
            teacher_patch = teacher.last_layer2(vectors[:, 1:].flatten(0, 1)[indices])
            patch_mean = teacher.last_layer2(vectors[:, 1:].mean(dim=(0, 1)))
        tokens = self.student.backbone(batch.global_crops, batch.masks)
        cls_tokens = [tokens[:, 0]]
        if batch.local_crops is not None:
            cls_tokens.append(self.student.backbone(batch.local_crops)[:, 0])
        student_cls = student.last_layer(student.bottleneck(torch.cat(cls_tokens)))
        student_patch = student.last_layer2(student.bottleneck(tokens[:, 1:].flatten(0, 1)[indices]))
        targets = ((teacher_patch.float() - self.centre2[0]) / temp).softmax(dim=-1)
        log_student = F.log_softmax(student_patch.float() / self.cfg.loss.student_temp, dim=-1)
        loss = -((targets * log_student).sum(dim=-1) * batch.mask_weights).sum() / len(batch.global_crops)
        self._means = teacher_cls.float().mean(dim=0, keepdim=True), patch_mean.float()
        return (student_cls, teacher_cls), loss

    def _pairs_of_views(self, student_cls: Tensor, teacher_cls: Tensor, temp: float) -> Tensor:
        """CLS loss: mean over the pairs of a teacher's view and another view of the student."""
        targets = ((teacher_cls.float() - self.centre) / temp).softmax(dim=-1).chunk(2)
        views = (student_cls.float() / self.cfg.loss.student_temp).chunk(2 + self.cfg.crops.local_crops)
        terms = [
            -(target * F.log_softmax(view, dim=-1)).sum(dim=-1).mean()
            for q, target in enumerate(targets)
            for v, view in enumerate(views)
            if v != q
        ]
        return torch.stack(terms).mean()

    @torch.no_grad()
    def finish(self, step: int) -> StepResult:
        """Clip, AdamW, moving average, centres."""
        norm = clip_gradients(self.student.parameters(), self.cfg.optim.clip_grad)
        loss, loss_cls, loss_patch, grad_norm = torch.cat([self._losses, norm.reshape(1)]).tolist()
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.schedules.lr[step])
        self.optimizer.param_groups[0]["weight_decay"] = float(self.schedules.weight_decay[step])
        self.optimizer.step()
        averages, values = zip(*self._pairs, strict=True)
        torch._foreach_lerp_(averages, values, 1.0 - float(self.schedules.momentum[step]))
        for centre, mean in zip((self.centre, self.centre2), self._means, strict=True):
            centre.lerp_(mean.view_as(centre), 1.0 - self.cfg.loss.centre_momentum)
        self.optimizer.zero_grad(set_to_none=True)
        return StepResult(loss=loss, loss_cls=loss_cls, loss_patch=loss_patch, grad_norm=grad_norm, finite=True)
