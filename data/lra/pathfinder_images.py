"""Pathfinder: images of two long dashed contours among short ones; do the two discs lie on the same contour?

n images, W contours drawn in parallel, N paddles per contour, S side, D directions, J moves, C cells per stamp

A contour is a chain of paddles, which are short bars. A position is the (row, column) of a cell, a direction θ the step
(sin θ, cos θ). Occupancy has 8 bits, 255 where a cell is taken: a new paddle keeps its margin from the others. The
images of a batch lie in one flat array, each with padding around it; a place is an index into that array.

Sources: Linsley et al., "Learning long-range spatial dependencies with horizontal gated recurrent units" (1805.08315),
whose generator (drewlinsley/pathfinder, December 2019) this one follows in distribution, oddities included; Tay et al.,
"Long Range Arena" (2011.04006), for the parameters.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

CHUNK = 1000  # images that share their random streams
BATCH = 64  # images finished together
SLOTS = 512  # pairs of targets drawn in parallel
PATIENCE = 1_000_000  # pairs tried in a row without completing one

SCALE = 2  # fine cells per cell, along a side
DEGREES = range(-180, 180)  # directions of first paddles
FIRST_TRIES, NEXT_TRIES, DISTRACTOR_TRIES = 3, 3, 5
FREE = 76  # 0.3: the most that a cell under a first paddle may be occupied
ROOM = 0.01  # the fraction of free cells below which no distractor is started
CLASH = 459  # 1.8: the sum of occupancy and the mask of a new paddle stays below this
LEAST_WEIGHT = 1e-4  # of all moves together
FACTS, DISTRACTORS, TARGETS = range(3)  # the random streams of a chunk; TARGETS has one per margin

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]
Reals = NDArray[np.float64]
Flags = NDArray[np.bool_]


class NoRoom(ValueError):
    """No image of this geometry can be drawn."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """What is drawn, lengths in cells; conf/task/lra_pathfinder.yaml explains the fields."""

    side: int
    border: int
    seed_distance: int
    marker_radius: float
    contour_length: int
    distractor_paddles: int
    paddle_length: int
    thickness: float
    margins: Sequence[int]
    continuity: float
    target_contrast: float
    distractor_contrast: float
    second_contrast: float | None = None

    @property
    def distractor_length(self) -> int:
        """Paddles of one distractor."""
        return self.contour_length // 3

    @property
    def distractors(self) -> int:
        """Distractors that are tried, not all of which find room."""
        return self.distractor_paddles // self.distractor_length

    @property
    def longest_swing(self) -> int:
        """An upper bound of the length of a paddle and its margin: the joint before it and its tip are in the image."""
        return 3 * self.side // 2 + 2


class Images(NamedTuple):
    """n images and the facts about them.

    pixels: (n, S, S). labels: (n,), 1 if both markers lie on one contour. markers: (n, 2, 2) positions, of the disc on
    the first cell of a contour and of the disc on the last tip of one. distractors: (n,), how many there are.
    """

    pixels: Bytes
    labels: Bytes
    markers: NDArray[np.int16]
    distractors: Bytes


class Stamps(NamedTuple):
    """The cells that D stamps cover: offsets in places from the centre, and values, both (D, C).

    A stamp with fewer cells repeats its first one.
    """

    offsets: Integers
    values: Bytes


class Contours(NamedTuple):
    """The latest paddles of W contours, each in another image.

    joints: (W, 2) positions before the paddles. places: (W,) centres of their stamps. directions: (W,).
    """

    joints: Integers
    places: Integers
    directions: Integers


class Occupancy(NamedTuple):
    """How much each cell is taken, and the maximum of that within its margin; (W, cells) with the padding."""

    taken: Bytes
    near: Bytes


# Tables, computed before any image is drawn


def disc(radius: float) -> Integers:
    """The offsets (C, 2) of the cells within `radius`."""
    reach = math.floor(radius)
    square = np.indices((2 * reach + 1, 2 * reach + 1)).reshape(2, -1).T - reach
    return square[np.square(square).sum(1) <= radius**2]


def dilated(image: Bytes, offsets: Integers) -> Bytes:
    """The maximum over `offsets` from each cell; 0 outside of the image."""
    reach = int(abs(offsets).max())
    padded = np.pad(image, reach)
    height, width = image.shape
    return np.max([padded[reach + y :, reach + x :][:height, :width] for y, x in offsets.tolist()], axis=0)


def reduced(image: Bytes, side: int) -> Bytes:
    """A square image downsampled by Pillow's 8-bit Lanczos filter, including its ringing."""
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))


