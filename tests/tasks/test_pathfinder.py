"""Pathfinder: the drawing against a literal reading of its definition and against official images, the official
distribution, reproducibility, the official files, and the task.

The statistics of the official generator were measured on 5,000 of its images of 32 × 32 and on 200 of 128 × 128. The
literal reading below follows its code and shares nothing with data/lra/pathfinder_images.py but Pillow, which draws the
lines and reduces the images.
"""

import dataclasses
import functools
import hashlib
import inspect
import itertools
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from PIL import Image, ImageDraw

from data.lra import pathfinder as lra_pathfinder
from data.lra import pathfinder_images
from data.lra.pathfinder import MAGIC, ImageExamples, Pathfinder, PathfinderData, best_threshold, distances
from data.lra.pathfinder_images import (
    DISTRACTOR_TRIES,
    FIRST_TRIES,
    NEXT_TRIES,
    Contours,
    Geometry,
    NoRoom,
    Occupancy,
    Pairs,
    distract,
    draw,
    draws_of_distractor,
    extend,
    finished,
    free_cells,
    occupied,
    rendered,
    starts,
    stencils_of,
)
from data.store.cache import cached, in_processes
from stu.errors import OptionError

ROOT = Path(__file__).parents[2]
SAMPLES = Path(os.environ.get("LRA_SAMPLES_DIR", Path(__file__).parents[1] / "golden" / "lra"))


def options_of(task):
    node = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/task/{task}.yaml"), resolve=False)
    return {**node["data"], "margins": tuple(node["data"]["margins"])}


def geometry_of(task, **changes):
    options = {name: value for name, value in options_of(task).items() if name in Geometry.__dataclass_fields__}
    return Geometry(**{**options, **changes})


SMALL, LARGE, HUGE = map(geometry_of, ("lra_pathfinder", "lra_pathx", "lra_pathx256"))
KINDS = {"small": SMALL, "large": LARGE}
drawn_once = functools.cache(draw)
FILES = {"small": "pathfinder32_200", "large": "pathfinder128_20"}
MARGINS = [("small", 1), ("large", 2), ("large", 3)]


def make_data(folder, **options):
    """Images of 32 × 32 with the official parameters, unless `options` say otherwise."""
    return PathfinderData(**{**vars(SMALL), "dir": str(folder), **options})


def official(kind):
    """The arrays of an official sample and of the file with what is known about it."""
    paths = [SAMPLES / f"{FILES[kind]}{suffix}.npz" for suffix in ("", "_extra")]
    return {name: array for path in paths for name, array in np.load(path).items()}


# A literal reading of the definition: one image, one paddle at a time, real numbers, whole arrays.


def go(position, angle, distance):
    return tuple(
        math.ceil(x + distance * step) for x, step in zip(position, (math.sin(angle), math.cos(angle)), strict=True)
    )


def dilated_literally(image, radius):
    """The greatest value in the disc about every cell."""
    reach = math.floor(radius)
    padded = np.pad(image, reach)
    found = np.zeros_like(image)
    for y, x in itertools.product(range(-reach, reach + 1), repeat=2):
        if y * y + x * x <= radius * radius:
            found = np.maximum(found, padded[reach + y :, reach + x :][: image.shape[0], : image.shape[1]])
    return found


class Literal:
    """What the definition says about one margin."""

    def __init__(self, geometry, margin):
        self.geometry, self.margin = geometry, margin
        self.length, self.side = geometry.paddle_length, geometry.side
        self.reach = self.length + math.ceil(geometry.thickness) + margin
        self.known = {}
        radius = self.length + margin
        around = [
            math.radians(360 / (2 * math.pi * radius) * j)
            for j in range(1000)
            if j * 360 / (2 * math.pi * radius) < 360
        ]
        self.tips = sorted({(math.floor(radius * math.sin(a)), math.floor(radius * math.cos(a))) for a in around})

    def stamps(self, angle):
        """Ink and mask, (2 reach + 1,) squared, 0…255."""
        if angle not in self.known:
            image = Image.new("L", (4 * self.reach + 1,) * 2)
            centre = (2 * self.reach,) * 2
            end = go(centre, angle, 2 * self.length)
            ImageDraw.Draw(image).line([centre, end[::-1]], fill=255, width=round(2 * self.geometry.thickness))
            line = np.asarray(image)
            self.known[angle] = tuple(
                np.asarray(Image.fromarray(x).resize((2 * self.reach + 1,) * 2, Image.Resampling.LANCZOS))
                for x in (line, dilated_literally(line, 2 * self.margin))
            )
        return self.known[angle]

    def ink(self, tip, angle):
        return self.placed(self.stamps(angle)[0], tip)

    def mask(self, tip, angle):
        return self.placed(self.stamps(angle)[1], tip)

    def placed(self, stamp, centre):
        """The stamp on an empty image, cut at its edge."""
        canvas = np.zeros((self.side + 2 * self.reach,) * 2, np.uint8)
        y, x = centre
        canvas[y : y + 2 * self.reach + 1, x : x + 2 * self.reach + 1] = stamp
        return canvas[self.reach : -self.reach, self.reach : -self.reach]

    def blank(self):
        border, free = self.geometry.border, np.zeros((self.side - 2 * self.geometry.border,) * 2, np.uint8)
        return np.pad(free, border, constant_values=255)

    def joint_before(self, tail, angle):
        return go(go(tail, angle, self.length), angle + math.pi, self.length + self.margin)

    def candidates(self, joint, angle, occupancy):
        """The next joint, and the tips about it that lie in the image, with orientations and weights."""
        following = go(joint, angle, self.length + 2 * self.margin)
        near = dilated_literally(occupancy, self.margin) / 255
        found = []
        for y, x in self.tips:
            tip, orientation = (following[0] + y, following[1] + x), math.atan2(y, x)
            if min(tip) >= 0 and max(tip) < self.side:
                turn = abs(math.remainder(orientation - angle, 2 * math.pi))
                weight = max(0, math.cos(min(self.geometry.continuity * turn, math.pi / 2))) ** 2
                found.append((tip, orientation, weight * (1 - near[tip])))
        return following, found

    def extended(self, joint, angle, occupancy, u):
        """The next joint, tip and orientation, or None."""
        following, found = self.candidates(joint, angle, occupancy)
        total = sum(weight for _, _, weight in found)
        if total < 1e-4:
            return None
        for number in u:
            sums = itertools.accumulate(weight for _, _, weight in found)
            tip, orientation, _ = next(f for f, s in zip(found, sums, strict=True) if s > number * total)
            if self.fits(tip, orientation, occupancy):
                return following, tip, orientation
        return None

    def fits(self, tip, orientation, occupancy):
        return (occupancy / 255 + self.mask(tip, orientation + math.pi) / 255).max() < 1.8 - 1e-9


