from __future__ import annotations

import dataclasses
import json

import pytest

from personvit.config import (
    EvaluateConfig,
    FinetuneConfig,
    PretrainConfig,
    given_yaml,
    load_config,
    recipes,
    to_plain,
    to_yaml,
)
from personvit.errors import ConfigError


@pytest.mark.parametrize(
    ("schema", "recipe"), [(schema, name) for schema in (PretrainConfig, FinetuneConfig) for name in recipes(schema)]
)
def test_every_recipe_loads_and_reads_back(schema, recipe, tmp_path):
    cfg = load_config(schema, recipe)
    (tmp_path / "resolved.yaml").write_text(to_yaml(cfg))
    assert load_config(schema, str(tmp_path / "resolved.yaml")) == cfg


def test_recipes_that_the_documentation_names():
    named = {"demo", "vit_small_luperson", "vit_base_luperson", "vit_small_small_gpu"}
    assert named | {"vit_small_luperson_disjoint", "vit_base_luperson_disjoint"} <= set(recipes(PretrainConfig))


@pytest.mark.parametrize("size", ["small", "base"])
def test_both_readings_of_the_crop_scales(size):
    overlapping = load_config(PretrainConfig, f"vit_{size}_luperson")
    disjoint = load_config(PretrainConfig, f"vit_{size}_luperson_disjoint")
    assert (overlapping.crops.global_scale, overlapping.crops.local_scale) == ((0.4, 1.0), (0.05, 0.8))
    assert (disjoint.crops.global_scale, disjoint.crops.local_scale) == ((0.8, 1.0), (0.05, 0.4))
    same = dataclasses.replace(disjoint, crops=overlapping.crops)
    assert same == overlapping
    assert overlapping.model.arch == f"vit_{size}"
    assert overlapping.head.norm_last_layer == (size == "base")


def test_order_of_precedence(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  epochs: 40\n  batch_size: 32\n")
    cfg = load_config(PretrainConfig, str(file), ["train.batch_size=64", "train.batch_size=128"])
    assert (cfg.train.epochs, cfg.train.batch_size, cfg.train.seed) == (40, 128, 0)


def test_what_was_given_reads_back(tmp_path):
    overrides = ["train.epochs=33", "data.root=/some where/x=y", "crops.local_crops=0"]
    text = given_yaml(PretrainConfig, "demo", overrides)
    assert "non_finite_limit" not in text  # a default that nobody gave
    file = tmp_path / "config.yaml"
    file.write_text(text)
    assert load_config(PretrainConfig, str(file)) == load_config(PretrainConfig, "demo", overrides)


def test_plain_values_are_built_in_types():
    plain = to_plain(load_config(PretrainConfig, "demo"))
    assert plain["crops"]["global_size"] == [64, 32]
    assert json.loads(json.dumps(plain)) == plain


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", ["unknown key train.epoch", "Did you mean train.epochs?"]),
        ("optim.learning_rate=3", ["unknown key optim.learning_rate"]),
        ("train.batch_size=many", ["train.batch_size=many", "many"]),
        ("train.batch_size", ["not key=value"]),
        ("train.batch_size=0", ["train.batch_size=0", "1 or more"]),
        ("train.precision=fp61", ["train.precision=fp61", "Did you mean train.precision=fp16?|fp32"]),
        ("kernels.backend=fuse", ["Did you mean kernels.backend=fused?"]),
        ("crops.global_size=[250,128]", ["[250,128]", "model.patch_size=16", "crops.global_size=[256,128]"]),
        ("crops.local_size=[128,60]", ["crops.local_size=[128,64]"]),
        ("masks.ratio=[0.3]", ["masks.ratio"]),
        ("head.prototypes=4096", ["head.shared=false"]),
        ("train.epochs=20", ["loss.teacher_temp_warmup_epochs=30"]),
        ("loss.centering=center", ["Did you mean loss.centering=centre?"]),
        ("crops.global_scale=[0.9,0.4]", ["crops.global_scale"]),
        ("model.drop_path=1.0", ["model.drop_path=1.0"]),
        ("crops.jitter=[0.4,0.4,0.2,0.7]", ["crops.jitter", "a hue in [0, 0.5]"]),
        ("crops.jitter=[-1,0,0,0]", ["crops.jitter", "0 or more"]),
        ("masks.aspect=[0,2]", ["masks.aspect"]),
    ],
)
def test_bad_values_name_value_cause_and_remedy(override, words):
    with pytest.raises(ConfigError) as caught:
        load_config(PretrainConfig, None, [override])
    for word in words:
        assert any(choice in str(caught.value) for choice in word.split("|")), str(caught.value)


def test_unknown_recipes_and_files(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean vit_small_luperson"):
        load_config(PretrainConfig, "vit_small_lupersn")
    with pytest.raises(ConfigError, match="no such file"):
        load_config(PretrainConfig, "mine.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ConfigError, match="mapping of sections"):
        load_config(PretrainConfig, str(tmp_path / "list.yaml"))


def test_recipe_with_an_unknown_key_is_named(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("optim:\n  lrr: 1\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: unknown key optim\.lrr. Did you mean optim\.lr\?"):
        load_config(PretrainConfig, str(file))


def test_evaluate_has_its_own_keys():
    assert load_config(EvaluateConfig, None, ["image_size=[256,128]"]).image_size == (256, 128)
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(EvaluateConfig, None, ["train.epochs=3"])
