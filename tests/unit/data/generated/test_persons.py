"""Persons, views and the rasteriser."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from personvit.data.generated.body import View, build
from personvit.data.generated.config import Stream, random_stream
from personvit.data.generated.crop import Shot, encode_crop, render_crop
from personvit.data.generated.garments import make_wardrobe, plain
from personvit.data.generated.identity import Identity, make_identity
from personvit.data.generated.pose import make_pose
from personvit.data.generated.render import PROFILE_STEPS, Canvas, Light, Tube

RED = plain((255, 0, 0))
GREEN = plain((0, 255, 0))


def flat(start: tuple[float, float, float], end: tuple[float, float, float], half: float, texture=RED) -> Tube:
    return Tube(start, end, np.full(PROFILE_STEPS, half, np.float32), 0.0, texture)


def drawn(person: Identity, yaw: float) -> Canvas:
    """A person standing before an empty background, 300 x 200 pixels."""
    pose = make_pose(np.random.default_rng(1), person)
    canvas = Canvas(300, 200)
    for tube in build(person, make_wardrobe(0, person), pose, View(yaw=yaw, pitch=0.0, distance=6.0)):
        canvas.draw(tube.moved(270.0, 100.0, 150.0))
    return canvas


def count(canvas: Canvas, colour: tuple[int, int, int]) -> int:
    return int((canvas.colour == plain(colour)[0, 0]).sum())


def test_a_tube_covers_what_it_should() -> None:
    canvas = Canvas(40, 30)
    canvas.draw(flat((15.0, 10.0, 0.0), (15.0, 30.0, 0.0), 5.0))
    covered = (canvas.depth > -1e8).reshape(40, 30)
    assert covered[10:30, 11:20].all()
    assert covered.sum() == 20 * 9


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_nearer_tube_hides_the_other_in_any_order(order: tuple[int, int]) -> None:
    tubes = [
        flat((15.0, 0.0, 1.0), (15.0, 40.0, 1.0), 5.0, RED),
        flat((0.0, 20.0, 2.0), (30.0, 20.0, 2.0), 4.0, GREEN),
    ]
    canvas = Canvas(40, 30)
    for index in order:
        canvas.draw(tubes[index])
    colours = canvas.colour.reshape(40, 30)
    assert colours[20, 15] == GREEN[0, 0]
    assert colours[5, 15] == RED[0, 0]


def test_tubes_outside_the_picture_are_harmless() -> None:
    canvas = Canvas(40, 30)
    canvas.draw(flat((-90.0, -90.0, 0.0), (-50.0, -60.0, 0.0), 5.0))
    canvas.draw(flat((10.0, 10.0, 0.0), (10.0, 10.0, 5.0), 3.0))
    assert (canvas.depth > -1e8).sum() < 10


def test_the_side_towards_the_light_is_brighter() -> None:
    canvas = Canvas(40, 30)
    canvas.draw(
        Tube((15.0, 5.0, 0.0), (15.0, 35.0, 0.0), np.full(PROFILE_STEPS, 10, np.float32), 1.0, plain((200, 200, 200)))
    )
    image = np.zeros((40, 30, 3), np.uint8)
    none = np.zeros((40, 30), np.float32)
    canvas.shade(image, Light((0.8, 0.0, 0.6), 0.3, 0.7), (none, none))
    assert image[20, 21, 0] > image[20, 9, 0] + 40


def test_front_and_back_show_different_things() -> None:
    person = dataclasses.replace(
        make_identity(0, 3), upper="tshirt", pattern="plain", upper_colour=(10, 20, 200), logo="print", logo_shape=0,
        logo_colour=(250, 240, 1), open_front=0.0, bag="backpack", bag_colour=(3, 200, 30), bag_size=1.0, scarf=False,
        hair_style="short", hem=0.9,
    )  # fmt: skip
    front, back = drawn(person, 0.0), drawn(person, np.pi)
    assert count(front, (250, 240, 1)) > 200
    assert count(back, (250, 240, 1)) == 0
    assert count(back, (3, 200, 30)) > 1000
    assert count(front, (3, 200, 30)) < 0.25 * count(back, (3, 200, 30))
    assert count(back, person.hair) > 1.3 * count(front, person.hair)


def test_a_person_is_narrower_from_the_side() -> None:
    person = dataclasses.replace(make_identity(0, 5), bag="none", lower="trousers", upper="tshirt", hem=0.9)

    def chest_width(yaw: float) -> int:
        rows = (drawn(person, yaw).depth > -1e8).reshape(300, 200)[62:80]
        return int(rows.sum(axis=1).mean())

    assert chest_width(np.pi / 2) < 0.8 * chest_width(0.0)


def test_identities_are_the_same_every_time_and_differ_from_each_other() -> None:
    persons = [make_identity(4, pid) for pid in range(200)]
    assert persons[17] == make_identity(4, 17)
    assert persons[17] != dataclasses.replace(make_identity(5, 17))
    looks = {tuple(person.attributes().values()) for person in persons}
    assert len(looks) == len(persons)


def test_families_share_colours_but_not_looks() -> None:
    shared = 0
    for first in range(0, 400, 4):
        a, b = make_identity(0, first), make_identity(0, first + 1)
        shared += a.upper_colour == b.upper_colour and a.lower_colour == b.lower_colour
        assert a.attributes() != b.attributes()
    assert 20 < shared < 60


@pytest.mark.parametrize("pid", range(0, 60, 7))
def test_every_person_can_be_drawn_from_all_around(pid: int) -> None:
    person = make_identity(1, pid)
    for yaw in (0.0, 1.5, 3.0, 4.5):
        covered = (drawn(person, yaw).depth > -1e8).mean()
        assert 0.06 < covered < 0.5


def test_a_shot_depends_on_its_number_only() -> None:
    shot = Shot(pid=11, camera=1002, serial=77)
    first = encode_crop(0, shot)
    encode_crop(0, Shot(pid=12, camera=1003, serial=78, occluded=True))
    assert encode_crop(0, shot) == first
    assert encode_crop(0, dataclasses.replace(shot, serial=79)) != first


def test_an_occluder_changes_the_picture() -> None:
    shot = Shot(pid=11, camera=1, serial=5)
    clear = np.asarray(render_crop(0, shot)).astype(int)
    hidden = np.asarray(render_crop(0, dataclasses.replace(shot, occluded=True))).astype(int)
    assert clear.shape == hidden.shape
    assert (np.abs(clear - hidden).max(axis=2) > 30).mean() > 0.04


def test_streams_are_independent() -> None:
    values = {random_stream(0, stream, part).integers(0, 2**62) for stream in Stream for part in range(5)}
    assert len(values) == 5 * len(Stream)
    assert random_stream(0, Stream.CROP, 3).random() == random_stream(0, Stream.CROP, 3).random()