def angle_of(stencils, direction):
    """The angle of a direction's number."""
    return math.radians(direction - 180) if direction < 360 else math.atan2(*stencils.moves[direction - 360].tolist())


# The tables


def test_the_cells_about_a_joint():
    """The counts are those of the official generator, some points of whose circle coincide."""
    for margins, geometry, count in ((1, SMALL, 18), (2, LARGE, 41), (3, LARGE, 49)):
        assert stencils_of(geometry, margins).moves.tolist() == [list(t) for t in Literal(geometry, margins).tips]
        assert len(stencils_of(geometry, margins).moves) == count


def test_directions_in_which_a_contour_can_start():
    def footprints(geometry, margin):
        found = stencils_of(geometry, margin).footprints
        return {
            degree: sorted(map(tuple, cells.tolist())) for degree, cells in zip(range(-180, 180), found, strict=True)
        }

    small = {degree: cells for degree, cells in footprints(SMALL, 1).items() if cells}
    assert small == {
        **{degree: [(0, -1), (0, 0), (1, 1)] for degree in range(-150, -138)},
        **{degree: [(0, 0), (1, 1)] for degree in range(-138, -120)},
    }
    assert [degree for degree, cells in footprints(LARGE, 2).items() if not cells] == list(range(-59, -53))
    assert all(footprints(LARGE, 3).values())


def test_free_cells():
    random = np.random.default_rng(0)
    for _ in range(20):
        taken = random.random((9, 11)) < 0.2
        footprint = random.integers(-4, 5, (random.integers(1, 6), 2))
        found = [
            y * 11 + x
            for y, x in np.ndindex(9, 11)
            if not any(0 <= y + a < 9 and 0 <= x + b < 11 and taken[y + a, x + b] for a, b in footprint.tolist())
        ]
        assert free_cells(taken, footprint).tolist() == found
    assert free_cells(taken, footprint[:0]).tolist() == []


# Drawing contours


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "margin"), [*MARGINS, ("huge", 3)])
def test_extensions_are_those_of_the_definition(kind, margin):
    """The same uniform numbers give the same paddles, the same failures and the same occupancy, step by step."""
    geometry = {**KINDS, "huge": HUGE}[kind]
    stencils, literal = stencils_of(geometry, margin), Literal(geometry, margin)
    random = np.random.default_rng(1)
    first = next(starts(stencils, random))
    count = 24 if kind == "small" else 5
    occupancy = Occupancy(*(np.tile(cells, (count, 1)) for cells in stencils.blank))
    expected = [literal.blank() for _ in range(count)]
    base = np.arange(count) * stencils.cells
    ours, theirs = [], []
    for snake in range(2):
        tails, directions = first.tails[:count, snake], first.directions[:count, snake]
        joints = first.joints[:count, snake]
        ours.append(Contours(joints, base + stencils.places(tails), directions))
        theirs.append(
            [(tuple(t), math.radians(d - 180)) for t, d in zip(tails.tolist(), directions.tolist(), strict=True)]
        )
        assert [literal.joint_before(*start) for start in theirs[snake]] == list(map(tuple, joints.tolist()))
        # the joint, the tip, the orientation, and the orientation of the stamp
        theirs[snake] = [(tuple(j), tip, a, a) for j, (tip, a) in zip(joints.tolist(), theirs[snake], strict=True)]
    living = np.ones(count, np.bool_)
    steps = 0
    for step in range(2 * geometry.contour_length - 2):
        snake = step % 2
        u = random.random((count, NEXT_TRIES))
        alive, ours[snake] = extend(stencils, occupancy, ours[snake], u)
        for i in np.flatnonzero(living).tolist():
            joint, tip, angle, drawn = theirs[snake][i]
            found = literal.extended(joint, angle, expected[i], u[i])
            assert alive[i] == (found is not None)
            if found is None:
                continue
            steps += 1
            expected[i] = np.maximum(expected[i], literal.mask(tip, drawn))
            theirs[snake][i] = (*found, found[2] + math.pi)
            assert tuple(ours[snake].joints[i]) == found[0]
            assert ours[snake].places[i] - base[i] == stencils.places(np.array(found[1]))
            assert angle_of(stencils, ours[snake].directions[i]) == found[2]
            np.testing.assert_array_equal(stencils.images(occupancy.taken[i])[0], expected[i])
            np.testing.assert_array_equal(stencils.images(occupancy.near[i])[0], dilated_literally(expected[i], margin))
        living &= alive
    assert steps > 3 * count, "hardly anything was drawn"


def test_first_paddles():
    """The first contour starts in the middle, upwards and to the left; the other one in any direction at a distance."""
    random = np.random.default_rng(2)
    first = next(starts(stencils_of(SMALL, 1), random))
    assert np.unique(first.tails[:, 0]).tolist() == [14, 15, 16]
    assert np.unique(first.directions[:, 0]).tolist() == list(range(30, 60))
    away = first.tails[:, 1] - first.tails[:, 0]
    assert (abs(np.hypot(*away.T) - SMALL.seed_distance) < 0.8).all()
    assert np.hypot(*away.mean(0)) < 4 * SMALL.seed_distance / np.sqrt(len(away))
    assert len(first.tries) / first.tries[-1] == pytest.approx(0.084, abs=0.02)
    assert (np.diff(first.tries) > 0).all()
    large = next(starts(stencils_of(LARGE, 2), random))
    assert len(large.tries) / large.tries[-1] > 0.97
    assert 40 <= large.tails[:, 0].min() < large.tails[:, 0].max() < 88


def test_a_first_direction_without_a_place_ends_the_try():
    """With one usable direction in twelve, three tries that went on would start one pair in four."""
    random = np.random.default_rng(3)
    found = [next(starts(stencils_of(SMALL, 1), random)) for _ in range(8)]
    share = sum(len(s.tries) for s in found) / sum(s.tries[-1] for s in found)
    assert abs(share - 30 / 360) < 4 * np.sqrt(30 / 360 / 16_000)


@pytest.fixture(scope="session")
def targets():
    """Pairs of targets, and how many paddles were tried and refused for one pair, by kind and margin."""
    found = {}
    for (kind, margin), count in zip(MARGINS, (500, 32, 16), strict=True):
        source, alive = Pairs(stencils_of(KINDS[kind], margin), np.random.default_rng(5)), []
        step = source.step
        source.step = lambda step=step, alive=alive: alive.append(step()) or alive[-1]
        pairs = list(itertools.islice(source, count))
        found[kind, margin] = pairs, np.size(alive) / count, np.sum(~np.array(alive)) / count
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "margin"), MARGINS)
def test_what_targets_take_from_distractors(kind, margin, targets):
    """All their paddles with the margin, but for the last one of the first contour."""
    stencils, literal = stencils_of(KINDS[kind], margin), Literal(KINDS[kind], margin)
    pairs = targets[kind, margin][0][:3]
    places, directions = (np.stack([getattr(pair, name) for pair in pairs], 1) for name in ("places", "directions"))
    found = occupied(stencils, places + np.arange(3) * stencils.cells, directions)
    for i in range(3):
        expected = literal.blank()
        tips, numbers = stencils.positions(places[:, i]).tolist(), directions[:, i].tolist()
        for index, (tip, number) in enumerate(zip(tips, numbers, strict=True)):
            if index != 26:
                angle = angle_of(stencils, number) + (math.pi if index > 1 else 0)
                expected = np.maximum(expected, literal.mask(tip, angle))
        np.testing.assert_array_equal(stencils.images(found.taken)[i], expected)
        np.testing.assert_array_equal(stencils.images(found.near)[i], dilated_literally(expected, margin))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "margin"), MARGINS)