@lru_cache(maxsize=1024)
def marker(side: int, radius: float, row: int, column: int) -> Bytes:
    """(S, S) image of a disc."""
    y, x = np.ogrid[: side * SCALE, : side * SCALE]
    inside = np.square(y - row * SCALE) + np.square(x - column * SCALE) <= (radius * SCALE) ** 2
    return reduced(inside * np.uint8(255), side)


def moves_about(radius: int) -> Integers:
    """The offsets (J, 2) of the cells on a circle, found by walking along it in steps of one cell."""
    angles = [step / radius for step in range(math.ceil(2 * math.pi * radius))]
    return np.array(sorted({(math.floor(radius * math.sin(a)), math.floor(radius * math.cos(a))) for a in angles}))


def stepped(positions: Integers, steps: Reals, distance: int) -> Integers:
    """The cells at `distance` from `positions`, (..., 2), both coordinates rounded up."""
    return np.ceil(positions + distance * steps).astype(np.int64)


def free_cells(taken: Flags, footprint: Integers) -> Integers:
    """The cells (n,) of a flat image with no taken cell at the offsets `footprint` (C, 2), if these are inside."""
    if not len(footprint) or (abs(footprint) >= taken.shape).any():  # from no cell are all of them inside
        return np.empty(0, np.int64)
    blocked = np.zeros(taken.shape, np.bool_)
    height, width = taken.shape
    for y, x in footprint.tolist():
        here = blocked[max(0, -y) : height - max(0, y), max(0, -x) : width - max(0, x)]
        here |= taken[max(0, y) : height + min(0, y), max(0, x) : width + min(0, x)]
    return np.flatnonzero(~blocked)


