"""A small rasteriser: textured, tapered tubes with elliptical sections, a depth buffer, and one shading pass.

Screen frame: x to the right and y down in pixels, z towards the viewer in the same unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personvit.data.generated.garments import Texture

Floats = NDArray[np.float32]
Point = tuple[float, float, float]

PROFILE_STEPS = 64
FAR = np.float32(-1e9)


@dataclass(frozen=True, slots=True)
class Tube:
    """A part of a body: a bone, its half width along it, and a texture wrapped around it."""

    start: Point
    end: Point
    profile: Floats
    """Half width at PROFILE_STEPS points from start to end, [PROFILE_STEPS]."""
    flatness: float
    """Half depth over half width."""
    texture: Texture
    rows: tuple[float, float] = (0.0, 1.0)
    """Rows of the texture at start and end, as fractions."""
    turn: float = 0.0
    """Angle from the viewer to the texture's middle column, radians, positive to the right."""

    def moved(self, scale: float, x: float, y: float) -> Tube:
        """The tube scaled, then shifted."""
        (ax, ay, az), (bx, by, bz) = self.start, self.end
        return Tube(
            (ax * scale + x, ay * scale + y, az * scale),
            (bx * scale + x, by * scale + y, bz * scale),
            self.profile * np.float32(scale),
            self.flatness,
            self.texture,
            self.rows,
            self.turn,
        )


@dataclass(frozen=True, slots=True)
class Light:
    """One directional light and an ambient term."""

    direction: Point
    """Unit vector towards the light, in the screen frame."""
    ambient: float
    diffuse: float


class Canvas:
    """Depth, colour and normals of what has been drawn so far, flat arrays of height x width."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.depth: Floats = np.full(height * width, FAR, np.float32)
        self.colour = np.zeros(height * width, np.uint32)
        self.normal_x: Floats = np.zeros(height * width, np.float32)
        self.normal_y: Floats = np.zeros(height * width, np.float32)

    def draw(self, tube: Tube) -> None:
        """Draw a tube where nothing nearer has been drawn."""
        ax, ay, az = tube.start
        bx, by, bz = tube.end
        dx, dy = bx - ax, by - ay
        length = (dx * dx + dy * dy) ** 0.5
        if length < 0.5:
            # Seen end on: keep a stub, so that hands and feet that point at the camera do not vanish.
            dx, dy, length = 0.0, 0.5, 0.5
        reach = float(tube.profile.max()) + 1
        x0, x1 = max(0, int(min(ax, bx) - reach)), min(self.width, int(max(ax, bx) + reach) + 1)
        y0, y1 = max(0, int(min(ay, by) - reach)), min(self.height, int(max(ay, by) + reach) + 1)
        if x0 >= x1 or y0 >= y1:
            return
        ux, uy = dx / length, dy / length
        xs = np.arange(x0, x1, dtype=np.float32) - np.float32(ax)
        ys = np.arange(y0, y1, dtype=np.float32) - np.float32(ay)
        # Steps along the bone, counted from 1; 0 and PROFILE_STEPS + 1 stand for "beyond it", where the width is -1.
        per_step = PROFILE_STEPS / length
        steps = np.add.outer(ys * np.float32(uy * per_step) + np.float32(1), xs * np.float32(ux * per_step))  # [h, w]
        across = np.add.outer(ys * np.float32(-ux), xs * np.float32(uy))
        table = np.full(PROFILE_STEPS + 2, -1, np.float32)
        table[1:-1] = tube.profile
        bounded = np.minimum(np.maximum(steps, 0), PROFILE_STEPS + 1).astype(np.int32)
        half = table.take(bounded)
        rows, columns = np.nonzero(np.abs(across) < half)
        if rows.size == 0:
            return
        local = rows * (x1 - x0) + columns
        where = local + (rows * (self.width - x1 + x0) + (y0 * self.width + x0))
        t = (steps.take(local) - 1) * np.float32(1 / PROFILE_STEPS)
        half = half.take(local)
        side = across.take(local) / half
        bulge = np.sqrt(1 - side * side)
        depth = np.float32(az) + np.float32(bz - az) * t + half * bulge * np.float32(tube.flatness)
        nearer = np.flatnonzero(depth > self.depth[where])
        if nearer.size != where.size:
            where, t, side, depth = where[nearer], t[nearer], side[nearer], depth[nearer]
        self.depth[where] = depth
        self.normal_x[where] = side * np.float32(uy)
        self.normal_y[where] = side * np.float32(-ux)
        self.colour[where] = _fetch(tube, t, side)

    def shade(self, image: NDArray[np.uint8], light: Light, folds: tuple[Floats, Floats]) -> NDArray[np.intp]:
        """Light what has been drawn and copy it into an image.

        Args:
            image: [height, width, 3], changed in place.
            light: the light.
            folds: slopes of the cloth in x and y, [height, width] each, added to the normals.

        Returns:
            Flat indices of the pixels that were covered.
        """
        where = np.flatnonzero(self.depth > FAR)
        nx = self.normal_x[where]
        ny = self.normal_y[where]
        nz = np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0))
        lx, ly, lz = light.direction
        facing = (nx + folds[0].ravel()[where]) * np.float32(lx)
        facing += (ny + folds[1].ravel()[where]) * np.float32(ly)
        facing += nz * np.float32(lz)
        np.maximum(facing, 0, out=facing)
        facing *= self._lit(where, light)
        bright = np.float32(light.ambient) * (0.72 + 0.28 * nz) + np.float32(light.diffuse) * facing
        colour = self.colour[where].view(np.uint8).reshape(-1, 4)[:, :3]
        image.reshape(-1, 3)[where] = np.minimum(colour * bright[:, None], 255).astype(np.uint8)
        return where

    def _lit(self, where: NDArray[np.intp], light: Light) -> Floats:
        """0.45 where something nearer stands between a pixel and the light, else 1."""
        reach = self.height * 0.022
        dx, dy = round(light.direction[0] * reach * 1.5), round(light.direction[1] * reach * 1.5)
        other = np.minimum(np.maximum(where + (dy * self.width + dx), 0), self.depth.size - 1)
        blocked = self.depth[other] > self.depth[where] + np.float32(reach)
        return np.where(blocked, np.float32(0.45), np.float32(1.0))


def _fetch(tube: Tube, t: Floats, side: Floats) -> NDArray[np.uint32]:
    height, width = tube.texture.shape
    if height * width == 1:
        return np.broadcast_to(tube.texture.ravel(), t.shape)
    first, last = tube.rows
    row = (t * np.float32((last - first) * height) + np.float32(first * height)).astype(np.int32)
    np.minimum(row, height - 1, out=row)
    # Half a turn of slack keeps the value positive before truncation.
    column = np.arcsin(side) * np.float32(width / (2 * np.pi)) + np.float32(width * (1.5 - tube.turn / (2 * np.pi) + 1))
    texels: NDArray[np.uint32] = tube.texture.ravel()[row * width + (column.astype(np.int32) & (width - 1))]
    return texels