def test_a_distractor_is_added_whole_or_not_at_all(kind, margin, targets):
    """It begins on a free cell, as the definition has it, and takes its cells."""
    geometry = KINDS[kind]
    stencils, literal = stencils_of(geometry, margin), Literal(geometry, margin)
    pairs = targets[kind, margin][0][:300]
    places, directions = (np.stack([getattr(pair, name) for pair in pairs], 1) for name in ("places", "directions"))
    occupancy = occupied(stencils, places + np.arange(len(pairs)) * stencils.cells, directions)
    before = stencils.images(occupancy.taken).copy()
    images = np.arange(3, len(pairs))
    draws = 2 * FIRST_TRIES + NEXT_TRIES * (geometry.distractor_length - 1)
    u = np.random.default_rng(6).random((len(images), draws))
    added, places, directions = distract(stencils, occupancy, images, u)
    assert places.shape == directions.shape == (geometry.distractor_length, len(added))
    after = stencils.images(occupancy.taken)
    assert np.flatnonzero((before != after).any((1, 2))).tolist() == added.tolist()
    assert 3 <= added.min() < added.max()
    assert len(added) < len(images)
    for image, place, direction in zip(
        added[: 12 if kind == "small" else 2].tolist(), places.T, directions.T, strict=False
    ):
        tips, expected = stencils.positions(place).tolist(), before[image]
        free = possible_starts(literal, expected, direction[0])
        assert tuple(tips[0]) in [free[int(where * len(free))] for where in u[image - 3, 1:6:2]]
        assert direction[0] in (u[image - 3, 0:6:2] * 360).astype(int)
        for index, (tip, number) in enumerate(zip(tips, direction.tolist(), strict=True)):
            angle = angle_of(stencils, number) + (math.pi if index else 0)
            expected = np.maximum(expected, literal.mask(tip, angle))
        np.testing.assert_array_equal(after[image], expected)
        np.testing.assert_array_equal(stencils.images(occupancy.near[image])[0], dilated_literally(expected, margin))


def possible_starts(literal, occupancy, direction):
    """The cells where the occupancy is 0.3 at most at every cell of the footprint that is in the image."""
    mask, bound = literal.stamps(math.radians(direction - 180))[1], literal.length + literal.margin
    offsets = [(y - literal.reach + 1, x - literal.reach + 1) for y, x in np.argwhere(mask == 255).tolist()]
    offsets = [(y, x) for y, x in offsets if max(abs(y), abs(x)) <= bound]
    free, inside = occupancy / 255 <= 0.3, range(literal.side)
    return [
        (row, column)
        for row, column in itertools.product(inside, inside)
        if all(free[row + y, column + x] for y, x in offsets if row + y in inside and column + x in inside)
    ]


@pytest.mark.parametrize(("free", "tried"), [(10, False), (11, True)])
def test_no_distractor_is_started_in_a_crowd(free, tried, monkeypatch):
    """Less than 1 % of 1,024 cells free: not even tried."""
    calls = []
    monkeypatch.setattr(pathfinder_images, "first_paddle", lambda *_: calls.append(1))
    stencils = stencils_of(SMALL, 1)
    occupancy = Occupancy(*np.full((2, 1, stencils.cells), 255, np.uint8))
    stencils.images(occupancy.taken)[0, 5, 5 : 5 + free] = 76
    stencils.images(occupancy.taken)[0, 9, 5 : 5 + free] = 77
    added, *_ = distract(stencils, occupancy, np.arange(1), np.zeros((1, 15)))
    assert len(added) == 0
    assert bool(calls) == tried


def test_labels_say_whether_both_markers_are_on_one_contour(monkeypatch):
    batches = []

    def spy(stencils, pairs, ends, u):
        batches.append((stencils, pairs, finished(stencils, pairs, ends, u)))
        return batches[-1][-1]

    monkeypatch.setattr(pathfinder_images, "finished", spy)
    drawn = draw(SMALL, 0, 0, 150)
    found = []
    for stencils, pairs, (_, markers, _) in batches:
        for pair, (first, second) in zip(pairs, markers.tolist(), strict=True):
            cells = stencils.positions(pair.places).tolist()
            started = {contour for contour in range(2) if cells[contour] == first}
            ended = {contour for contour in range(2) if cells[26 + contour] == second}
            found.append(len(started & ended) if len(ended) == 1 else None)  # both may end on one cell
            assert len(started) == 1
            assert ended
    assert found.count(None) < 5
    found = [label if same is None else same for same, label in zip(found, drawn.labels.tolist(), strict=True)]
    assert found == drawn.labels.tolist()
    assert [a.tolist() for _, _, (_, markers, _) in batches for a in markers] == drawn.markers.tolist()


# The official images


def decoded(literal, coverage, tail, end):
    """The paddles of an official contour, found by search: (joint, tip, orientation), the first with its tail."""

    def search(joint, angle, drawn, path):
        if len(path) == literal.geometry.contour_length:
            return path if path[-1][1] == end and np.array_equal(drawn, coverage) else None
        following, found = literal.candidates(joint, angle, nothing)
        for tip, orientation, weight in found:
            ink = literal.ink(tip, orientation + math.pi)
            if weight > 1e-9 and (ink <= coverage).all():
                whole = search(following, orientation, np.maximum(drawn, ink), [*path, (following, tip, orientation)])
                if whole:
                    return whole
        return None

    nothing = np.zeros_like(coverage)
    for degree in range(-180, 180):
        angle = math.radians(degree)
        if (literal.ink(tail, angle) <= coverage).all():
            joint = literal.joint_before(tail, angle)
            found = search(joint, angle, literal.ink(tail, angle), [(joint, tail, angle)])
            if found:
                return found
    return None


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), [("small", 24), ("large", 5)])
def test_official_contours_are_reproduced(kind, count):
    """Each official target is 14 of our paddles, to the pixel, and the occupancy lets both targets of an image grow."""
    sample, geometry = official(kind), KINDS[kind]
    for i in range(count):
        margin = int(sample["margin"][i])
        literal, stencils = Literal(geometry, margin), stencils_of(geometry, margin)
        ends = zip(
            sample["target_coverage"][i], sample["start_yx"][i].tolist(), sample["end_yx"][i].tolist(), strict=True
        )
        both = [decoded(literal, coverage, tuple(tail), tuple(end)) for coverage, tail, end in ends]
        assert all(both), f"image {i} is not made of our paddles"
        occupancy = Occupancy(*(cells[None].copy() for cells in stencils.blank))
        contours = [first_contour(stencils, *path[0]) for path in both]
        for turn in list(zip(*both, strict=True))[1:]:
            for snake, (_, tip, _) in enumerate(turn):
                contours[snake] = forced(stencils, literal, occupancy, contours[snake], tip)