class Stencils:
    """The tables for one margin.

    Directions are numbered: first the `DEGREES` of first paddles, then the J moves from a joint to a tip. The stamp of
    a first paddle is centred where the contour starts and extends in its direction; the stamp of any other paddle is
    centred on its tip and extends back towards the joint.
    """

    def __init__(self, geometry: Geometry, margin: int) -> None:
        self.geometry, self.margin = geometry, margin
        self.swing = geometry.paddle_length + margin  # from a joint to the tip of its paddle
        self.gait = geometry.paddle_length + 2 * margin  # from a joint to the next
        self.reach = self.swing + math.ceil(geometry.thickness)  # from the centre of a stamp to its edge
        self.pad = max(self.reach + margin, 2 * self.swing + 1)
        self.row = geometry.side + 2 * self.pad
        self.cells = self.row**2
        self.moves = moves_about(self.swing)
        firsts = [math.radians(degree) for degree in DEGREES]
        nexts = [math.atan2(y, x) for y, x in self.moves.tolist()]
        self.steps = np.array([(math.sin(a), math.cos(a)) for a in firsts + nexts])  # (D, 2)
        self.back = np.array([(math.sin(a + math.pi), math.cos(a + math.pi)) for a in firsts + nexts])
        self.weights = np.array([[self.weight(a, b) for b in nexts] for a in firsts + nexts])  # (D, J)
        bars = [self.bar(step) for step in (*self.steps[: len(firsts)], *self.back[len(firsts) :])]
        masks = [self.small(dilated(bar, disc(margin * SCALE))) for bar in bars]
        self.ink, self.mask = self.stamps([self.small(bar) for bar in bars]), self.stamps(masks)
        self.core = self.stamps([mask * (mask >= CLASH - 255) for mask in masks])  # the part of a mask that can clash
        self.halo = self.stamps([dilated(np.pad(mask, margin), disc(margin)) for mask in masks])
        self.footprints = [self.footprint(mask) for mask in masks[: len(firsts)]]
        self.blank = self.blank_occupancy()

    def weight(self, angle: float, following: float) -> float:
        """The weight of a turn: the squared cosine of `continuity` times the turn, 0 from a right angle on."""
        turn = abs((following - angle + math.pi) % (2 * math.pi) - math.pi)
        return math.cos(min(self.geometry.continuity * turn, math.pi / 2)) ** 2

    def bar(self, step: Reals) -> Bytes:
        """A paddle on the fine canvas of its stamp."""
        centre, width = self.reach * SCALE, round(self.geometry.thickness * SCALE)
        row, column = np.ceil(centre + self.geometry.paddle_length * SCALE * step).astype(int).tolist()
        image = Image.new("L", (2 * centre + 1, 2 * centre + 1))
        ImageDraw.Draw(image).line([(centre, centre), (column, row)], fill=255, width=width)
        return np.asarray(image)

    def small(self, fine: Bytes) -> Bytes:
        """The stamp made of its fine canvas."""
        return reduced(fine, 2 * self.reach + 1)

    def stamps(self, images: Sequence[Bytes]) -> Stamps:
        """The nonzero cells of square images, all of one size."""
        cells = [np.argwhere(image) for image in images]
        index = np.arange(max(map(len, cells)))
        full = np.stack([these[index * (index < len(these))] for these in cells])  # (D, C, 2)
        values = np.stack([image[tuple(these.T)] for image, these in zip(images, full, strict=True)])
        return Stamps((full - len(images[0]) // 2) @ (self.row, 1), values)

    def footprint(self, mask: Bytes) -> Integers:
        """The offsets (C, 2) of the cells that must be free for a first paddle of this mask; empty if it cannot occur.

        The official generator looks at the cells one down and one to the right of those where the mask is 255, and it
        finds no place at all if, at some corner of the image, none of them is inside: a direction whose footprint
        misses one of the four closed quadrants never occurs. In the 32 × 32 images these are 330 of 360.
        """
        offsets = np.argwhere(mask == 255) - self.reach + 1
        offsets = offsets[(abs(offsets) <= self.swing).all(1)]
        signs = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)])
        quadrants = (offsets[:, None] * signs >= 0).all(2).any(0)  # (4,)
        return offsets if quadrants.all() else offsets[:0]

    def blank_occupancy(self) -> Occupancy:
        """(cells,) each: the border is taken, and everything outside of the image."""
        free = np.zeros((self.geometry.side - 2 * self.geometry.border,) * 2, np.uint8)
        taken = np.pad(free, self.geometry.border + self.pad, constant_values=255)
        return Occupancy(taken.ravel(), dilated(taken, disc(self.margin)).ravel())

    def places(self, positions: Integers) -> Integers:
        """(..., 2) → (...), in the first image of a batch."""
        return (positions + self.pad) @ (self.row, 1)

    def positions(self, places: Integers) -> Integers:
        """(...) → (..., 2)."""
        return np.stack(np.divmod(places, self.row), -1) - self.pad

    def images(self, padded: Bytes) -> Bytes:
        """(n, cells) → (n, S, S), a view without the padding."""
        return padded.reshape(-1, self.row, self.row)[:, self.pad : -self.pad, self.pad : -self.pad]

    def first_joints(self, tails: Integers, directions: Integers) -> tuple[Integers, Flags]:
        """The joints (..., 2) before first paddles on `tails` (..., 2), and whether these paddles are possible."""
        heads = stepped(tails, self.steps[directions], self.geometry.paddle_length)
        joints = stepped(heads, self.back[directions], self.swing)
        return joints, self.inside(heads) & self.inside(joints)

    def inside(self, positions: Integers) -> Flags:
        """(..., 2) → (...)."""
        return np.logical_and.reduce((positions >= 0) & (positions < self.geometry.side), axis=-1)


stencils_of = lru_cache(Stencils)


