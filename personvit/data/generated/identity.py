"""Who a generated person is: body, hair, clothes, bag. Everything here persists over cameras and poses.

Identities come in families of four that share the colours of their clothes most of the time and differ in pattern,
cut, bag, hair or build. The average colour of a picture therefore says little about who is in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from personvit.data.generated.config import Stream, random_stream

Colour = tuple[int, int, int]

FAMILY_SIZE = 4

CLOTHES: dict[str, tuple[Colour, float]] = {
    "black": ((30, 30, 33), 18),
    "charcoal": ((62, 64, 68), 9),
    "grey": ((118, 120, 122), 8),
    "silver": ((176, 177, 178), 5),
    "white": ((226, 225, 221), 11),
    "navy": ((34, 42, 72), 10),
    "blue": ((52, 88, 156), 6),
    "sky": ((138, 172, 208), 4),
    "denim": ((72, 92, 124), 6),
    "beige": ((196, 180, 150), 5),
    "khaki": ((140, 126, 92), 4),
    "brown": ((96, 68, 48), 4),
    "red": ((168, 40, 44), 5),
    "wine": ((98, 32, 46), 3),
    "green": ((50, 102, 66), 3),
    "olive": ((84, 88, 54), 3),
    "yellow": ((208, 176, 66), 2),
    "orange": ((200, 104, 46), 2),
    "pink": ((208, 142, 156), 3),
    "purple": ((96, 70, 124), 2),
    "teal": ((44, 112, 118), 2),
}
"""Name -> (RGB, weight): a small palette, so that many persons wear much the same colours."""

LOWER_COLOURS = {
    "black": 24, "charcoal": 12, "grey": 7, "navy": 12, "denim": 20, "blue": 4, "sky": 4, "beige": 6, "khaki": 6,
    "brown": 4, "white": 4, "olive": 3, "wine": 1, "red": 1,
}  # fmt: skip
SKINS: list[Colour] = [(228, 188, 164), (214, 168, 140), (196, 148, 116), (160, 112, 82), (118, 80, 58), (84, 58, 44)]
HAIRS: list[Colour] = [(26, 22, 20), (48, 34, 26), (84, 58, 38), (136, 100, 62), (186, 152, 98), (150, 148, 144)]
SHOES: list[Colour] = [(28, 28, 30), (220, 218, 214), (92, 64, 44), (120, 120, 124), (150, 44, 46), (44, 62, 110)]

PATTERNS = {
    "plain": 38, "hoops": 11, "pinstripes": 6, "checks": 10, "dots": 5, "halves": 8, "band": 7, "sides": 4,
    "camouflage": 3, "yoke": 6, "sash": 3,
}  # fmt: skip
UPPERS = {"tshirt": 24, "shirt": 14, "sweater": 14, "hoodie": 12, "jacket": 20, "coat": 9, "vest": 4, "dress": 6}
LOWERS = {"trousers": 38, "jeans": 22, "leggings": 9, "shorts": 13, "skirt": 11, "track": 8}
HAIR_STYLES = {"short": 34, "crop": 10, "bald": 5, "bob": 12, "long": 17, "ponytail": 12, "bun": 6, "curly": 6}
HATS = {"none": 76, "cap": 10, "beanie": 6, "brim": 4, "hood": 2, "headscarf": 4}
BAGS = {"none": 42, "backpack": 23, "crossbody": 12, "shoulder": 9, "tote": 9, "case": 5}
LOGOS = {"none": 52, "chest": 16, "print": 18, "back": 8, "both": 6}


@dataclass(frozen=True, slots=True)
class Identity:
    """One person. Lengths are fractions of body height."""

    pid: int
    width: float
    """Width of the whole body relative to the mean."""
    shoulders: float
    hips: float
    belly: float
    legs: float
    """Leg length relative to the mean."""
    head: float
    skin: Colour
    hair: Colour
    hair_style: str
    hair_length: float
    beard: bool
    glasses: bool
    hat: str
    hat_colour: Colour
    upper: str
    upper_colour: Colour
    upper_second: Colour
    pattern: str
    pattern_size: float
    """Period of the pattern."""
    sleeve: float
    """Covered part of the arm, 0 shoulder to 1 wrist."""
    sleeve_second: bool
    open_front: float
    """Half angle (radians) through which an open front shows the inner shirt; 0: closed."""
    inner_colour: Colour
    logo: str
    logo_colour: Colour
    logo_shape: int
    hem: float
    """Where the upper garment ends: 1 is the crotch, above 1 it hangs over the legs."""
    lower: str
    lower_colour: Colour
    lower_second: Colour
    lower_length: float
    """Covered part of the leg, 0 hip to 1 ankle."""
    lower_width: float
    shoe: Colour
    sole: Colour
    boots: bool
    socks: float
    bag: str
    bag_colour: Colour
    bag_second: Colour
    bag_size: float
    bag_side: int
    """+1: the person's left, -1: the right."""
    scarf: bool
    scarf_colour: Colour

    def attributes(self) -> dict[str, object]:
        """The cues that tell persons apart, by name (for the data card and the checks)."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "pid"}


def make_identity(seed: int, pid: int) -> Identity:
    """Draw person `pid` of the set `seed`.

    Args:
        seed: seed of the set.
        pid: any integer from 0 on; persons 4k .. 4k + 3 are one family.
    """
    family = random_stream(seed, Stream.FAMILY, pid // FAMILY_SIZE)
    own = random_stream(seed, Stream.IDENTITY, pid)
    # Family members draw from the family's stream first: the same colours, seen through the same jitter.
    shared = {
        "upper": _cloth(family, _weights(CLOTHES)),
        "lower": _cloth(family, LOWER_COLOURS),
        "second": _cloth(family, _weights(CLOTHES)),
    }
    upper_colour = shared["upper"] if own.random() < 0.75 else _cloth(own, _weights(CLOTHES))
    lower_colour = shared["lower"] if own.random() < 0.75 else _cloth(own, LOWER_COLOURS)
    second = shared["second"] if own.random() < 0.5 else _cloth(own, _weights(CLOTHES))
    second = _apart(own, second, upper_colour)
    slender = own.random() < 0.5
    upper = _pick(own, UPPERS)
    lower = _pick(own, LOWERS)
    if not slender and (upper == "dress" or lower in ("skirt", "leggings")):
        upper, lower = ("shirt" if upper == "dress" else upper), "trousers"
    style = _pick(own, HAIR_STYLES if slender else {"short": 56, "crop": 22, "bald": 12, "curly": 8, "ponytail": 2})
    return Identity(
        pid=pid,
        width=float(np.clip(own.normal(0.94 if slender else 1.04, 0.11), 0.76, 1.36)),
        shoulders=float(own.normal(0.93 if slender else 1.05, 0.05)),
        hips=float(own.normal(1.06 if slender else 0.97, 0.05)),
        belly=float(np.clip(own.normal(1.0, 0.13), 0.75, 1.45)),
        legs=float(np.clip(own.normal(1.0, 0.04), 0.9, 1.1)),
        head=float(np.clip(own.normal(1.0, 0.05), 0.88, 1.14)),
        skin=_shift(own, SKINS[int(own.choice(len(SKINS), p=(0.2, 0.3, 0.2, 0.14, 0.1, 0.06)))], 8),
        hair=_shift(own, HAIRS[int(own.choice(len(HAIRS), p=(0.36, 0.26, 0.16, 0.09, 0.07, 0.06)))], 6),
        hair_style=style,
        hair_length=float(own.uniform(0.1, 0.3)),
        beard=not slender and own.random() < 0.25,
        glasses=own.random() < 0.2,
        hat=_pick(own, HATS),
        hat_colour=_cloth(own, _weights(CLOTHES)),
        upper=upper,
        upper_colour=upper_colour,
        upper_second=second,
        pattern=_pick(own, PATTERNS),
        pattern_size=float(own.uniform(0.028, 0.075)),
        sleeve=_sleeve(own, upper),
        sleeve_second=own.random() < 0.16,
        open_front=float(own.uniform(0.22, 0.6)) if upper in ("jacket", "coat") and own.random() < 0.55 else 0.0,
        inner_colour=_apart(own, _cloth(own, _weights(CLOTHES)), upper_colour),
        logo=_pick(own, LOGOS) if upper in ("tshirt", "sweater", "hoodie", "vest") else "none",
        logo_colour=_apart(own, _cloth(own, _weights(CLOTHES)), upper_colour),
        logo_shape=int(own.integers(0, 5)),
        hem=_hem(own, upper),
        lower=lower,
        lower_colour=lower_colour,
        lower_second=_apart(own, _cloth(own, _weights(CLOTHES)), lower_colour),
        lower_length=_lower_length(own, lower),
        lower_width={"leggings": 0.92, "skirt": 0.9, "shorts": 1.3}.get(lower, 1.0) * float(own.uniform(0.98, 1.32)),
        shoe=_shift(own, SHOES[int(own.choice(len(SHOES), p=(0.36, 0.26, 0.14, 0.12, 0.06, 0.06)))], 8),
        sole=(222, 220, 214) if own.random() < 0.4 else (34, 32, 32),
        boots=own.random() < 0.14,
        socks=float(own.uniform(0.03, 0.22)) if own.random() < 0.5 else 0.0,
        bag=_pick(own, BAGS),
        bag_colour=_cloth(own, _weights(CLOTHES)),
        bag_second=_cloth(own, _weights(CLOTHES)),
        bag_size=float(own.uniform(0.8, 1.25)),
        bag_side=1 if own.random() < 0.5 else -1,
        scarf=own.random() < (0.2 if upper in ("coat", "jacket") else 0.04),
        scarf_colour=_cloth(own, _weights(CLOTHES)),
    )


def _weights(table: dict[str, tuple[Colour, float]]) -> dict[str, float]:
    return {name: weight for name, (_, weight) in table.items()}


def _pick(rng: np.random.Generator, table: dict[str, int] | dict[str, float]) -> str:
    target = rng.random() * sum(table.values())
    for name, weight in table.items():
        target -= weight
        if target < 0:
            return name
    return name


def _shift(rng: np.random.Generator, colour: Colour, amount: int) -> Colour:
    *steps, common = rng.integers(-amount, amount + 1, size=4).tolist()
    red, green, blue = (min(240, max(12, level + step + common)) for level, step in zip(colour, steps, strict=True))
    return red, green, blue


def _cloth(rng: np.random.Generator, weights: dict[str, int] | dict[str, float]) -> Colour:
    return _shift(rng, CLOTHES[_pick(rng, weights)][0], 7)


def _apart(rng: np.random.Generator, colour: Colour, other: Colour) -> Colour:
    """`colour`, or black or white where it is too like `other` for a pattern to show."""
    if sum(abs(a - b) for a, b in zip(colour, other, strict=True)) > 110:
        return colour
    return _shift(rng, CLOTHES["white" if sum(other) < 380 else "black"][0], 7)


def _sleeve(rng: np.random.Generator, upper: str) -> float:
    if upper == "vest":
        return 0.0
    if upper == "tshirt":
        return float(rng.uniform(0.22, 0.42))
    if upper == "dress":
        return float(rng.choice([0.0, 0.2, 0.35, 0.95]))
    return float(rng.uniform(0.5, 0.75)) if rng.random() < 0.12 else 0.97


def _hem(rng: np.random.Generator, upper: str) -> float:
    if upper == "coat":
        return float(rng.uniform(1.15, 1.75))
    if upper == "dress":
        return float(rng.uniform(1.25, 1.95))
    return float(rng.uniform(0.74, 0.98))


def _lower_length(rng: np.random.Generator, lower: str) -> float:
    if lower == "shorts":
        return float(rng.uniform(0.28, 0.55))
    if lower == "skirt":
        return float(rng.uniform(0.26, 0.8))
    return float(rng.uniform(0.8, 0.9)) if rng.random() < 0.15 else 1.0
