"""From an identity, a pose and a view to the tubes that the rasteriser draws."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personvit.data.generated.garments import TRUNK_LENGTH, TRUNK_SPAN, Texture, Wardrobe, blend, plain
from personvit.data.generated.identity import Identity
from personvit.data.generated.pose import Pose
from personvit.data.generated.render import PROFILE_STEPS, Floats, Point, Tube

_T = np.linspace(0, 1, PROFILE_STEPS, dtype=np.float32)
_TRUNK_T = (0.0, 0.05, 0.1, 0.16, 0.3, 0.45, 0.58, 0.72, 0.85, 1.0)


@dataclass(frozen=True, slots=True)
class View:
    """Where the camera sees the person from."""

    yaw: float
    """0: the person faces the camera; pi: seen from behind; positive turns to the right of the picture."""
    pitch: float
    """How far the camera looks down, radians."""
    distance: float
    """In body heights; small values make the nearer end of the person larger."""


class _Figure:
    """Projects joints and collects tubes."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.cos, self.sin = float(np.cos(view.yaw)), float(np.sin(view.yaw))
        self.tilt_cos, self.tilt_sin = float(np.cos(view.pitch)), float(np.sin(view.pitch))
        self.tubes: list[Tube] = []

    def project(self, point: NDArray[np.float64]) -> tuple[Point, float]:
        """Screen point (body heights) and local scale."""
        x, y, z = (float(value) for value in point)
        right, ahead = x * self.cos + z * self.sin, z * self.cos - x * self.sin
        up = y - 0.5
        near = ahead * self.tilt_cos + up * self.tilt_sin
        scale = self.view.distance / (self.view.distance - near)
        return (right * scale, (ahead * self.tilt_sin - up * self.tilt_cos) * scale, near), scale

    def limb(
        self,
        start: NDArray[np.float64],
        end: NDArray[np.float64],
        first: float,
        last: float,
        texture: Texture,
        rows: tuple[float, float] = (0.0, 1.0),
        middle: float | None = None,
    ) -> None:
        """A round tube with half-round ends, radii `first` to `last` (and `middle` in between)."""
        a, scale_a = self.project(start)
        b, scale_b = self.project(end)
        ra, rb = first * scale_a, last * scale_b
        rm = 0.5 * (ra + rb) if middle is None else middle * 0.5 * (scale_a + scale_b)
        dx, dy = b[0] - a[0], b[1] - a[1]
        length = max((dx * dx + dy * dy) ** 0.5, 1e-3)
        # The bone grows by the radii at either end, and the profile closes over them like half circles.
        total = length + ra + rb
        s = _T * np.float32(total) - np.float32(ra)
        along = np.minimum(np.maximum(s / np.float32(length), 0), 1)
        radius = np.where(along < 0.5, ra + (rm - ra) * 2 * along, rm + (rb - rm) * (2 * along - 1))
        beyond = np.where(s < 0, s, np.maximum(s - length, 0))
        profile = np.sqrt(np.maximum(radius * radius - beyond * beyond, 1e-9)).astype(np.float32)
        ux, uy = dx / length, dy / length
        slope = (b[2] - a[2]) / length
        self.tubes.append(
            Tube(
                (a[0] - ux * ra, a[1] - uy * ra, a[2] - slope * ra),
                (b[0] + ux * rb, b[1] + uy * rb, b[2] + slope * rb),
                profile, 1.0, texture, rows, self.view.yaw,
            )
        )  # fmt: skip

    def shell(
        self,
        start: NDArray[np.float64],
        end: NDArray[np.float64],
        wide: Floats,
        deep: Floats,
        texture: Texture,
        rows: tuple[float, float] = (0.0, 1.0),
        turn: float = 0.0,
    ) -> None:
        """A tube with an elliptical section, `wide` across the body and `deep` from front to back."""
        a, scale_a = self.project(start)
        b, scale_b = self.project(end)
        yaw = self.view.yaw + turn
        c, s = float(np.cos(yaw)) ** 2, float(np.sin(yaw)) ** 2
        profile = np.sqrt(wide * wide * np.float32(c) + deep * deep * np.float32(s))
        middle = PROFILE_STEPS // 2
        thickness = (float(wide[middle]) ** 2 * s + float(deep[middle]) ** 2 * c) ** 0.5
        flatness = thickness / max(float(profile[middle]), 1e-6)
        profile = profile * np.float32(0.5 * (scale_a + scale_b))
        self.tubes.append(Tube(a, b, profile.astype(np.float32), flatness, texture, rows, yaw))