def drawing_bytes(geometry: Geometry) -> float:
    """About the memory that `draw` takes: tables, the occupancy of all slots, the random numbers and the images."""
    margin = max(geometry.margins)
    swing = geometry.paddle_length + margin
    stamp = 2 * (swing + math.ceil(geometry.thickness) + margin) + 1
    row = geometry.side + 2 * max(stamp, 2 * swing + 1)
    moves = math.ceil(2 * math.pi * swing)
    directions = len(DEGREES) + moves
    tables = directions * (8 * moves + 36 * stamp**2) + 8 * len(DEGREES) * geometry.side**2
    draws = 8 * geometry.distractors * DISTRACTOR_TRIES * draws_of_distractor(geometry)
    slots = SLOTS * (2 * row**2 + 32 * geometry.contour_length)
    return len(geometry.margins) * tables + slots + CHUNK * (draws + geometry.side**2) + 8 * BATCH * row**2


def draws_of_distractor(geometry: Geometry) -> int:
    """Random numbers that a distractor may take."""
    return 2 * FIRST_TRIES + NEXT_TRIES * (geometry.distractor_length - 1)


# Contours


def paste(images: Bytes, places: Integers, directions: Integers, stamps: Stamps) -> None:
    """Draw a stamp into each of some images, taking the maximum of cells and stamp."""
    flat = images.reshape(-1)
    cells = places[:, None] + stamps.offsets[directions]  # (W, C)
    flat[cells] = np.maximum(flat[cells], stamps.values[directions])


def take(stencils: Stencils, occupancy: Occupancy, places: Integers, directions: Integers) -> None:
    """Mark the cells of a paddle and its margin as taken, in each of some images."""
    paste(occupancy.taken, places, directions, stencils.mask)
    # Dilation commutes with maxima, so the dilated image is maintained by dilated stamps. These also reach from outside
    # of the image into it, but no further than the border does.
    paste(occupancy.near, places, directions, stencils.halo)


def extend(stencils: Stencils, occupancy: Occupancy, contours: Contours, u: Reals) -> tuple[Flags, Contours]:
    """Add a paddle to each contour; returns which contours were extended, and all of them (the others are void).

    u: (W, NEXT_TRIES) uniform. The tip lies on a circle around the next joint. Moves to it are drawn with weights that
    favour small turns and free cells, until a paddle does not clash. Then the paddle before it takes its cells: the
    latest paddle of a contour never has.
    """
    taken, near = occupancy.taken.reshape(-1), occupancy.near.reshape(-1)
    joints = stepped(contours.joints, stencils.steps[contours.directions], stencils.gait)
    # Joints further outside are clipped: from the edge of this range, too, no move leads into the image.
    shown = joints.clip(-stencils.swing - 1, stencils.geometry.side + stencils.swing)
    centres = contours.places // stencils.cells * stencils.cells + stencils.places(shown)
    offsets = stencils.moves @ (stencils.row, 1)  # (J,)
    free = (255 - near[centres[:, None] + offsets]) / 255  # (W, J)
    total = (stencils.weights[contours.directions] * free).cumsum(1)
    places, directions = contours.places.copy(), np.full_like(contours.directions, -1)
    waiting = np.flatnonzero(total[:, -1] >= LEAST_WEIGHT)
    for draw in u.T:
        moves = (total[waiting] > (draw * total[:, -1])[waiting, None]).argmax(1)
        tips, turned = centres[waiting] + offsets[moves], len(DEGREES) + moves
        cells = tips[:, None] + stencils.core.offsets[turned]
        clear = (taken[cells] < CLASH - stencils.core.values[turned].astype(np.int16)).all(1)
        places[waiting[clear]], directions[waiting[clear]] = tips[clear], turned[clear]
        waiting = waiting[~clear]
    alive = directions >= 0
    take(stencils, occupancy, contours.places[alive], contours.directions[alive])
    return alive, Contours(joints, places, directions)


# Targets


class Starts(NamedTuple):
    """First paddles of W pairs: tails and joints (W, 2, 2), directions (W, 2), and the number of the try (W,)."""

    tails: Integers
    joints: Integers
    directions: Integers
    tries: Integers


