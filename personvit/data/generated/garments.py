"""Textures of body parts, wrapped around them: row = along the part, column = around it, the middle column in front.

A texel is one uint32, R | G << 8 | B << 16, so that the rasteriser fetches a colour with a single index.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personvit.data.generated.config import Stream, random_stream
from personvit.data.generated.identity import Colour, Identity

Texture = NDArray[np.uint32]
Mask = NDArray[np.bool_]

TRUNK_SHAPE, LIMB_SHAPE, HEAD_SHAPE = (144, 128), (72, 64), (48, 64)
TRUNK_SPAN = 2.0
"""The trunk's texture runs from the neck (0) past the crotch (1) to 2, for coats and dresses."""
TRUNK_LENGTH, ARM_LENGTH, LEG_LENGTH = 0.35, 0.31, 0.475
"""Body heights per unit of the texture's rows."""


def pack(colour: Colour) -> int:
    """A colour as one integer."""
    return colour[0] | colour[1] << 8 | colour[2] << 16


def plain(colour: Colour) -> Texture:
    """A texture of one colour."""
    return np.full((1, 1), pack(colour), np.uint32)


def blend(first: Colour, second: Colour, share: float) -> Colour:
    """`first` with `share` of `second` mixed in."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


@dataclass(frozen=True, slots=True)
class Wardrobe:
    """All textures of one person."""

    trunk: Texture
    arm: Texture
    leg: Texture
    skirt: Texture
    head: Texture


_GRIDS: dict[tuple[int, int], tuple[NDArray[np.float32], NDArray[np.float32]]] = {}


def _grid(shape: tuple[int, int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Rows in [0, 1) as [R, 1] and angles in [-pi, pi) as [1, C]."""
    if shape not in _GRIDS:
        rows = ((np.arange(shape[0])[:, None] + 0.5) / shape[0]).astype(np.float32)
        angles = ((np.arange(shape[1], dtype=np.float32)[None, :] + 0.5) / shape[1] - 0.5) * 2 * np.pi
        _GRIDS[shape] = (rows, angles.astype(np.float32))
    return _GRIDS[shape]


def make_wardrobe(seed: int, person: Identity) -> Wardrobe:
    """Draw the textures of a person; the same person always gets the same."""
    rng = random_stream(seed, Stream.IDENTITY, person.pid, 1)
    print_blobs = rng.random((6, 4)).astype(np.float32)
    lower = _lower(person, LEG_LENGTH)
    return Wardrobe(
        trunk=_trunk(person, print_blobs),
        arm=_arm(person),
        leg=_leg(person, lower),
        skirt=lower,
        head=_head(person),
    )


def _cloth(
    pattern: str, first: Colour, second: Colour, period: float, shape: tuple[int, int], length: float, girth: float
) -> Texture:
    """A cloth with a pattern. `length`: body heights per unit of rows; `girth`: body heights per radian."""
    rows, angles = _grid(shape)
    y, x = rows * length, angles * girth
    a, b = pack(first), pack(second)
    out = np.full(shape, a, np.uint32)
    if pattern == "hoops":
        out[np.broadcast_to((y / period) % 1 < 0.45, shape)] = b
    elif pattern == "pinstripes":
        out[np.broadcast_to((x / (period * 0.7)) % 1 < 0.35, shape)] = b
    elif pattern == "checks":
        across, along = (y / period) % 1 < 0.5, (x / period) % 1 < 0.5
        out[across ^ along] = pack(blend(first, second, 0.5))
        out[across & along] = b
    elif pattern == "dots":
        out[((y / period) % 1 - 0.5) ** 2 + ((x / period) % 1 - 0.5) ** 2 < 0.08] = b
    elif pattern == "camouflage":
        wave = np.sin(y * 90 + 2 * np.sin(x * 60)) + np.sin(x * 75 + 3 * np.sin(y * 50))
        out[wave > 0.5] = b
        out[wave < -0.9] = pack(blend(first, (20, 20, 20), 0.5))
    elif pattern == "sides":
        out[:, np.abs(np.abs(angles[0]) - np.pi / 2) < 0.42] = b
    elif pattern == "sash":
        out[np.abs(y * 0.9 - x - 0.1) < 0.035] = b
    return out