def build(person: Identity, wardrobe: Wardrobe, pose: Pose, view: View) -> list[Tube]:
    """The tubes of a person in body heights: x right and y down around the middle of the body."""
    figure = _Figure(view)
    joints = pose.joints
    _trunk(figure, person, wardrobe, joints)
    for name in ("l", "r"):
        _leg(figure, person, wardrobe, joints, name)
        _arm(figure, person, wardrobe, joints, name)
    _head(figure, person, wardrobe, joints, pose.head_turn)
    _bag(figure, person, joints)
    return figure.tubes


def _curve(values: tuple[float, ...], at: tuple[float, ...] = _TRUNK_T) -> Floats:
    return np.interp(_T, at, values).astype(np.float32)


def _trunk(figure: _Figure, person: Identity, wardrobe: Wardrobe, joints: dict[str, NDArray[np.float64]]) -> None:
    shoulder = 0.112 * person.width * person.shoulders
    hip = 0.088 * person.width * person.hips
    loose = {"coat": 1.1, "jacket": 1.08, "hoodie": 1.07, "sweater": 1.03}.get(person.upper, 1.0)
    waist = 0.5 * (0.8 * shoulder + 0.85 * hip) * (0.55 + 0.45 * person.belly) * loose
    wide = _curve((0.03, shoulder * 0.66, shoulder * 0.94, shoulder * 0.98, shoulder * 0.93 * loose,
                   0.5 * (shoulder * 0.9 + waist), waist, 0.5 * (waist + hip) * 1.03, hip, hip * 0.86))  # fmt: skip
    chest = 0.068 * person.width * loose
    belly = chest * (0.35 + 0.62 * person.belly)
    deep = _curve((0.03, 0.045, chest * 0.75, chest * 0.9, chest, 0.5 * (chest + belly), belly, belly,
                   0.066 * person.hips, 0.055))  # fmt: skip
    start, end = joints["neck"], joints["crotch"]
    figure.shell(start, end, wide, deep, wardrobe.trunk, (0.0, 1 / TRUNK_SPAN))
    axis = (end - start) / TRUNK_LENGTH
    if person.hem > 1:
        flare = 1.5 if person.upper == "dress" else 1.22
        _hang(figure, start, axis, 0.55, person.hem, waist, hip, flare, wardrobe.trunk, (0.55, person.hem), TRUNK_SPAN)
    if person.lower == "skirt" and person.upper not in ("dress",):
        bottom = 0.72 + 1.25 * person.lower_length
        flare = 1.0 + 0.5 * person.lower_width * person.lower_length
        _hang(figure, start, axis, 0.68, bottom, waist, hip, flare, wardrobe.skirt, (0.0, person.lower_length), 1.0)
    skin = plain(person.scarf_colour if person.scarf else person.skin)
    figure.limb(start + np.array([0, -0.01, -0.004]), joints["chin"] + np.array([0, 0.0, -0.02]),
                0.036 if person.scarf else 0.029, 0.03 if person.scarf else 0.026, skin)  # fmt: skip


def _hang(
    figure: _Figure,
    start: NDArray[np.float64],
    axis: NDArray[np.float64],
    top: float,
    bottom: float,
    waist: float,
    hip: float,
    flare: float,
    texture: Texture,
    rows: tuple[float, float],
    span: float,
) -> None:
    """Cloth that hangs from the waist over the legs."""
    first = start + axis * TRUNK_LENGTH * top
    last = first + np.array([0.0, -TRUNK_LENGTH * (bottom - top), 0.0])
    wide = _curve((waist * 1.02, hip * 1.08, hip * 1.08 * flare), (0.0, 0.35, 1.0))
    deep = _curve((0.07, 0.095, 0.08 * flare + 0.04), (0.0, 0.35, 1.0))
    figure.shell(first, last, wide, deep, texture, (rows[0] / span, rows[1] / span))


