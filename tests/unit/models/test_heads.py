from __future__ import annotations

import pytest
import torch

from personvit.errors import ConfigError
from personvit.models import ProjectionHead

SETTINGS = {"in_dim": 12, "prototypes": 20, "patch_prototypes": 20, "hidden_dim": 16, "bottleneck_dim": 8}


def test_shared_matrix_has_both_names_and_one_tensor():
    head = ProjectionHead(**SETTINGS)
    names = [name for name in head.state_dict() if name.startswith("last_layer")]
    assert names == ["last_layer.weight_g", "last_layer.weight_v", "last_layer2.weight_g", "last_layer2.weight_v"]
    assert head.last_layer2.weight_v is head.last_layer.weight_v
    assert sum("last_layer" in name for name, _ in head.named_parameters()) == 2
    first, second = head.prototype_matrices()
    assert first is second


def test_separate_matrices_are_separate():
    head = ProjectionHead(**{**SETTINGS, "patch_prototypes": 30}, shared=False)
    cls_logits, patch_logits = head(torch.randn(2, 12), torch.randn(5, 12))
    assert (cls_logits.shape, patch_logits.shape) == ((2, 20), (5, 30))


def test_shared_matrix_of_two_sizes_is_refused():
    with pytest.raises(ConfigError, match="shared=false"):
        ProjectionHead(**{**SETTINGS, "patch_prototypes": 30})


@pytest.mark.parametrize("frozen", [False, True])
def test_norm_last_layer_freezes_the_norm_only(frozen):
    head = ProjectionHead(**SETTINGS, norm_last_layer=frozen)
    head(torch.randn(2, 12), torch.randn(3, 12))[0].sum().backward()
    assert (head.last_layer.weight_g.grad is None) == frozen
    assert head.last_layer.weight_v.grad is not None


def test_logits_are_cosines_at_the_start():
    head = ProjectionHead(**SETTINGS)
    logits = torch.cat(head(torch.randn(50, 12) * 100, torch.randn(50, 12)))
    assert logits.abs().max() <= 1 + 1e-5
    torch.testing.assert_close(head.bottleneck(torch.randn(7, 12)).norm(dim=-1), torch.ones(7))


def test_no_patch_tokens():
    head = ProjectionHead(**SETTINGS)
    _, patch_logits = head(torch.randn(2, 12), torch.empty(0, 12))
    assert patch_logits.shape == (0, 20)


def test_rows_do_not_depend_on_their_company():
    head = ProjectionHead(**SETTINGS).double()
    cls_token, patches = torch.randn(2, 12).double(), torch.randn(9, 12).double()
    alone = head(cls_token, patches[:0])[0]
    torch.testing.assert_close(head(cls_token, patches)[0], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(head(cls_token, patches)[1], head(patches, cls_token)[0], rtol=1e-12, atol=1e-12)


def test_logits_follow_autocast():
    head = ProjectionHead(**SETTINGS)
    with torch.autocast("cpu", torch.bfloat16):
        logits, _ = head(torch.randn(2, 12), torch.randn(3, 12))
    assert logits.dtype == torch.bfloat16