def _trunk(person: Identity, blobs: NDArray[np.float32]) -> Texture:
    rows, angles = _grid(TRUNK_SHAPE)
    t, around = rows[:, 0] * TRUNK_SPAN, angles[0]
    length = TRUNK_LENGTH * TRUNK_SPAN
    first, second = person.upper_colour, person.upper_second
    out = _cloth(person.pattern, first, second, person.pattern_size, TRUNK_SHAPE, length, 0.1)
    if person.pattern == "halves":
        out[t > 0.52] = pack(second)
    elif person.pattern == "band":
        out[(t > 0.32) & (t < 0.5)] = pack(second)
    elif person.pattern == "yoke":
        out[t < 0.28] = pack(second)
    front = np.abs(around)
    if person.open_front > 0:
        out[:, front < person.open_front] = pack(person.inner_colour)
        out[:, np.abs(front - person.open_front - 0.05) < 0.05] = pack(blend(first, (0, 0, 0), 0.4))
    elif person.upper in ("shirt", "jacket", "coat"):
        line = blend(first, (255, 255, 255) if sum(first) < 300 else (0, 0, 0), 0.35)
        out[:, front < 0.06] = pack(line)
    if person.upper == "hoodie":
        out[(t > 0.66)[:, None] & (t < 0.68)[:, None] & (front < 0.8)[None, :]] = pack(blend(first, (0, 0, 0), 0.4))
        out[(t < 0.24)[:, None] & (front > 2.2)[None, :]] = pack(blend(first, (0, 0, 0), 0.2))
    _logo(out, person, t, around, blobs)
    _neckline(out, person, t, front)
    _straps(out, person, t, around)
    # Below the hem: belt line, then the lower garment. Coats and dresses hang on to the end of the texture.
    if person.hem < 1:
        below = t > person.hem
        waist = person.lower_colour
        out[below] = pack(waist)
        out[below & (t < person.hem + 0.03)] = pack(blend(waist, (16, 16, 16), 0.6))
    return out


def _logo(
    out: Texture, person: Identity, t: NDArray[np.float32], around: NDArray[np.float32], blobs: NDArray[np.float32]
) -> None:
    colour = pack(person.logo_colour)
    rows = t[:, None]
    if person.logo == "chest":
        out[(rows > 0.26) & (rows < 0.36) & (np.abs(around - 0.45) < 0.2)[None, :]] = colour
    if person.logo in ("print", "both"):
        out[_mark(person.logo_shape, (rows - 0.45) / 0.2, around[None, :] / 0.75, blobs)] = colour
    if person.logo in ("back", "both"):
        behind = (np.mod(around, 2 * np.pi) - np.pi)[None, :].astype(np.float32)
        out[_mark((person.logo_shape + 2) % 5, (rows - 0.38) / 0.2, behind / 0.8, blobs[::-1])] = colour


def _mark(shape: int, y: NDArray[np.float32], x: NDArray[np.float32], blobs: NDArray[np.float32]) -> Mask:
    """A print within |x|, |y| < 1: disc, ring, bars, blobs, or triangle."""
    inside = (np.abs(y) < 1) & (np.abs(x) < 1)
    if shape == 0:
        return np.asarray(x * x + y * y < 0.8)
    if shape == 1:
        return np.asarray(np.abs(x * x + y * y - 0.65) < 0.28)
    if shape == 2:
        return inside & ((y * 1.5) % 1 < 0.5)
    if shape == 3:
        mask = np.zeros(np.broadcast_shapes(y.shape, x.shape), bool)
        for cy, cx, ry, rx in blobs.tolist():
            mask |= (
                ((y - cy * 1.6 + 0.8) / (0.15 + 0.4 * ry)) ** 2 + ((x - cx * 1.6 + 0.8) / (0.15 + 0.4 * rx)) ** 2
            ) < 1
        return mask
    return inside & (np.abs(x) < (y + 1) / 2)


def _neckline(out: Texture, person: Identity, t: NDArray[np.float32], front: NDArray[np.float32]) -> None:
    depth = {"shirt": 0.17, "vest": 0.26, "dress": 0.22, "jacket": 0.18, "coat": 0.2}.get(person.upper, 0.1)
    colour = person.skin if person.upper != "jacket" else person.inner_colour
    if person.scarf:
        colour, depth = person.scarf_colour, 0.2
    out[t[:, None] < 0.06 + depth * np.maximum(0.0, 1 - front / 0.75)[None, :]] = pack(colour)
    if person.upper == "vest":
        side = np.abs(front - np.pi / 2) < 0.75
        out[(t > 0.02)[:, None] & (t < 0.3)[:, None] & side[None, :]] = pack(person.skin)


def _straps(out: Texture, person: Identity, t: NDArray[np.float32], around: NDArray[np.float32]) -> None:
    colour, rows = pack(blend(person.bag_colour, (10, 10, 10), 0.25)), t[:, None]
    if person.bag == "backpack":
        out[(rows < 0.5) & (np.abs(np.abs(around) - 0.72) < 0.14)[None, :]] = colour
    elif person.bag == "crossbody":
        # From the shoulder opposite to the bag, in front and behind.
        sideways = np.sin(around)[None, :] * person.bag_side
        out[(np.abs(rows - 0.45 - 0.42 * sideways) < 0.045) & (rows < 0.9)] = colour
    elif person.bag == "shoulder":
        out[(rows < 0.85) & (np.abs(np.sin(around) * person.bag_side - 0.8) < 0.05)[None, :]] = colour