def _leg(
    figure: _Figure, person: Identity, wardrobe: Wardrobe, joints: dict[str, NDArray[np.float64]], name: str
) -> None:
    bare = person.lower == "skirt" or person.upper == "dress"
    cut = 0.9 if bare else person.lower_width
    width = 0.5 + 0.5 * person.width
    knee = 0.5 if person.lower != "shorts" else 0.5 + max(0.0, person.lower_length - 0.5)
    thigh = 0.054 * width * person.hips * (0.8 + 0.2 * cut)
    joint = 0.036 * width * (0.55 + 0.45 * cut)
    ankle = 0.023 * (0.35 + 0.65 * cut) if person.lower != "shorts" else 0.02
    if person.boots:
        ankle = 0.03
    hip, mid, foot, toe = (joints[f"{part}_{name}"] for part in ("hip", "knee", "ankle", "toe"))
    figure.limb(hip, mid, thigh, joint, wardrobe.leg, (0.0, knee))
    figure.limb(mid, foot, joint * 0.97, ankle, wardrobe.leg, (knee, 1.0), middle=0.5 * (joint + ankle) * 1.1)
    heel = foot + 0.15 * (foot - toe) + np.array([0.0, -0.012, 0.0])
    figure.limb(heel, toe, 0.024, 0.017, plain(person.shoe))
    figure.limb(heel - np.array([0, 0.014, 0]), toe - np.array([0, 0.012, 0]), 0.015, 0.013, plain(person.sole))


def _arm(
    figure: _Figure, person: Identity, wardrobe: Wardrobe, joints: dict[str, NDArray[np.float64]], name: str
) -> None:
    width = 0.45 + 0.55 * person.width
    loose = {"coat": 1.2, "jacket": 1.16, "hoodie": 1.14, "sweater": 1.06, "vest": 0.85}.get(person.upper, 1.0)
    cuff = 0.021 * (loose if person.sleeve > 0.9 else 0.85)
    shoulder, elbow, wrist, hand = (joints[f"{part}_{name}"] for part in ("shoulder", "elbow", "wrist", "hand"))
    figure.limb(shoulder, elbow, 0.031 * width * (0.4 + 0.6 * loose), 0.028 * width * loose, wardrobe.arm, (0.0, 0.54))
    figure.limb(elbow, wrist, 0.028 * width * loose, cuff, wardrobe.arm, (0.54, 1.0))
    figure.limb(wrist, hand, 0.016, 0.017, plain(person.skin))


def _head(
    figure: _Figure,
    person: Identity,
    wardrobe: Wardrobe,
    joints: dict[str, NDArray[np.float64]],
    head_turn: float,
) -> None:
    top, chin = joints["top"], joints["chin"]
    size = person.head
    grown = 1.06 if person.hair_style in ("short", "bob", "long", "ponytail", "bun") else 1.0
    grown = {"curly": 1.28, "bald": 0.97}.get(person.hair_style, grown)
    if person.hat != "none":
        grown = 1.1
    height = top + np.array([0.0, 0.02 * (size - 1) + 0.035 * (grown - 1), 0.0])
    oval = np.sqrt(np.maximum(1 - ((_T - 0.46) / 0.56) ** 2, 0.02)).astype(np.float32)
    jaw = oval * (1 - 0.16 * np.clip((_T - 0.55) / 0.45, 0, 1)).astype(np.float32)
    crown = np.where(_T < 0.6, grown, 1.0).astype(np.float32)
    wide, deep = jaw * crown * np.float32(0.05 * size), oval * crown * np.float32(0.06 * size)
    figure.shell(height, chin - np.array([0, 0.008, 0]), wide, deep, wardrobe.head, turn=head_turn)
    hair, covered = plain(person.hair), person.hat in ("hood", "headscarf")
    back = np.array([0.0, 0.0, -0.045 * size])
    middle = 0.55 * top + 0.45 * chin
    if person.hair_style == "long" and not covered:
        tail = chin + back * 0.9 + np.array([0, -person.hair_length * 0.75, -0.02])
        figure.shell(top + back * 0.5 - np.array([0, 0.02, 0]), tail,
                     _curve((0.035, 0.056, 0.058, 0.06, 0.035), (0, 0.2, 0.5, 0.8, 1)),
                     _curve((0.03, 0.045, 0.04, 0.03, 0.02), (0, 0.2, 0.5, 0.8, 1)), hair)  # fmt: skip
    elif person.hair_style == "bob" and not covered:
        figure.shell(top + back * 0.4 - np.array([0, 0.015, 0]), chin + back * 0.55 + np.array([0, -0.012, 0]),
                     _curve((0.035, 0.06, 0.064, 0.058), (0, 0.3, 0.7, 1)),
                     _curve((0.03, 0.045, 0.045, 0.035), (0, 0.3, 0.7, 1)), hair)  # fmt: skip
    elif person.hair_style == "ponytail" and not covered:
        knot = middle + back * 1.35 + np.array([0, 0.02, 0])
        figure.limb(knot, knot + np.array([0, -person.hair_length * 0.7, -0.02]), 0.02, 0.013, hair, middle=0.024)
    elif person.hair_style == "bun" and not covered:
        knot = top + back * 0.9 + np.array([0, -0.012, 0])
        figure.limb(knot, knot + np.array([0, 0.004, 0]), 0.027, 0.027, hair)
    forward = np.array([np.sin(head_turn), 0.0, np.cos(head_turn)])
    brim = height * 0.68 + chin * 0.32
    if person.hat == "cap":
        figure.limb(brim + forward * 0.045, brim + forward * 0.105 - np.array([0, 0.008, 0]), 0.03, 0.024,
                    plain(blend(person.hat_colour, (0, 0, 0), 0.25)))  # fmt: skip
    elif person.hat == "brim":
        around = np.full(PROFILE_STEPS, 0.095, np.float32)
        figure.shell(brim + np.array([0, 0.008, 0]), brim - np.array([0, 0.008, 0]), around, around,
                     plain(blend(person.hat_colour, (0, 0, 0), 0.15)))  # fmt: skip