def first_contour(stencils, joint, tail, angle):
    """The contour of a first paddle."""
    return Contours(np.array([joint]), stencils.places(np.array([tail])), np.array([round(math.degrees(angle)) + 180]))


def forced(stencils, literal, occupancy, contours, tip):
    """The contour extended to this tip, whatever `u` that takes."""
    before = stencils.images(occupancy.taken)[0]
    angle = angle_of(stencils, contours.directions[0])
    _, found = literal.candidates(tuple(contours.joints[0].tolist()), angle, before)
    weights = {t: weight for t, _, weight in found}
    below = sum(weight for t, weight in weights.items() if t < tip)
    u = (below + weights[tip] / 2) / sum(weights.values())
    alive, contours = extend(stencils, occupancy, contours, np.full((1, NEXT_TRIES), u))
    assert alive.all(), "an official paddle is refused"
    assert stencils.positions(contours.places).tolist() == [list(tip)]
    return contours


@pytest.mark.parametrize("kind", KINDS)
def test_official_images_are_rendered_exactly(kind):
    """From targets and markers alone: to the pixel where there are no distractors, and else nowhere too bright."""
    sample, geometry = official(kind), KINDS[kind]
    images, greatest = sample["images"], sample["max_before_scaling"]
    targets = sample["target_coverage"].max(1)
    # the brightest pixel of a distractor, if that is what the image was scaled to
    others = np.zeros_like(images)
    level = np.rint(greatest * 255 / geometry.distractor_contrast).astype(np.uint8)
    for other, image, value, top in zip(others, images, level, greatest, strict=True):
        if top > 1:
            other[np.unravel_index(image.argmax(), image.shape)] = value
    found = rendered(geometry, targets, others, sample["marker_yx"])
    alone = sample["n_distractors"] == 0
    np.testing.assert_array_equal(found[alone], images[alone])
    assert alone.any() or kind == "large"
    assert (found <= images).all()
    assert (found == images).mean() > 0.9


def test_the_target_that_is_not_marked_at_its_start_has_a_contrast_of_its_own():
    """In the first of ten images this is the first contour, in the second one the second one, and so on."""
    pairs = list(itertools.islice(Pairs(stencils_of(SMALL, 1), np.random.default_rng(0)), 10))
    ends = np.stack((1 - np.arange(10) % 2, np.arange(10) % 2), 1)
    none = np.zeros((10, 0, DISTRACTOR_TRIES, draws_of_distractor(SMALL)))
    plain, *facts = finished(stencils_of(SMALL, 1), pairs, ends, none)
    equal = dataclasses.replace(SMALL, second_contrast=SMALL.target_contrast)
    dim = dataclasses.replace(SMALL, second_contrast=SMALL.target_contrast / 3)
    np.testing.assert_array_equal(finished(stencils_of(equal, 1), pairs, ends, none)[0], plain)
    pixels, *facts_of_dim = finished(stencils_of(dim, 1), pairs, ends, none)
    for one, other in zip(facts, facts_of_dim, strict=True):
        np.testing.assert_array_equal(one, other)
    for image, before, pair, (first, second) in zip(pixels, plain, pairs, ends, strict=True):
        rows, columns = stencils_of(SMALL, 1).positions(pair.places).T
        bright = rows[first::2][3:-3], columns[first::2][3:-3]
        faint = rows[second::2][3:-3], columns[second::2][3:-3]
        assert first != second
        assert image[bright].mean() > 2 * image[faint].mean()
        assert image.sum() < before.sum()


# The official distribution


@pytest.fixture(scope="session")
def images():
    """Our images of each kind."""
    return {"small": drawn_once(SMALL, 0, 0, 1000), "large": drawn_once(LARGE, 0, 0, 32)}


def agree(ours, mean, std, size):
    """Per-image values (n, ...) have this mean, which was measured on `size` images with this standard deviation."""
    ours = np.asarray(ours, np.float64)
    std = ours.std(0) if std is None else std
    np.testing.assert_array_less(abs(ours.mean(0) - mean), 4 * std * np.sqrt(1 / len(ours) + 1 / size) + 1e-12)


HISTOGRAM = [0, 1, 2, 4, *range(8, 16, 8), *range(16, 256, 16), 255, 256]


def shares(pixels):
    """(n, 21) shares of the levels of grey."""
    return np.stack([np.histogram(image, HISTOGRAM)[0] for image in pixels]) / pixels[0].size


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_intensities(kind, images):
    pixels = images[kind].pixels
    assert (pixels.min((1, 2)) == 0).all()
    assert (pixels.max((1, 2)) == 255).all()
    mean, std, above, levels, size = {
        "small": (20.17, 1.98, [0.3412, 0.1580, 0.1256, 0.0849, 0.0190, 0.0058], SMALL_LEVELS, 5000),
        "large": (7.898, 0.326, [0.1370, 0.0617, 0.0406, 0.0302, 0.0156, 0.0027], LARGE_LEVELS, 200),
    }[kind]
    agree(pixels.mean((1, 2)), mean, std, size)
    assert pixels.std() == pytest.approx({"small": 51.07, "large": 35.64}[kind], rel=0.01)
    assert pixels.mean((1, 2)).std() == pytest.approx(std, rel=0.1 if kind == "small" else 0.4)
    # the references have four digits
    for level, reference in zip((0, 10, 64, 128, 192, 230), above, strict=True):
        share = (pixels > level).mean((1, 2))
        assert abs(share.mean() - reference) < 4 * share.std() * np.sqrt(1 / len(pixels) + 1 / size) + 5e-5
    found = shares(pixels)
    error = 4 * found.std(0) * np.sqrt(1 / len(pixels) + 1 / {"small": 600, "large": 60}[kind]) + 5e-5
    np.testing.assert_array_less(abs(found.mean(0) - levels), error)


SMALL_LEVELS = [
    *(0.6595, 0.0546, 0.0825, 0.0402, 0.0061, 0.0124, 0.0115, 0.0081, 0.0076, 0.0116, 0.0092),
    *(0.0120, 0.0184, 0.0206, 0.0164, 0.0105, 0.0064, 0.0057, 0.0026, 0.0020, 0.0022),
]
LARGE_LEVELS = [
    *(0.8620, 0.0253, 0.0402, 0.0097, 0.0031, 0.0056, 0.0062, 0.0069, 0.0046, 0.0022, 0.0029),
    *(0.0010, 0.0005, 0.0032, 0.0057, 0.0051, 0.0041, 0.0029, 0.0064, 0.0018, 0.0007),
]


