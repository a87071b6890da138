"""The projection head against the published iBOT code."""

from __future__ import annotations

import pytest
import torch

from personvit.models import ProjectionHead


@pytest.mark.parametrize(("tag", "patch_prototypes"), [("split", 56), ("shared", 40)])
@torch.no_grad()
def test_logits_equal_ibot(golden, tag, patch_prototypes):
    values = {key: torch.from_numpy(value) for key, value in golden("ibot_head").items()}
    head = ProjectionHead(24, 40, patch_prototypes, tag == "shared", hidden_dim=48, bottleneck_dim=16)
    prefix = f"{tag}.w."
    head.load_state_dict({key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)})
    tokens = values[f"{tag}_x"]  # [2, 5, 24], CLS first
    cls_logits, patch_logits = head(tokens[:, 0], tokens[:, 1:].flatten(0, 1))
    torch.testing.assert_close(cls_logits, values[f"{tag}_cls"], atol=1e-5, rtol=0)
    torch.testing.assert_close(patch_logits, values[f"{tag}_patch"].flatten(0, 1), atol=1e-5, rtol=0)


def test_prototypes_equal_torch_weight_norm():
    head = ProjectionHead(8, 12, 12, hidden_dim=16, bottleneck_dim=6).double()
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 12, bias=False).double(), dim=0)
    with torch.no_grad():
        head.last_layer.weight_g.uniform_(0.5, 2)
        layer.parametrizations.weight.original0.copy_(head.last_layer.weight_g)
        layer.parametrizations.weight.original1.copy_(head.last_layer.weight_v)
    matrix = head.prototype_matrices()[0]
    torch.testing.assert_close(matrix, layer.weight)
    probe = torch.randn_like(matrix)
    (matrix * probe).sum().backward()
    (layer.weight * probe).sum().backward()
    torch.testing.assert_close(head.last_layer.weight_g.grad, layer.parametrizations.weight.original0.grad)
    torch.testing.assert_close(head.last_layer.weight_v.grad, layer.parametrizations.weight.original1.grad)