def _bag(figure: _Figure, person: Identity, joints: dict[str, NDArray[np.float64]]) -> None:
    if person.bag == "none":
        return
    size, side = person.bag_size, person.bag_side
    texture = np.full((32, 32), 0, np.uint32)
    main, second = plain(person.bag_colour)[0, 0], plain(person.bag_second)[0, 0]
    texture[:] = main
    neck, crotch = joints["neck"], joints["crotch"]
    name = "l" if side > 0 else "r"
    box = (0.55, 0.92, 1.0, 1.0, 0.97, 0.8)
    at = (0.0, 0.08, 0.2, 0.85, 0.95, 1.0)
    if person.bag == "backpack":
        texture[18:28, 4:28] = second
        back = np.array([0.0, 0.0, -0.062 * (0.6 + 0.4 * person.width) - 0.05 * size])
        top, bottom = neck * 0.92 + crotch * 0.08, neck * 0.28 + crotch * 0.72
        stretch = (size - 1) * 0.12 * (bottom - top)
        figure.shell(top + back, bottom + back + stretch, _curve(tuple(0.088 * size * v for v in box), at),
                     _curve(tuple(0.055 * size * v for v in box), at), texture, turn=np.pi)  # fmt: skip
        return
    if person.bag in ("crossbody", "shoulder"):
        texture[4:12, :] = second
        out = np.array([side * (0.088 * person.width * person.hips + 0.028), 0.0, -0.012])
        drop = 0.12 if person.bag == "crossbody" else 0.02
        top = crotch + out + np.array([0, 0.1 - drop * 0.6, 0])
        length = (0.1 if person.bag == "crossbody" else 0.15) * size
        figure.shell(top, top - np.array([0, length, 0]), _curve(tuple(0.026 * size * v for v in box), at),
                     _curve(tuple(0.07 * size * v for v in box), at), texture)  # fmt: skip
        return
    hand = joints[f"hand_{name}"]
    if person.bag == "tote":
        texture[8:20, 8:24] = second
        top = hand - np.array([0, 0.05, 0])
        figure.limb(hand, top, 0.006, 0.006, plain(person.bag_colour))
        figure.shell(top, top - np.array([0, 0.14 * size, 0]), _curve((0.022, 0.03, 0.034), (0, 0.3, 1)),
                     _curve((0.055 * size, 0.066 * size), (0, 1)), texture)  # fmt: skip
        return
    texture[:, ::6] = second
    floor = np.array([side * 0.19, 0.02, -0.13])
    top = floor + np.array([0, 0.27 * size, 0])
    figure.shell(
        top, floor, _curve(tuple(0.065 * v for v in box), at), _curve(tuple(0.05 * v for v in box), at), texture
    )
    figure.limb(top, 0.5 * (top + hand), 0.006, 0.006, plain((60, 60, 62)))
    figure.limb(0.5 * (top + hand), hand, 0.006, 0.008, plain((60, 60, 62)))
