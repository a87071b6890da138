"""Defaults, recipe, flags and `key=value` become one validated configuration."""

from __future__ import annotations

import dataclasses
import difflib
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from personvit.config.evaluate import EvaluateConfig
from personvit.config.finetune import FinetuneConfig
from personvit.config.pretrain import PretrainConfig
from personvit.errors import ConfigError

C = TypeVar("C", PretrainConfig, FinetuneConfig, EvaluateConfig)


_VERBS = {PretrainConfig: "pretrain", FinetuneConfig: "finetune", EvaluateConfig: "evaluate"}


def recipes(schema: type[Any]) -> list[str]:
    """Names of the recipes of a command that ship with the package.

    Args:
        schema: PretrainConfig; FinetuneConfig, whose recipes begin with `finetune_`; or EvaluateConfig, which has none.
    """
    folder = resources.files("personvit") / "configs"
    names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
    return [name for name in names if schema is (FinetuneConfig if name.startswith("finetune_") else PretrainConfig)]


def load_config(schema: type[C], recipe: str | None = None, overrides: list[str] | None = None) -> C:
    """Merge defaults, a recipe and `key=value` overrides into a validated configuration.

    Args:
        schema: PretrainConfig, FinetuneConfig or EvaluateConfig.
        recipe: name of a shipped recipe, or path of a YAML file.
        overrides: `section.key=value` strings, applied last.

    Raises:
        ConfigError: unknown key (with the nearest match), wrong type, value out of range, or no such recipe.
    """
    merged = OmegaConf.structured(schema)
    for origin, layer in _layers(recipe, overrides, schema):
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(_explain(schema, origin, layer, error)) from None
    try:
        result = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        cause = error.__cause__
        raise (cause if isinstance(cause, ConfigError) else ConfigError(str(error))) from None
    assert isinstance(result, schema)
    return result


def to_yaml(config: PretrainConfig | FinetuneConfig | EvaluateConfig) -> str:
    """The configuration as YAML text that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def to_plain(config: object) -> dict[str, Any]:
    """The configuration as nested dicts of built-in types (tuples become lists)."""
    plain = _without_tuples(OmegaConf.to_container(OmegaConf.structured(config)))
    assert isinstance(plain, dict)
    return plain


def _without_tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _without_tuples(item) for key, item in value.items()}
    return [_without_tuples(item) for item in value] if isinstance(value, list | tuple) else value


def given_yaml(schema: type[C], recipe: str | None, overrides: list[str] | None = None) -> str:
    """What the user gave, recipe and overrides merged, as YAML text that `load_config` reads back."""
    return OmegaConf.to_yaml(OmegaConf.merge(*(layer for _, layer in _layers(recipe, overrides, schema))))


def _layers(recipe: str | None, overrides: list[str] | None, schema: type[Any]) -> list[tuple[str, Any]]:
    """(origin, values) of the recipe and of every override, in the order in which they apply."""
    layers: list[tuple[str, Any]] = []
    if recipe is not None:
        layers.append((f"recipe {recipe}", _read_recipe(recipe, schema)))
    for item in overrides or []:
        key, separator, _ = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"{item!r} is not key=value. Example: train.batch_size=64")
        layers.append((item, OmegaConf.from_dotlist([item])))
    return layers


def _read_recipe(recipe: str, schema: type[Any]) -> DictConfig:
    path, own = Path(recipe), recipes(schema)
    shipped = ", ".join(own) or "none for this command"
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"--config {recipe}: no such file. Shipped recipes: {shipped}")
        text = path.read_text(encoding="utf-8")
    elif recipe in own:
        text = (resources.files("personvit") / "configs" / f"{recipe}.yaml").read_text(encoding="utf-8")
    else:
        for other, verb in _VERBS.items():
            if recipe in recipes(other):
                raise ConfigError(f"--config {recipe}: a recipe of personvit {verb}. Shipped for this one: {shipped}")
        near = difflib.get_close_matches(recipe, own, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"--config {recipe}: no such recipe.{hint} Shipped: {shipped}")
    layer = OmegaConf.create(text)
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"--config {recipe}: a recipe is a mapping of sections to keys, got {type(layer).__name__}")
    return layer


def _known_keys(schema: type[Any], prefix: str = "") -> list[str]:
    keys = []
    for entry in dataclasses.fields(schema):
        factory = entry.default_factory
        if factory is not dataclasses.MISSING and dataclasses.is_dataclass(factory):
            keys += _known_keys(factory, f"{prefix}{entry.name}.")
        keys.append(prefix + entry.name)
    return keys


def _explain(schema: type[Any], origin: str, layer: Any, error: Exception) -> str:
    known = _known_keys(schema)
    for key in _leaf_keys(OmegaConf.to_container(layer)):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]}?" if near else ""
            return f"{origin}: unknown key {key}.{hint} All keys: personvit {_VERBS[schema]} --print-config"
    return f"{origin}: {str(error).splitlines()[0]}"


def _leaf_keys(tree: Any, prefix: str = "") -> list[str]:
    if not isinstance(tree, dict):
        return [prefix.removesuffix(".")]
    return [leaf for key, value in tree.items() for leaf in _leaf_keys(value, f"{prefix}{key}.")]
