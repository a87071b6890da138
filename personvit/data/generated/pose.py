"""Where the joints of a person are: gait phase, standing, phone, pockets, crossed arms."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personvit.data.generated.identity import Identity

STANCES = {"walk": 60, "stand": 14, "ear": 5, "screen": 8, "pockets": 7, "crossed": 3, "strap": 3}

HIP, KNEE, ANKLE, SHOULDER, NECK, CHIN, TOP = 0.52, 0.285, 0.045, 0.781, 0.836, 0.868, 1.0
UPPER_ARM, FOREARM, HAND, FOOT = 0.165, 0.145, 0.055, 0.105


@dataclass(frozen=True, slots=True)
class Pose:
    """Joints in the frame of the body: x to the person's left, y up, z forward; floor at 0, height about 1.

    `joints` maps a name to a point; the limbs' names end in `_l` and `_r`.
    """

    joints: dict[str, NDArray[np.float64]]
    head_turn: float
    """Yaw of the head relative to the body, radians."""


def make_pose(rng: np.random.Generator, person: Identity) -> Pose:
    """Draw a pose for a person; the feet are not placed on the floor (the crop's box does that)."""
    draw = rng.random(16).tolist()
    stance = _stance(draw[0])
    walking = stance == "walk" or (stance in ("ear", "screen", "pockets", "strap") and draw[1] < 0.5)
    phase = 2 * np.pi * draw[2]
    stride = 0.26 + 0.28 * draw[3] if walking else 0.02 + 0.08 * draw[3]
    if person.lower == "skirt" or person.hem > 1.1:
        stride *= 0.7
    lean = (0.02 + 0.06 * draw[4]) if walking else 0.04 * (draw[4] - 0.5)
    hip = HIP * person.legs
    joints: dict[str, NDArray[np.float64]] = {}

    def point(x: float, y: float) -> NDArray[np.float64]:
        # The trunk leans about the hips.
        return np.array([x, y, (y - hip) * lean])

    lift = hip - HIP
    joints["crotch"] = np.array([0.0, hip - 0.035, 0.0])
    joints["neck"] = point(0.0, NECK + lift * 0.3)
    joints["chin"] = point(0.0, CHIN + lift * 0.3) + np.array([0.0, 0.0, 0.012])
    joints["top"] = point(0.0, TOP + lift * 0.3) + np.array([0.0, 0.0, 0.008 + 0.02 * (draw[5] - 0.5)])
    if stance == "screen":
        joints["top"][2] += 0.03
        joints["top"][1] -= 0.012
    for side, name in ((1, "l"), (-1, "r")):
        swing = stride * np.sin(phase) * side + 0.03
        lifted = max(0.0, np.cos(phase) * side) if walking else 0.0
        bend = (0.12 + 0.95 * lifted * stride / 0.4) if walking else 0.02 + 0.1 * draw[6]
        _leg(joints, name, side, hip, person, swing, bend, walking)
        swing_arm = -0.75 * stride * np.sin(phase) * side - 0.02
        raised, elbow, spread = _arm_angles(stance, side, person.bag_side, draw)
        if raised is None:
            raised, elbow, spread = swing_arm, 0.14 + 0.55 * stride * (0.5 + draw[7]), 0.1 + 0.06 * draw[8]
        _arm(joints, name, side, person, point, raised, elbow, spread, inward=0.5 if stance == "crossed" else 0.0)
    return Pose(joints=joints, head_turn=0.9 * (draw[9] - 0.5) * (1.2 if draw[10] < 0.3 else 0.5))


def _stance(value: float) -> str:
    value *= sum(STANCES.values())
    for name, weight in STANCES.items():
        value -= weight
        if value < 0:
            return name
    return "walk"


def _leg(
    joints: dict[str, NDArray[np.float64]],
    name: str,
    side: int,
    hip: float,
    person: Identity,
    swing: float,
    bend: float,
    walking: bool,
) -> None:
    thigh, shin = (HIP - KNEE) * person.legs, (KNEE - ANKLE) * person.legs
    spread = 0.03 if walking else 0.05
    start = np.array([side * 0.046 * person.width * person.hips, hip, 0.0])
    knee = start + thigh * np.array([side * spread, -np.cos(swing), np.sin(swing)])
    angle = swing - bend
    ankle = knee + shin * np.array([0.0, -np.cos(angle), np.sin(angle)])
    pitch = np.clip(-angle * 0.9 - 0.05, -0.35, 1.1)
    toe = ankle + FOOT * np.array([side * 0.18, -0.22 - 0.9 * np.sin(max(pitch, 0.0)), np.cos(pitch)])
    joints[f"hip_{name}"], joints[f"knee_{name}"], joints[f"ankle_{name}"], joints[f"toe_{name}"] = (
        start,
        knee,
        ankle,
        toe,
    )


def _arm_angles(
    stance: str, side: int, bag_side: int, draw: list[float]
) -> tuple[float, float, float] | tuple[None, float, float]:
    """Upper arm's angle forward, elbow's bend, angle outward; None where the arm just swings."""
    free = side == -bag_side
    if stance == "ear" and free:
        return 0.55 + 0.3 * draw[11], 2.35, 0.25
    if stance == "screen" and (free or draw[12] < 0.3):
        return 0.35 + 0.3 * draw[11], 1.5, 0.06
    if stance == "pockets":
        return -0.22, 0.5, 0.3
    if stance == "crossed":
        return 0.45, 1.35, 0.2
    if stance == "strap" and not free:
        return 0.25, 2.2, 0.2
    return None, 0.0, 0.0


def _arm(
    joints: dict[str, NDArray[np.float64]],
    name: str,
    side: int,
    person: Identity,
    point: object,
    raised: float,
    elbow: float,
    spread: float,
    inward: float,
) -> None:
    assert callable(point)
    start = point(side * 0.092 * person.width * person.shoulders, SHOULDER + (person.legs - 1) * HIP * 0.3)

    def direction(angle: float, out: float) -> NDArray[np.float64]:
        return np.array([side * np.sin(out), -np.cos(out) * np.cos(angle), np.cos(out) * np.sin(angle)])

    bend = start + UPPER_ARM * direction(raised, spread)
    wrist = bend + FOREARM * direction(raised + elbow, spread * 0.4 - inward - 0.12 * (elbow > 1))
    hand = wrist + HAND * direction(raised + elbow + 0.1, -inward)
    joints[f"shoulder_{name}"], joints[f"elbow_{name}"] = start, bend
    joints[f"wrist_{name}"], joints[f"hand_{name}"] = wrist, hand