def starts(stencils: Stencils, random: np.random.Generator) -> Iterator[Starts]:
    """The first paddles of pairs that can be started, some at a time.

    The first contour starts inside a frame twice as wide as the distance of the seeds, the second at that distance from
    it, whatever is there.
    """
    side, distance = stencils.geometry.side, stencils.geometry.seed_distance
    taken = np.ones((side, side), np.bool_)
    taken[2 * distance : -2 * distance, 2 * distance : -2 * distance] = False
    free = [free_cells(taken, footprint) for footprint in stencils.footprints]
    room = np.array([len(cells) for cells in free])
    if not room.any():
        raise NoRoom("no first paddle fits in")
    table = np.stack([np.resize(cells if len(cells) else -1, room.max()) for cells in free])
    rows = np.arange(4 * SLOTS)
    for tries in itertools.count(1, len(rows)):
        u = random.random((4, len(rows), FIRST_TRIES))
        directions, others, bearings = (u[:3] * len(DEGREES)).astype(np.int64)
        cells = table[directions, (u[3] * room[directions]).astype(np.int64)]
        tails = np.stack(np.divmod(cells, side), -1)
        joints, possible = stencils.first_joints(tails, directions)
        possible &= np.logical_and.accumulate(room[directions] > 0, 1)  # if no cell is free, there is no further try
        one = rows, possible.argmax(1)
        other_tails = np.rint(tails[one][:, None] + distance * stencils.steps[bearings]).astype(np.int64)
        other_joints, other_possible = stencils.first_joints(other_tails, others)
        other = rows, other_possible.argmax(1)
        started = possible.any(1) & other_possible.any(1)
        pairs = (tails[one], other_tails[other]), (joints[one], other_joints[other]), (directions[one], others[other])
        fields = *(np.stack(pair, 1) for pair in pairs), rows + tries
        yield Starts(*(field[started] for field in fields))


class Pair(NamedTuple):
    """The targets of an image: (2 N,) paddles, alternating between the two, as places and directions.

    Places are those of the first image of a batch. tries: how many pairs had been tried when this one was started.
    """

    places: Integers
    directions: Integers
    tries: int


class Pairs:
    """An endless stream of pairs of targets; a pair that cannot be completed is replaced, both contours, by a new one.

    All slots draw one paddle per step. Every completed pair took the same number of steps, so that taking pairs in the
    order of completion favours none.
    """

    def __init__(self, stencils: Stencils, random: np.random.Generator) -> None:
        self.stencils, self.random, self.starts = stencils, random, starts(stencils, random)
        self.paddles = 2 * stencils.geometry.contour_length
        self.waiting = next(self.starts)
        self.occupancy = Occupancy(*np.empty((2, SLOTS, stencils.cells), np.uint8))
        self.places, self.directions = np.empty((2, SLOTS, self.paddles), np.int64)
        self.joints, self.tries = np.empty((SLOTS, 2, 2), np.int64), np.empty(SLOTS, np.int64)
        self.drawn = np.empty(SLOTS, np.int64)
        self.start(np.arange(SLOTS))

    def start(self, slots: Integers) -> None:
        """Start a new pair in each of `slots`."""
        n = len(slots)
        while len(self.waiting.tries) < n:
            self.waiting = Starts(*map(np.concatenate, zip(self.waiting, next(self.starts), strict=True)))
        tails, self.joints[slots], self.directions[slots, :2], self.tries[slots] = (x[:n] for x in self.waiting)
        self.waiting = Starts(*(x[n:] for x in self.waiting))
        self.places[slots, :2] = slots[:, None] * self.stencils.cells + self.stencils.places(tails)
        self.occupancy.taken[slots], self.occupancy.near[slots] = self.stencils.blank
        self.drawn[slots] = 2

    def step(self) -> Flags:
        """Draw one paddle per slot; returns where that was possible."""
        slots = np.arange(SLOTS)
        turn, before, now = (slots, self.drawn % 2), (slots, self.drawn - 2), (slots, self.drawn)
        contours = Contours(self.joints[turn], self.places[before], self.directions[before])
        u = self.random.random((SLOTS, NEXT_TRIES))
        alive, contours = extend(self.stencils, self.occupancy, contours, u)
        self.joints[turn], self.places[now], self.directions[now] = contours
        self.drawn += 1
        return alive

    def __iter__(self) -> Iterator[Pair]:
        """Raises `NoRoom` when no pair has been completed for `PATIENCE` tries."""
        last = 0
        while True:
            alive = self.step()
            complete = np.flatnonzero(alive & (self.drawn == self.paddles))
            for slot in complete.tolist():
                last = int(self.tries[slot])
                yield Pair(self.places[slot] % self.stencils.cells, self.directions[slot].copy(), last)
            if self.tries.max() > last + PATIENCE:
                raise NoRoom(f"none of {PATIENCE:,} pairs of contours could be completed")
            self.start(np.flatnonzero(~alive | (self.drawn == self.paddles)))


