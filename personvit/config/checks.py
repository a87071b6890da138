"""Range checks of configuration values: every message names the key, the value and what was expected."""

from __future__ import annotations

import difflib

from personvit.errors import ConfigError


def check(condition: bool, key: str, value: object, expected: str) -> None:
    """Raise ConfigError unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{key}={value} is out of range: expected {expected}. Set it with {key}=VALUE.")


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError, with the nearest choice, unless `value` is one of them."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, n=1)
        hint = f" Did you mean {key}={near[0]}?" if near else ""
        raise ConfigError(f"{key}={value} is not one of {', '.join(choices)}.{hint}")


def check_probability(key: str, values: tuple[float, ...]) -> None:
    """Raise ConfigError unless all values lie in [0, 1]."""
    for value in values:
        check(0.0 <= value <= 1.0, key, value, "a probability in [0, 1]")


def check_range(key: str, pair: tuple[float, float], low: float, high: float) -> None:
    """Raise ConfigError unless `pair` is ascending, above `low` and at most `high`."""
    check(len(pair) == 2 and low < pair[0] <= pair[1] <= high, key, pair, f"{low} < first <= second <= {high}")