def _arm(person: Identity) -> Texture:
    rows, _ = _grid(LIMB_SHAPE)
    t = rows[:, 0]
    first = person.upper_second if person.sleeve_second else person.upper_colour
    pattern = "plain" if person.sleeve_second else person.pattern
    out = _cloth(pattern, first, person.upper_second, person.pattern_size, LIMB_SHAPE, ARM_LENGTH, 0.04)
    if person.pattern == "yoke":
        out[t < 0.22] = pack(person.upper_second)
    if person.pattern == "band" and not person.sleeve_second:
        out[(t > 0.28) & (t < 0.46)] = pack(person.upper_second)
    bare = t > person.sleeve
    if 0 < person.sleeve < 0.9:
        out[(t > person.sleeve - 0.05) & ~bare] = pack(blend(first, (0, 0, 0), 0.2))
    out[bare] = pack(person.skin)
    return out


def _lower(person: Identity, length: float) -> Texture:
    first, second = person.lower_colour, person.lower_second
    rows, angles = _grid(LIMB_SHAPE)
    if person.lower in ("skirt", "shorts") and person.pattern in ("plain", "halves", "yoke"):
        kind = ("plain", "checks", "hoops", "dots")[person.logo_shape % 4]
        return _cloth(kind, first, second, 0.05, LIMB_SHAPE, length, 0.07)
    out = np.full(LIMB_SHAPE, pack(first), np.uint32)
    if person.lower == "jeans":
        faded = (np.abs(angles) < 0.9) & (np.abs(rows - 0.3) < 0.18)
        out[faded] = pack(blend(first, (205, 212, 220), 0.22))
        out[np.broadcast_to(np.abs(np.abs(angles) - np.pi / 2) < 0.1, LIMB_SHAPE)] = pack(blend(first, (0, 0, 0), 0.3))
    elif person.lower == "track":
        out[:, np.abs(np.abs(angles[0]) - np.pi / 2) < 0.3] = pack(second)
    return out


def _leg(person: Identity, lower: Texture) -> Texture:
    rows, _ = _grid(LIMB_SHAPE)
    t = rows[:, 0]
    out: Texture = lower.copy()
    covered = 0.12 if person.lower == "skirt" else person.lower_length
    bare = t > covered
    out[bare] = pack(person.skin)
    if person.lower == "skirt" and person.socks > 0.15:
        out[bare] = pack((44, 40, 44))
    elif person.socks > 0:
        out[bare & (t > 1 - person.socks)] = pack(person.sole)
    if person.boots:
        out[t > 0.72] = pack(person.shoe)
    return out


def _head(person: Identity) -> Texture:
    rows, angles = _grid(HEAD_SHAPE)
    t, front = rows, np.abs(angles)
    out = np.full(HEAD_SHAPE, pack(person.skin), np.uint32)
    dark = pack(blend(person.skin, (20, 12, 10), 0.75))
    out[(np.abs(t - 0.5) < 0.035) & (np.abs(front - 0.42) < 0.16)] = dark
    out[(np.abs(t - 0.43) < 0.02) & (np.abs(front - 0.42) < 0.22)] = pack(blend(person.hair, person.skin, 0.3))
    out[(np.abs(t - 0.8) < 0.025) & (front < 0.28)] = pack(blend(person.skin, (150, 40, 50), 0.5))
    out[(t > 0.55) & (t < 0.68) & (front < 0.09)] = pack(blend(person.skin, (60, 30, 20), 0.25))
    if person.glasses:
        out[(np.abs(t - 0.5) < 0.055) & (front < 1.4) & (front > 0.1)] = pack((24, 24, 26))
    if person.beard:
        out[(t > 0.7) & (front < 1.3)] = pack(blend(person.hair, person.skin, 0.3))
    if person.hair_style != "bald":
        # The hair line: high over the face, down to the ears at the sides, to the neck behind.
        line = np.interp(angles[0], (-3.2, -1.7, -1.2, -0.8, 0, 0.8, 1.2, 1.7, 3.2),
                         (0.86, 0.8, 0.55, 0.32, 0.24, 0.32, 0.55, 0.8, 0.86))  # fmt: skip
        if person.hair_style == "crop":
            line = line - 0.08
        out[t < line[None, :]] = pack(person.hair)
    if person.hat in ("beanie", "cap", "brim"):
        out[np.broadcast_to(t < 0.3, HEAD_SHAPE)] = pack(person.hat_colour)
    elif person.hat in ("hood", "headscarf"):
        colour = person.upper_colour if person.hat == "hood" else person.hat_colour
        out[(front > 0.85) | (t < 0.22)] = pack(colour)
        out[(t > 0.86) & (front > 0.4)] = pack(colour)
    return out