# Distractors


def first_paddle(stencils: Stencils, taken: Flags, u: Reals) -> tuple[Integers, Integers, int] | None:
    """The tail (2,), joint (2,) and direction of a distractor in an image, or None; u: (FIRST_TRIES, 2) uniform."""
    for which, where in u.tolist():
        direction = int(which * len(DEGREES))
        cells = free_cells(taken, stencils.footprints[direction])
        if not len(cells):
            return None
        tail = np.array(divmod(int(cells[int(where * len(cells))]), stencils.geometry.side))
        joint, possible = stencils.first_joints(tail, np.array(direction))
        if possible:
            return tail, joint, direction
    return None


def distract(
    stencils: Stencils, occupancy: Occupancy, images: Integers, u: Reals
) -> tuple[Integers, Integers, Integers]:
    """Try to add a distractor to each of `images`; returns the images (m,) with one more, places, directions (N, m).

    u: (len(images), 2 FIRST_TRIES + NEXT_TRIES (N − 1)) uniform. The occupancy of the other images does not change.
    """
    taken = stencils.images(occupancy.taken[images]) > FREE
    crowded = taken.mean((1, 2)) > 1 - ROOM
    first, following = u[:, : 2 * FIRST_TRIES].reshape(-1, FIRST_TRIES, 2), u[:, 2 * FIRST_TRIES :]
    seeds = [None if full else first_paddle(stencils, *at) for full, *at in zip(crowded, taken, first, strict=True)]
    started = np.flatnonzero([seed is not None for seed in seeds])
    if not len(started):
        return started, *np.empty((2, stencils.geometry.distractor_length, 0), np.int64)
    tails, joints, directions = map(np.array, zip(*filter(None, seeds), strict=True))
    copy = Occupancy(occupancy.taken[images[started]], occupancy.near[images[started]])
    contours = Contours(joints, np.arange(len(started)) * stencils.cells + stencils.places(tails), directions)
    drawn, whole = [contours], np.ones(len(started), np.bool_)
    for draws in following[started].reshape(len(started), -1, NEXT_TRIES).swapaxes(0, 1):
        alive, contours = extend(stencils, copy, contours, draws)
        drawn.append(contours)
        whole &= alive
    take(stencils, copy, contours.places[whole], contours.directions[whole])
    added = images[started[whole]]
    occupancy.taken[added], occupancy.near[added] = copy.taken[whole], copy.near[whole]
    places = np.stack([contours.places % stencils.cells for contours in drawn])
    return added, places[:, whole], np.stack([contours.directions for contours in drawn])[:, whole]


# Images


def rendered(
    geometry: Geometry, targets: Bytes, others: Bytes, markers: Integers, seconds: Bytes | None = None
) -> Bytes:
    """(n, S, S) images, each scaled to its own maximum.

    targets, others, seconds: (n, S, S) coverage of the cells by targets, by distractors, and by the targets of
    `second_contrast`. markers: (n, 2, 2) positions.
    """
    # float32 here and float64 below, as in the official generator: this decides how halves are rounded
    inks = [(geometry.target_contrast, targets), (geometry.distractor_contrast, others)]
    if seconds is not None:
        second = geometry.second_contrast
        inks.append((geometry.target_contrast if second is None else second, seconds))
    coverage = np.arange(256) / 255
    ink = reduce(np.maximum, [(coverage * contrast).astype(np.float32)[cells] for contrast, cells in inks])
    discs = [[marker(geometry.side, geometry.marker_radius, *disc) for disc in both] for both in markers.tolist()]
    light = np.maximum(ink, np.max(discs, axis=1) / 255)
    return (light * (255 / light.max((1, 2), keepdims=True)) + 0.5).astype(np.uint8)