@pytest.mark.slow
def test_full_paddles_of_large_images(images):
    """229: 0.9 in float32, cut off; a paddle's middle is full, and nothing lies between it and the markers' rims."""
    assert (images["large"].pixels == 229).sum() > 20 * (images["large"].pixels == 230).sum()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_where_things_lie(kind, images):
    pixels = images[kind].pixels
    if kind == "small":
        agree(pixels[:, :16, :16].mean((1, 2)), 26.3, None, 5000)
        agree(pixels[:, 16:, 16:].mean((1, 2)), 16.0, None, 5000)
        assert np.unravel_index(pixels.mean(0).argmax(), (32, 32)) == (15, 15)
    else:
        bands = pixels.reshape(len(pixels), 8, -1).mean(2)
        agree(bands, [7.9, 8.0, 8.5, 8.9, 9.2, 8.8, 6.8, 5.2], None, 200)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_markers(kind, images):
    drawn = images[kind]
    count = np.bincount(drawn.labels, minlength=2)
    assert abs(count[1] / count.sum() - 0.5) < 4 * 0.5 / np.sqrt(count.sum())
    apart = distances(drawn.markers)
    for label, mean, size in {"small": [(0, 12.52, 2500), (1, 13.28, 2500)], "large": [(0, 74.8, 100), (1, 74.8, 100)]}[
        kind
    ]:
        agree(apart[drawn.labels == label], mean, None, size)
    for image, both in zip(drawn.pixels, drawn.markers.tolist(), strict=True):
        for y, x in both:
            assert image[y, x] > 200, "a disc is as bright as the scaling lets it"
    radius = int(KINDS[kind].marker_radius)
    assert (drawn.markers >= 0).all()
    assert radius < drawn.markers.mean() < KINDS[kind].side - radius


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_distractors(kind, images):
    found = images[kind].distractors
    mean, size = {"small": (1.15, 5000), "large": (7.69, 200)}[kind]
    agree(found, mean, None, size)
    reference = {"small": [0.261, 0.413, 0.246, 0.072], "large": [*[0] * 6, 0.04, 0.23, 0.73]}[kind]
    for number, share in enumerate(reference):
        error = 4 * np.sqrt(max(share, 0.01) * (1 - share) * (1 / len(found) + 1 / size))
        assert abs((found == number).mean() - share) < error
    assert found.max() <= KINDS[kind].distractors == {"small": 5, "large": 8}[kind]


@pytest.mark.slow
def test_a_larger_budget_of_distractors():
    """1,500 official images with ten of them."""
    drawn = draw(geometry_of("lra_pathfinder", distractor_paddles=40), 0, 0, 300)
    agree(drawn.distractors, 2.22, None, 1500)
    agree(drawn.pixels.mean((1, 2)), 22.36, None, 1500)
    agree((drawn.pixels > 0).mean((1, 2)), 0.378, None, 1500)
    assert geometry_of("lra_pathx", distractor_paddles=70).distractors == 17


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "margin", "attempts", "size"), [("small", 1, 326, 5000), ("large", 2, 70, 130), ("large", 3, 609, 130)]
)
def test_attempts(kind, margin, attempts, size, targets):
    """How many pairs are tried for one that is completed: geometric, with nearly equal mean and standard deviation."""
    pairs, _, _ = targets[kind, margin]
    assert abs(pairs[-1].tries / len(pairs) - attempts) < 4 * attempts * np.sqrt(1 / len(pairs) + 1 / size)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "share"), [("small", 0.081), ("large", 0.096)])
def test_refused_paddles(kind, share, targets):
    tried, refused = zip(*[found[1:] for (k, _), found in targets.items() if k == kind], strict=True)
    assert sum(refused) / sum(tried) == pytest.approx(share, abs=0.003)


@pytest.mark.parametrize(
    ("kind", "std", "mean", "most", "table", "lengths", "size"),
    [
        ("small", 39.2, 32.1, 83.7, [191, 160, 169, 125, 91, 113, 85, 60, 6], (12.1, 15.0), 600),
        ("large", 22.5, 18.6, 49.4, [316, 242, 233, 146, 64], (72, 75), 60),
    ],
)
def test_shapes_of_targets(kind, std, mean, most, table, lengths, size, targets):
    turns, apart = [], []
    for margin in KINDS[kind].margins:
        stencils, pairs = stencils_of(KINDS[kind], margin), targets[kind, margin][0]
        pairs = pairs[: min(len(found[0]) for (k, _), found in targets.items() if k == kind)]
        angles = np.degrees([angle_of(stencils, direction) for direction in range(len(stencils.steps))])
        bent = np.diff(angles[[pair.directions for pair in pairs]].reshape(len(pairs), -1, 2), axis=1)
        turns.extend(abs((bent + 180) % 360 - 180).reshape(len(pairs), -1))
        ends = stencils.positions(np.stack([pair.places for pair in pairs]))
        apart.extend(np.linalg.norm(ends[:, -2:] - ends[:, :2], axis=2))
    turns = np.array(turns)  # (n, 2 (N - 1))
    agree(turns.mean(1), mean, None, size)
    agree(np.square(turns).mean(1), std**2, None, size)
    assert abs(turns.max() - most) < 1.5
    edges = np.arange(0, 10 * len(table) + 1, 10)
    binned = np.stack([np.histogram(these, edges)[0] for these in turns]) / turns.shape[1]
    error = 4 * binned.std(0) * np.sqrt(1 / len(binned) + 1 / size) + 5e-4  # the references have three digits
    np.testing.assert_array_less(abs(binned.mean(0) - np.array(table) / 1000), error)
    agree(apart, lengths, None, size)


STATISTICS = {
    "mean": lambda pixels: pixels.mean((1, 2)),
    "above 0": lambda pixels: (pixels > 0).mean((1, 2)),
    "above 10": lambda pixels: (pixels > 10).mean((1, 2)),
    "above 128": lambda pixels: (pixels > 128).mean((1, 2)),
    "histogram": shares,
    "rows": lambda pixels: pixels.reshape(len(pixels), 8, -1).mean(2),
    "columns": lambda pixels: pixels.swapaxes(1, 2).reshape(len(pixels), 8, -1).mean(2),
}


@pytest.mark.parametrize("name", STATISTICS)
@pytest.mark.parametrize("kind", KINDS)
def test_official_images_have_the_same_statistics(kind, name, images):
    ours, theirs = STATISTICS[name](images[kind].pixels), STATISTICS[name](official(kind)["images"])
    error = 4.5 * np.sqrt(ours.var(0) / len(ours) + theirs.var(0) / len(theirs)) + 1e-12
    np.testing.assert_array_less(abs(ours.mean(0) - theirs.mean(0)), error)


