from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from personvit.errors import ConfigError
from personvit.models import VisionTransformer, build_vit, vit_base, vit_micro, vit_small
from personvit.models.vit import Stream, cls_rows, patch_rows, position_resize_matrix


def _tiny(**overrides) -> VisionTransformer:
    settings = {"img_size": (64, 32), "embed_dim": 32, "depth": 3, "num_heads": 2, **overrides}
    return VisionTransformer(**settings)


def _added(stream: Stream) -> torch.Tensor:
    return stream.norm(torch.nn.LayerNorm(stream.tokens.shape[1]))[0]


def _crops(*sizes):
    return [torch.randn(count, 3, height, width) for count, height, width in sizes]


@pytest.mark.parametrize(("build", "count"), [(vit_small, 21_639_552), (vit_base, 85_746_432)])
def test_parameter_counts_are_the_published_ones(build, count):
    with torch.device("meta"):
        model = build()
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.pos_embed.shape == (1, 129, model.embed_dim)


def test_state_dict_has_150_tensors_and_a_mask_token_only_on_request():
    with torch.device("meta"):
        assert len(vit_small().state_dict()) == 150
        assert set(vit_small(masked_embed=True).state_dict()) - set(vit_small().state_dict()) == {"masked_embed"}


@pytest.mark.parametrize("masked", [False, True])
def test_packed_stream_equals_separate_forwards(masked):
    model = _tiny(masked_embed=True).double().eval()
    torch.nn.init.normal_(model.masked_embed)
    crops = [crop.double() for crop in _crops((3, 64, 32), (5, 32, 16), (1, 32, 48))]
    masks = [torch.rand(3, 8) < 0.5, None, torch.rand(1, 6) < 0.5] if masked else [None, None, None]
    packed = model.forward_packed(crops, masks)
    for tokens, crop, mask in zip(packed, crops, masks, strict=True):
        torch.testing.assert_close(tokens, model(crop, mask), rtol=1e-12, atol=1e-12)


def test_packed_gradients_equal_those_of_separate_forwards():
    model = _tiny(masked_embed=True).double().eval()
    crops = [crop.double() for crop in _crops((2, 64, 32), (4, 32, 16))]
    masks = [torch.rand(2, 8) < 0.5, None]
    weights = [torch.randn_like(tokens) for tokens in model.forward_packed(crops, masks)]

    def gradients(outputs):
        model.zero_grad()
        sum((tokens * weight).sum() for tokens, weight in zip(outputs, weights, strict=True)).backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    packed = gradients(model.forward_packed(crops, masks))
    separate = gradients([model(crop, mask) for crop, mask in zip(crops, masks, strict=True)])
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, separate[name], rtol=1e-9, atol=1e-10, msg=name)


def test_chosen_rows_equal_those_of_the_whole_and_so_do_gradients():
    model = _tiny(masked_embed=True).double().eval()
    torch.nn.init.normal_(model.masked_embed)
    crops = [crop.double() for crop in _crops((2, 64, 32), (4, 32, 16))]
    masks = [torch.rand(2, 8) < 0.5, None]
    chosen = masks[0].flatten().nonzero().squeeze(1)
    rows = torch.cat([cls_rows([(2, 9), (4, 3)], chosen.device), patch_rows(chosen, 8)])
    whole = [part.flatten(0, 1) for part in model.forward_packed(crops, masks)]
    part = model.forward_rows(crops, masks, rows)
    torch.testing.assert_close(part, torch.cat(whole)[rows], rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(part)
    names, parameters = zip(*model.named_parameters(), strict=True)
    ours = torch.autograd.grad((part * weight).sum(), parameters)
    theirs = torch.autograd.grad((torch.cat(whole)[rows] * weight).sum(), parameters)
    for name, mine, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-10, msg=name)


def test_rows_skip_the_cls_tokens():
    assert cls_rows([(2, 5), (0, 7), (3, 2)], torch.device("cpu")).tolist() == [0, 5, 10, 12, 14]
    assert patch_rows(torch.tensor([0, 3, 4, 7]), 4).tolist() == [1, 4, 6, 9]


def test_sequences_do_not_see_each_other():
    model = _tiny().eval()
    first, second = _crops((2, 64, 32), (3, 32, 16))
    before = model.forward_packed([first, second], [None, None])[0]
    after = model.forward_packed([first, second + 1], [None, None])[0]
    assert torch.equal(before, after)


def test_mask_token_replaces_content_but_not_position():
    model = _tiny(masked_embed=True).eval()
    mask = torch.zeros(1, 8, dtype=torch.bool)
    mask[0, 3] = True
    image, other = _crops((1, 64, 32), (1, 64, 32))
    blended = image.clone()
    blended[:, :, 16:32, 16:32] = other[:, :, 16:32, 16:32]  # patch 3 = row 1, column 1 of the 4x2 grid
    assert torch.equal(model(image, mask), model(blended, mask))
    assert not torch.equal(model(image), model(blended))
    moved = mask.roll(1, dims=1)
    assert not torch.allclose(model(image, mask)[:, 0], model(image, moved)[:, 0])