def occupied(stencils: Stencils, places: Integers, directions: Integers) -> Occupancy:
    """The occupancy by the targets of n images: (2 N, n) paddles in the order of a `Pair`."""
    occupancy = Occupancy(*(np.tile(cells, (places.shape[1], 1)) for cells in stencils.blank))
    last = len(places) - 2  # the last paddle of the first contour, which the official generator leaves out
    for paddle in [*range(last), last + 1]:
        take(stencils, occupancy, places[paddle], directions[paddle])
    return occupancy


def finished(stencils: Stencils, pairs: Sequence[Pair], ends: Integers, u: Reals) -> tuple[Bytes, Integers, Integers]:
    """Images of pairs of targets: pixels (n, S, S), positions of the markers (n, 2, 2), distractors (n,).

    ends: (n, 2) which contour is marked at its start, and which one at its end. u: (n, distractors, DISTRACTOR_TRIES,
    draws of `distract`) uniform.
    """
    images = np.arange(len(pairs))
    base = images * stencils.cells
    places = base + np.stack([pair.places for pair in pairs], 1)  # (2 N, n)
    directions = np.stack([pair.directions for pair in pairs], 1)
    layers = np.zeros((3, len(pairs), stencils.cells), np.uint8)
    targets, seconds, others = layers
    for paddle, (place, direction) in enumerate(zip(places, directions, strict=True)):
        layer = paddle % 2 != ends[:, 0]  # 1: the target that is not marked at its start
        paste(layers, layer * targets.size + place, direction, stencils.ink)
    occupancy, count = occupied(stencils, places, directions), np.zeros(len(pairs), np.int64)
    for tries in u.swapaxes(0, 1):
        missing = images
        for draws in tries.swapaxes(0, 1):
            added, *paddles = distract(stencils, occupancy, missing, draws[missing])
            for place, direction in zip(*paddles, strict=True):
                paste(others, base[added] + place, direction, stencils.ink)
            count[added] += 1
            missing = np.setdiff1d(missing, added)
    marked = np.stack((places[ends[:, 0], images], places[ends[:, 1] - 2, images]), 1)  # tails, and tips of the last
    markers = stencils.positions(marked % stencils.cells)
    contours = stencils.images(targets), stencils.images(others)
    pixels = rendered(stencils.geometry, *contours, markers, stencils.images(seconds))
    return pixels, markers, count


def draw(geometry: Geometry, seed: int, chunk: int, size: int = CHUNK) -> Images:
    """The first `size` images of a chunk, which has the images number chunk · CHUNK, … of a seed.

    An image depends on the geometry, the seed and its number alone. Raises `NoRoom`.
    """

    def stream(*key: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=(chunk, *key))))

    facts = stream(FACTS).random((size, 3)) * (2, len(geometry.margins), 2)
    labels, margins, start = facts.astype(np.int64).T
    ends = np.stack((start, np.where(labels, start, 1 - start)), 1)
    u = stream(DISTRACTORS).random((size, geometry.distractors, DISTRACTOR_TRIES, draws_of_distractor(geometry)))
    pixels, markers = np.empty((size, geometry.side, geometry.side), np.uint8), np.empty((size, 2, 2), np.int16)
    count = np.empty(size, np.uint8)
    for index in np.unique(margins).tolist():
        stencils = stencils_of(geometry, geometry.margins[index])
        pairs = iter(Pairs(stencils, stream(TARGETS, index)))
        mine = np.flatnonzero(margins == index)
        for some in (mine[i : i + BATCH] for i in range(0, len(mine), BATCH)):
            batch = finished(stencils, list(itertools.islice(pairs, len(some))), ends[some], u[some])
            pixels[some], markers[some], count[some] = batch
    return Images(pixels, labels.astype(np.uint8), markers, count)