@pytest.mark.parametrize("kind", KINDS)
def test_official_images_have_the_same_facts(kind, images, targets):
    sample, drawn = official(kind), images[kind]
    count = len(sample["labels"])
    agree(drawn.labels, sample["labels"].mean(), 0.5, count)
    agree(drawn.distractors, sample["n_distractors"].mean(), None, count)
    for label in range(2):
        theirs = distances(sample["marker_yx"][sample["labels"] == label])
        agree(distances(drawn.markers)[drawn.labels == label], theirs.mean(), None, len(theirs))
    for margin in KINDS[kind].margins:
        theirs = sample["pair_attempts"][sample["margin"] == margin]
        pairs = targets[kind, margin][0]
        ours = pairs[-1].tries / len(pairs)
        assert abs(ours - theirs.mean()) < 4 * ours * np.sqrt(1 / len(pairs) + 1 / len(theirs))


# Seeds and numbers


def digest(images):
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in images)).hexdigest()[:16]


def test_the_same_seed_gives_the_same_images_on_every_machine(images):
    """If a digest changes, so do everybody's data: raise VERSION."""
    found = [digest(images["small"]), digest(images["large"]), digest(draw(HUGE, 0, 0, 2))]
    assert found == ["758310b6368a381e", "098c737955ac172c", "1c4100df08c42e6b"]


def test_fewer_images_are_the_first_ones(images):
    for size in (1, 70):
        some = draw(SMALL, 0, 0, size)
        for ours, whole in zip(some, images["small"], strict=True):
            np.testing.assert_array_equal(ours, whole[:size])


def test_chunks_and_seeds_differ():
    found = {draw(SMALL, seed, chunk, 1).pixels.tobytes() for seed, chunk in ((0, 0), (0, 1), (1, 0))}
    assert len(found) == 3


def test_the_number_of_processes_changes_nothing():
    jobs = [(SMALL, 3, chunk, 2) for chunk in (4, 0, 2)]
    for ours, alone in zip(in_processes(draw, jobs, 2), itertools.starmap(draw, jobs), strict=True):
        assert digest(ours) == digest(alone)


ORPHANS = """
import os
import time
from multiprocessing import Process
from data.store.cache import follow_parent

def work():
    follow_parent()
    os.write(1, b"started\\n")  # in one piece, which print does not promise
    time.sleep(60)

for _ in range(2):
    Process(target=work).start()
time.sleep(60)
"""


def test_workers_end_with_a_killed_parent():
    command = [sys.executable, "-c", ORPHANS]
    start = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["started\n"] * 2
        process.send_signal(signal.SIGKILL)
        assert process.stdout.read() == "", "the pipe closes when the last process that holds it has ended"
    assert time.monotonic() - start < 45


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seed_distance": 8}, "no first paddle fits in"),
        ({"contour_length": 60}, "none of 3,000 pairs of contours could be completed"),
    ],
)
def test_geometries_without_room_are_refused(changes, problem, monkeypatch, tmp_path):
    monkeypatch.setattr(pathfinder_images, "PATIENCE", 3000)
    with pytest.raises(NoRoom, match=problem):
        draw(geometry_of("lra_pathfinder", **changes), 0, 0, 1)
    options = {"train": 1, "val": 1, "test": 1, **changes}
    if "seed_distance" not in changes:
        with pytest.raises(OptionError, match=f"side=32: leaves no room for such contours: {problem}"):
            make_data(tmp_path, **options).prepare()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"contour_length": 3}, {"contour_length": 6}, {"distractor_paddles": 0}, {"contour_length": 9, "margins": (1, 2)}],
)
def test_other_difficulties(changes):
    geometry = geometry_of("lra_pathfinder", **changes)
    drawn = draw(geometry, 0, 0, 10)
    assert drawn.pixels.max() == 255
    assert drawn.distractors.max() <= geometry.distractors
    assert {6: 10, 9: 6, 3: 20, 14: 5}[geometry.contour_length] >= geometry.distractors
    assert (drawn.distractors > 0).any() == (geometry.distractors > 0)


# The cache


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    data = make_data(tmp_path_factory.mktemp("pathfinder"), train=1003, val=40, test=60, workers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lra_pathfinder, "draw", drawn_once)
        data.prepare()
    return data


def test_examples(generated, images):
    train, val, test = make_task(generated).datasets()
    folder = generated.prepare()
    assert sorted(path.name for path in folder.iterdir()) == ["00000.arrow", "00001.arrow", "spec.json"]
    assert [len(train), len(val), len(test)] == [1003, 40, 60]
    first, second = images["small"], drawn_once(SMALL, 0, 1, 103)
    pixels = np.concatenate((first.pixels, second.pixels)).reshape(1103, 1024)
    for split, start in ((train, 0), (val, 1003), (test, 1043)):
        stop = start + len(split)
        np.testing.assert_array_equal(np.stack([x for x, _ in split]), pixels[start:stop])
        labels = np.concatenate((first.labels, second.labels))[start:stop]
        assert [label for _, label in split] == split.labels.tolist() == labels.tolist()
        markers = np.concatenate((first.markers, second.markers))[start:stop]
        np.testing.assert_array_equal(split.markers, markers)
        assert split.lengths is None
        np.testing.assert_array_equal(split[-1][0], split[len(split) - 1][0])
        for index in (len(split), -len(split) - 1):
            with pytest.raises(IndexError):
                split[index]
    stored = Dataset.from_file(str(folder / "00001.arrow"))
    assert stored.column_names == ["pixels", "label", "markers", "distractors"]
    assert stored[5]["pixels"] == pixels[1005].tolist()
    assert stored[5]["markers"] == second.markers[5].ravel().tolist()
    assert stored["distractors"][:] == second.distractors.tolist()


def test_an_example_belongs_to_its_reader(generated):
    val = generated.examples("val")
    before = val[3][0].copy()
    val[3][0][:] = 1
    np.testing.assert_array_equal(val[3][0], before)


def test_workers_get_a_path_not_the_data(generated):
    val = generated.examples("val")
    message = pickle.dumps(val)
    assert len(message) < 1000
    copy = pickle.loads(message)
    assert isinstance(copy, ImageExamples)
    np.testing.assert_array_equal(copy[39][0], val[39][0])
    np.testing.assert_array_equal(copy.labels, val.labels)