def test_mask_token_gets_a_gradient_without_any_mask():
    model = _tiny(masked_embed=True)
    model(_crops((2, 64, 32))[0], torch.zeros(2, 8, dtype=torch.bool)).sum().backward()
    assert model.masked_embed.grad is not None
    assert not model.masked_embed.grad.any()


def test_masks_without_a_mask_token_are_refused():
    with pytest.raises(ConfigError, match="masked_embed=True"):
        _tiny()(_crops((1, 64, 32))[0], torch.zeros(1, 8, dtype=torch.bool))


@pytest.mark.parametrize(("height", "width", "fit"), [(60, 32, "64x32"), (64, 40, "64x32"), (8, 32, "16x32")])
def test_sizes_that_do_not_divide_name_the_nearest_one(height, width, fit):
    with pytest.raises(ConfigError, match=fit):
        _tiny()(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("new", [(8, 4), (6, 3), (24, 8), (16, 7)])
def test_position_matrix_equals_torch_interpolation(new):
    table = torch.randn(1, 5, 16, 8, dtype=torch.float64)
    factor = ((new[0] + 0.1) / 16, (new[1] + 0.1) / 8)
    expected = F.interpolate(table, scale_factor=factor, mode="bicubic", align_corners=False)
    ours = position_resize_matrix((16, 8), new, torch.device("cpu")) @ table.flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours.transpose(1, 2).view(expected.shape), expected, rtol=1e-12, atol=1e-12)


def test_position_matrix_made_in_inference_mode_serves_training():
    model = _tiny()
    image = _crops((1, 32, 16))[0]
    position_resize_matrix.cache_clear()
    with torch.inference_mode():
        model(image)
    model(image).sum().backward()
    assert model.pos_embed.grad[:, 1:].abs().sum() > 0


def test_drop_path_drops_whole_branches_and_keeps_the_mean():
    model = _tiny(drop_path_rate=0.5, depth=3)
    groups = [(2000, 3), (1000, 2)]
    scales = model._drop_path_scales(groups, torch.device("cpu"))
    assert scales[0] is None  # the first block never drops
    for scale, rate in zip(scales[1:], (0.25, 0.5), strict=True):
        assert scale.shape == (2, 8000)
        long, short = scale[:, :6000].view(2, 2000, 3), scale[:, 6000:].view(2, 1000, 2)
        for part in (long, short):  # one draw per sequence
            assert torch.equal(part, part[:, :, :1].expand_as(part))
        per_sequence = torch.cat([long[:, :, 0], short[:, :, 0]], dim=1)  # [2, 3000]
        torch.testing.assert_close(per_sequence.unique(), torch.tensor([0, 1 / (1 - rate)]))
        assert abs(per_sequence.mean() - 1) < 0.05
        assert not torch.equal(per_sequence[0], per_sequence[1])  # attention and MLP are drawn apart


def test_dropped_sequence_passes_the_block_unchanged():
    model = _tiny(depth=1)
    tokens, groups = torch.randn(2 * 5, 32), [(2, 5)]
    scales = torch.tensor([0.0, 1.0]).repeat_interleave(5).expand(2, -1)
    mixed = _added(model.blocks[0](Stream(tokens), groups, scales))
    assert torch.equal(mixed[:5], tokens[:5])
    torch.testing.assert_close(mixed[5:], _added(model.blocks[0](Stream(tokens), groups))[5:])


def test_attention_and_mlp_branch_have_their_own_scale():
    block, groups = _tiny(depth=1).blocks[0], [(1, 5)]
    tokens, factors = torch.randn(5, 32), torch.tensor([3.0, 5.0])
    attended = tokens + 3 * block.attn(block.norm1(tokens), groups)
    expected = attended + 5 * block.mlp(block.norm2(attended))
    torch.testing.assert_close(_added(block(Stream(tokens), groups, factors.view(2, 1).expand(2, 5))), expected)


def test_evaluation_mode_is_deterministic_and_training_mode_is_not():
    model, image = _tiny(drop_path_rate=0.9), _crops((8, 64, 32))[0]
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))


def test_attention_rows_sum_to_one_and_intermediate_ends_with_the_output():
    model, image = _tiny().eval(), _crops((2, 64, 32))[0]
    attention = model.last_attention(image)
    assert attention.shape == (2, 2, 9, 9)
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(2, 2, 9))
    assert torch.equal(model.intermediate(image, 2)[-1], model(image))
    with pytest.raises(ConfigError, match="Choose 1 to 3"):
        model.intermediate(image, 4)


def test_published_initialisation():
    model = vit_micro(masked_embed=True)
    assert 0.015 < model.pos_embed.std() < 0.025
    assert 0.015 < model.blocks[0].attn.qkv.weight.std() < 0.025
    assert not model.blocks[0].attn.qkv.bias.any()
    assert not model.masked_embed.any()
    bound = 768**-0.5  # torch's default of a convolution with 3 * 16 * 16 inputs: uniform within +-1/sqrt(768)
    assert 0.9 * bound < model.patch_embed.proj.weight.abs().max() <= bound


def test_unknown_architecture_and_heads():
    with pytest.raises(ConfigError, match="vit_small"):
        build_vit("vit_smal")
    with pytest.raises(ConfigError, match="num_heads=3"):
        build_vit("vit_micro", num_heads=3)
    assert build_vit("vit_micro", depth=2).depth == 2