def test_an_interrupted_build_is_resumed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(lra_pathfinder, "CHUNK", 4)
    calls = []

    def fake(geometry, seed, chunk, size):
        calls.append(chunk)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(geometry, seed, chunk, size)

    monkeypatch.setattr(lra_pathfinder, "draw", fake)
    data = make_data(tmp_path, train=10, val=2, test=2, workers=1)
    with pytest.raises(KeyboardInterrupt):
        data.prepare()
    [partial] = tmp_path.glob("lra_pathfinder/*/")
    (partial / "00002.partial").write_bytes(b"half")  # of a build that was killed
    left = ["00000.arrow", "00001.arrow", "00002.partial", "spec.json"]
    assert sorted(path.name for path in partial.iterdir()) == left
    folder = data.prepare()
    assert calls == [0, 1, 2, 2, 3]
    assert sorted(path.name for path in folder.iterdir()) == [*(f"{n:05}.arrow" for n in range(4)), "spec.json"]
    assert list(tmp_path.glob("lra_pathfinder/*/")) == [folder]
    alone = np.concatenate([draw(SMALL, 0, chunk, size).labels for chunk, size in enumerate((4, 4, 4, 2))])
    splits = make_task(data).datasets()
    assert np.concatenate([split.labels for split in splits]).tolist() == alone.tolist()
    assert capsys.readouterr().err == ""


def test_only_what_is_resumable_is_kept(tmp_path):
    def fail(folder):
        (folder / str(len(list(folder.iterdir())))).write_text("")
        raise OSError("interrupted")

    for resumable, left in ((True, ["0"]), (True, ["0", "1"]), (False, None)):
        with pytest.raises(OptionError, match="interrupted"):
            cached(tmp_path, "x", {}, fail, resumable=resumable)
        kept = [sorted(path.name for path in folder.iterdir()) for folder in tmp_path.glob("x/*/")]
        assert kept == ([left] if left else [])


# The task


def make_task(data, **options):
    return Pathfinder(
        **{"seq_len": data.side**2, "causal": False, "pool": "mean", "centered": False, "data": data, **options}
    )


def test_a_batch_through_encoder_and_head(generated):
    task = make_task(generated)
    val = task.datasets().val
    batch = task.collate([val[i] for i in range(5)])
    assert batch.inputs.shape == (5, 1024, 1)
    assert batch.inputs.dtype == torch.float32
    assert batch.mask is None
    pixels = torch.from_numpy(np.stack([val[i][0] for i in range(5)]))
    torch.testing.assert_close(batch.inputs[..., 0], pixels / 255)
    assert batch.targets.tolist() == val.labels[:5].tolist()
    assert batch.targets.dtype == torch.int64
    logits = task.head(8)(task.encoder(8)(batch.inputs), batch.mask)
    prediction, target = task.scored(logits, batch)
    assert prediction.shape == (5, 2)
    expected = -logits.log_softmax(1)[torch.arange(5), batch.targets].mean()
    torch.testing.assert_close(task.loss(prediction, target), expected)
    metric = task.metrics()["accuracy"]
    metric.update(torch.eye(2)[[0, 0, 0, 1]], torch.tensor([0, 1, 0, 1]))
    assert metric.compute() == 0.75


def test_centered_grey_values(generated):
    """(x - 0.5) / 0.5, whatever the resolution."""
    val = generated.examples("val")
    for seq_len in (1024, 64):
        plain, centered = (
            make_task(generated, centered=c, seq_len=seq_len).collate([val[0], val[1]]).inputs for c in (False, True)
        )
        torch.testing.assert_close(centered, (plain - 0.5) / 0.5)
        assert plain.min() >= 0


def test_a_coarser_image(generated):
    val = generated.examples("val")
    batch = make_task(generated, seq_len=64).collate([val[0], val[1]])
    means = np.stack([val[i][0] for i in range(2)]).reshape(2, 8, 4, 8, 4).mean((2, 4)) / 255
    np.testing.assert_allclose(batch.inputs[..., 0], means.reshape(2, 64), rtol=1e-5)


def test_baselines(generated):
    train, test = generated.examples("train"), generated.examples("test")
    found = make_task(generated).baselines()
    majority = int(train.labels.mean() > 0.5)
    candidates = {}
    for label, threshold in itertools.product((0, 1), set(distances(train.markers).tolist())):
        guess = np.where(distances(train.markers) > threshold, label, 1 - label)
        candidates[label, threshold] = (guess == train.labels).mean()
    label, threshold = best_threshold(distances(train.markers), train.labels)
    assert candidates[label, threshold] == max(candidates.values())
    guess = np.where(distances(test.markers) > threshold, label, 1 - label)
    assert found == {
        "majority": pytest.approx((test.labels == majority).mean()),
        "marker distance": pytest.approx((guess == test.labels).mean()),
    }
    assert 0.5 < max(candidates.values()) < 0.6, "a slight leak is in the official images, too"


@pytest.mark.parametrize("task", ["lra_pathfinder", "lra_pathx", "lra_pathx256"])
def test_the_configurations_are_complete(task):
    node = OmegaConf.to_container(OmegaConf.load(ROOT / f"conf/task/{task}.yaml"), resolve=False)
    assert set(node) == {"_target_", *inspect.signature(Pathfinder).parameters}
    options = options_of(task)
    assert options.pop("_target_") == "data.lra.pathfinder.PathfinderData"
    assert options.pop("dir") == "${paths.data}"
    assert node["seq_len"] == options["side"] ** 2
    parameters = {name: p for name, p in inspect.signature(PathfinderData).parameters.items() if name != "dir"}
    assert set(options) == set(parameters)
    defaults = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
    geometry = Geometry.__dataclass_fields__.keys() - {"second_contrast"}  # which is not of the official generator
    assert defaults.keys() == parameters.keys() - geometry
    assert options == {**options, **defaults}
    make_task(make_data("unused", **options))
    assert make_data("unused", **options).geometry == geometry_of(task)


def test_options_that_do_not_change_the_images_have_no_fingerprint():
    found = make_task(make_data("unused")).fingerprint()
    assert found == make_task(make_data("elsewhere", workers=3, margins=[1])).fingerprint()


@pytest.mark.parametrize(
    "option",
    [name for name in inspect.signature(PathfinderData).parameters if name not in ("dir", "source", "workers")],
)
def test_every_option_has_a_fingerprint(option):
    data = make_data("unused")
    value = getattr(data, option)
    others = {"margins": (1, 2), "second_contrast": 0.5, "seed_distance": 6}
    other = others[option] if option in others else value + 1
    changed = make_data("unused", **{option: other})
    assert make_task(data).fingerprint() != make_task(changed).fingerprint()


def test_the_version_has_a_fingerprint(monkeypatch):
    before = make_task(make_data("unused")).fingerprint()
    monkeypatch.setattr(lra_pathfinder, "VERSION", 0)
    assert make_task(make_data("unused")).fingerprint() != before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name in ("train", "val", "test", "workers", "border", "seed_distance", "paddle_length")),
        *((name, 0.0) for name in ("marker_radius", "continuity")),
        *((f"{name}_contrast", 0.0) for name in ("target", "distractor", "second")),
        ("seed", -1),
        ("contour_length", 2),
        ("distractor_paddles", -1),
        ("side", 28),
        ("thickness", 0.25),
        ("margins", []),
        ("margins", [0]),
        ("margins", [2, 2]),
    ],
)
def test_bad_data_options_are_named(name, value):
    with pytest.raises(OptionError) as error:
        make_data("unused", **{name: value})
    assert (error.value.name, error.value.value) == (name, value)


@pytest.mark.parametrize("seq_len", [0, -4, 1023, 2048, 100, 4096])
def test_a_length_that_is_no_image_is_named(seq_len):
    with pytest.raises(OptionError, match=rf"seq_len={seq_len}: must be data.side² = 1024, or the square"):
        make_task(make_data("unused"), seq_len=seq_len)


# The official files


def write_official(folder, images, metadata=None):
    """As the official generator leaves them: images (name, label), spread over two folders, and their metadata."""
    random = np.random.default_rng(0)
    for part in range(2):
        (folder / f"imgs/{part}").mkdir(parents=True, exist_ok=True)
        (folder / "metadata").mkdir(exist_ok=True)
        rows = []
        for index, label in list(enumerate(images))[part::2]:
            pixels = random.integers(0, 256, (32, 32), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"imgs/{part}/sample_{index}.png")
            rows.append(f"imgs/{part} sample_{index}.png {index} {label} 1.0 14 4 2 0.5 1 1".split())
        path = folder / f"metadata/{part + 9}.npy"
        if part:
            path.write_text("".join(" ".join(row) + "\n" for row in rows))
        else:
            np.save(path, np.array(rows))


def test_official_files_become_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(lra_pathfinder, "CHUNK", 7)
    write_official(tmp_path, [n % 3 % 2 for n in range(24)])
    (tmp_path / "imgs/1/sample_3.png").write_bytes(b"")
    task = make_task(make_data(tmp_path / "cache", source=str(tmp_path), train=5))
    task.prepare()
    splits = task.datasets()
    assert list(map(len, splits)) == [19, 2, 2]
    found = [(pixels, label) for split in splits for pixels, label in split]
    order = [*range(0, 24, 2), *(n for n in range(1, 24, 2) if n != 3)]  # metadata 9, then 10
    assert [label for _, label in found] == [n % 3 % 2 for n in order]
    for (pixels, _), n in zip(found, order, strict=True):
        with Image.open(tmp_path / f"imgs/{n % 2}/sample_{n}.png") as image:
            np.testing.assert_array_equal(pixels.reshape(32, 32), np.asarray(image))
    assert splits.train.markers is None
    assert task.baselines().keys() == {"majority"}


def test_other_contents_have_another_fingerprint(tmp_path):
    def found(**options):
        return make_task(make_data("unused", source=str(tmp_path), **options)).fingerprint()

    write_official(tmp_path, [0, 1] * 10)
    first = found()
    assert first == found(seed=5, train=7, contour_length=6), "the generator's options do not matter here"
    write_official(tmp_path, [0, 1] * 9 + [1, 1])
    assert first != found()


def array_file(array):
    np.save(file := BytesIO(), array)
    return file.getvalue()


def header_of(shape):
    """The beginning of an array file that claims this shape."""
    header = f"{{'descr': '<U3', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return MAGIC + b"\1\0" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("imgs/0 sample_0.png 0\n", "line 1: 3 columns, must be at least 4"),
        ("imgs/0 sample_0.png 0 1 1.0\n\n", "line 2: 0 columns, must be at least 4"),
        ("imgs/0 sample_0.png 0 1 1.0\nimgs/0 sample_2.png 0 2 1.0\n", "line 2: label '2', must be 0 or 1"),
        ("imgs/0 sample_0.png 0 1\nimgs/0/ ./sample_0.png 0 0\n", "line 2: .*sample_0.png is listed twice, first in 9"),
        ("/etc passwd 0 1 1.0\n", "line 1: /etc/passwd must be the path of an image from /"),
        ("imgs/../.. passwd 0 1 1.0\n", "line 1: imgs/../../passwd must be the path of an image from /"),
        ("imgs/0 a\0b 0 1 1.0\n", "line 1: embedded null byte"),
        (array_file([1, 2]), "cannot be read: an array of 1 dimensions and type int64, must be one of rows of texts"),
        (array_file("imgs/0"), "cannot be read: an array of 0 dimensions and type <U6"),
        (header_of("(10000000000000,)"), "cannot be read: "),
        (header_of("(1"), "cannot be read: "),
        (array_file([["imgs/0", "sample_0.png"]]), "line 1: 2 columns, must be at least 4"),
        ("imgs/0 none.png 0 1 1.0\n", "line 1: .*No such file"),
        (b"\x93NUMPY", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_wrong_metadata_are_named(content, problem, tmp_path):
    write_official(tmp_path, [0, 1] * 10)
    path = tmp_path / "metadata/9.npy"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OptionError, match=rf"source=.*9\.npy: {problem}"):
        make_data(tmp_path / "cache", source=str(tmp_path)).prepare()


def test_strays_are_left_out_and_copies_refused(tmp_path):
    write_official(tmp_path, [0, 1] * 10)
    before = make_task(make_data(tmp_path / "cache", source=str(tmp_path))).fingerprint()
    (tmp_path / "metadata/._9.npy").write_bytes(b"\0\5\x16\7\xff")
    (tmp_path / "metadata/.DS_Store").touch()
    assert make_task(make_data(tmp_path / "cache", source=str(tmp_path))).fingerprint() == before
    shutil.copy(tmp_path / "metadata/10.npy", tmp_path / "metadata/10 (1).npy")
    with pytest.raises(
        OptionError, match=r"10 \(1\)\.npy: line 1: imgs/1/sample_1\.png is listed twice, first in 10\.npy"
    ):
        make_data(tmp_path / "cache", source=str(tmp_path)).prepare()


@pytest.mark.parametrize(
    "content",
    [b"no image", Image.new("L", (1, 1)), Image.new("I;16", (32, 32), 300)],
    ids=["damaged", "other size", "16 bits"],
)
def test_wrong_images_are_named(content, tmp_path):
    write_official(tmp_path, [0, 1] * 10)
    path = tmp_path / "imgs/1/sample_5.png"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content.save(path)
    with pytest.raises(OptionError, match=r"source=.*sample_5\.png: must be an image of 32 × 32 pixels"):
        make_data(tmp_path / "cache", source=str(tmp_path)).prepare()


def test_missing_official_files_are_named(tmp_path):
    with pytest.raises(OptionError, match=f"source={tmp_path}: must hold the official files: metadata"):
        make_data("unused", source=str(tmp_path)).prepare()
    with pytest.raises(OptionError, match=f"source={tmp_path}/x: must be a folder with metadata/.*: .*No such file"):
        make_data("unused", source=f"{tmp_path}/x").prepare()
    write_official(tmp_path, [0, 1] * 4)
    with pytest.raises(OptionError, match=f"source={tmp_path}: must hold at least 10 images"):
        make_data("unused", source=str(tmp_path)).prepare()
