"""Draw the four pictures that the lesson on pictures in a chat asks about: a harbour, a kitchen, a street and a chart.

Lengths are in pixels of the finished picture; y grows downwards. What the questions in
data/pictures/drawings/questions.json count or read off stands in the constants at the top.

    python -m data.build.drawings --out data/pictures/drawings
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

WIDTH, HEIGHT, FINE = 768, 512, 4  # everything is drawn FINE times larger, then reduced
SAILS = ["white", "red", "white"]  # from left to right
NUM_GULLS, NUM_ORANGES = 5, 3
CLOCK = (4, 10)  # hours, minutes
HOUSES = ["red", "white", "green", "pink", "blue"]  # from left to right
SIGN, BUS_NUMBER, LIT = "MILL LANE", "7", "red"
TITLE, NOTE = "Cups of tea sold", "BUY MILK"
CUPS = {"Mon": 12, "Tue": 18, "Wed": 9, "Thu": 24, "Fri": 15}

Points = list[tuple[float, float]]
ALL = [(0.0, 0.0), (WIDTH, 0.0), (WIDTH, HEIGHT), (0.0, HEIGHT)]


def path(corners: str | Points) -> Points:
    """Return the points of a text such as "0,0 4,-9 8,0"; a list of points is returned as it is."""
    return [tuple(map(float, corner.split(","))) for corner in corners.split()] if isinstance(corners, str) else corners


def box(left: float, top: float, right: float, bottom: float, radius: float = 0) -> Points:
    """Return a rectangle, its corners rounded."""
    if not radius:
        return [(left, top), (right, top), (right, bottom), (left, bottom)]
    corners = [(right - radius, top + radius, -90), (right - radius, bottom - radius, 0)]
    corners += [(left + radius, bottom - radius, 90), (left + radius, top + radius, 180)]
    return [point for x, y, turn in corners for point in oval(x, y, radius, start=turn, end=turn + 90)]


def oval(x: float, y: float, rx: float, ry: float = 0, *, start: float = 0, end: float = 360) -> Points:
    """Return an ellipse (a circle without ``ry``), or its arc between two angles: degrees clockwise from the right."""
    turns = [math.radians(start + (end - start) * n / 48) for n in range(49)]
    return [(x + rx * math.cos(turn), y + (ry or rx) * math.sin(turn)) for turn in turns]


def smooth(through: str | Points, *, closed: bool = True) -> Points:
    """Return a smooth curve (Catmull-Rom) through the points, ``closed`` or from the first to the last."""
    points = path(through)
    points = [points[-1], *points, *points[:2]] if closed else [points[0], *points, points[-1]]
    curve = []
    for a, b, c, d in zip(points, points[1:], points[2:], points[3:], strict=False):
        for t in (n / 12 for n in range(13)):
            weights = (2 * t**2 - t - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2)
            curve.append(
                tuple(sum(w * q[axis] for w, q in zip(weights, (a, b, c, d), strict=True)) / 2 for axis in (0, 1))
            )
    return curve


@cache
def font(size: float) -> ImageFont.FreeTypeFont:
    """Return the typeface that comes with Pillow (Aileron, CC0), ``size`` pixels tall in the finished picture."""
    return ImageFont.load_default(size * FINE)


@dataclass(frozen=True)
class Canvas:
    """A picture that is being drawn, seen from an origin at (x, y) and enlarged by ``scale``."""

    picture: Image.Image
    x: float = 0
    y: float = 0
    scale: float = 1
    clip: Points | None = None

    def at(self, x: float, y: float, scale: float = 1) -> Canvas:
        """Return the canvas with its origin at (x, y) and all lengths ``scale`` times as large."""
        return replace(self, x=self.x + self.scale * x, y=self.y + self.scale * y, scale=self.scale * scale)

    def inside(self, points: str | Points) -> Canvas:
        """Return the canvas on which only what lies inside the points can be painted."""
        return replace(self, clip=self._placed(points))

    def area(
        self,
        points: str | Points,
        colour: str,
        to: str = "",
        *,
        across: bool = False,
        blur: float = 0,
        opacity: float = 1,
        width: float = 0,
    ) -> None:
        """Fill what the points enclose, or draw a line of a ``width`` along them.

        The colour runs ``to`` another from top to bottom, or ``across`` from left to right; ``blur`` softens the edge.
        """
        placed, pad = self._placed(points), (3 * blur + width) * self.scale * FINE
        low, high = ([pick(xs) for xs in zip(*placed, strict=True)] for pick in (min, max))
        frame = [max(0, math.floor(value - pad)) for value in low]
        frame += [min(side * FINE, math.ceil(value + pad)) for value, side in zip(high, (WIDTH, HEIGHT), strict=True)]
        if frame[0] >= frame[2] or frame[1] >= frame[3]:
            return
        mask = _mask(placed, frame, width * self.scale * FINE)
        mask = mask.filter(ImageFilter.GaussianBlur(blur * self.scale * FINE))
        if self.clip:
            mask = ImageChops.multiply(mask, _mask(self.clip, frame))
        paint = Image.new("RGB", mask.size, colour)
        if to:
            slope = Image.linear_gradient("L").rotate(90 if across else 0).resize(mask.size, Image.Resampling.BILINEAR)
            paint = Image.composite(Image.new("RGB", mask.size, to), paint, slope)
        self.picture.paste(paint, tuple(frame), mask.point(lambda value: round(value * opacity)))

    def text(
        self, x: float, y: float, words: str, size: float, bold: float = 0, *, colour: str, anchor: str = "mm"
    ) -> None:
        """Write words around (x, y), their strokes ``bold`` pixels thicker."""
        pen, stroke = ImageDraw.Draw(self.picture), bold * FINE / 2
        pen.text(self._placed([(x, y)])[0], words, colour, font(size), anchor, stroke_width=stroke)

    def _placed(self, points: str | Points) -> Points:
        return [((self.x + self.scale * x) * FINE, (self.y + self.scale * y) * FINE) for x, y in path(points)]


def _mask(points: Points, frame: list[int], width: float = 0) -> Image.Image:
    mask = Image.new("L", (frame[2] - frame[0], frame[3] - frame[1]))
    pen, points = ImageDraw.Draw(mask), [(x - frame[0], y - frame[1]) for x, y in points]
    if not width:
        pen.polygon(points, 255)
        return mask
    pen.line(points, 255, round(width), joint="curve")
    for end in (points[0], points[-1]):
        pen.circle(end, width / 2, 255)
    return mask


# --- The harbour


def harbour(c: Canvas) -> None:
    """Draw the sea at sunset: three sailing boats, a lighthouse, gulls and a pier."""
    evening_sky(c)
    sea(c)
    headland(c)
    lighthouse(c.at(640, 304))
    for (x, y, scale), sail in zip(((112, 366, 0.78), (372, 432, 1.45), (500, 338, 0.55)), SAILS, strict=True):
        boat(c.at(x, y, scale), sail)
    pier(c)
    for x, y, span in ((90, 92, 26), (180, 142, 19), (336, 70, 30), (450, 132, 20), (560, 62, 24))[:NUM_GULLS]:
        gull(c.at(x, y, span))


def evening_sky(c: Canvas) -> None:
    """Draw the sky down to the horizon, the low sun in its glow and streaks of cloud."""
    c.area(box(0, 0, WIDTH, 180), "#3a3f7d", "#c9708f")
    c.area(box(0, 180, WIDTH, 298), "#c9708f", "#ffd592")
    sky = c.inside(box(0, 0, WIDTH, 297))
    sky.area(oval(236, 268, 120, 90), "#ffe3a0", blur=34, opacity=0.75)
    sky.area(oval(236, 272, 38), "#fff6d2", "#ffdf7e")
    streaks = [(60, 196, 190, "#f2a08f"), (330, 216, 250, "#f7b591"), (470, 172, 230, "#e08d97")]
    for x, y, length, tint in [
        *streaks,
        (150, 118, 200, "#8d6196"),
        (420, 108, 150, "#84609a"),
        (560, 236, 200, "#f9c398"),
    ]:
        c.area(box(x, y, x + length, y + 7, 3.5), tint, opacity=0.8)
        c.area(box(x + 30, y - 6, x + length * 0.7, y + 2, 4), tint, opacity=0.8)
        c.area(box(x - 24, y + 5, x + length * 0.5, y + 10, 2.5), tint, opacity=0.5)


def sea(c: Canvas) -> None:
    """Draw distant hills, the water, the sun's path on it and small waves that grow towards the front."""
    c.area(smooth("-60,300 -20,276 40,268 96,284 160,300"), "#8a6490", "#a5708f")
    c.area(box(0, 297, WIDTH, 400), "#e7a98c", "#3f7d93")
    c.area(box(0, 400, WIDTH, HEIGHT), "#3f7d93", "#1d4a66")
    rng = random.Random(7)
    for row in range(26):
        spread = 26 + row * 2.2
        for _ in range(3):
            x, half = 236 + (rng.random() - 0.5) * spread * 1.6, spread * (0.25 + 0.4 * rng.random())
            c.area(oval(x, 301 + row**1.62, half, 1 + row * 0.1), "#ffe9b0", opacity=0.62 - row * 0.012)
    for _ in range(170):
        depth = rng.random() ** 1.4
        x, tint = rng.random() * WIDTH, "#f3c7a4" if rng.random() < 0.4 else "#16405c"
        c.area(oval(x, 306 + 200 * depth, 7 + 26 * depth, 0.7 + 1.3 * depth), tint, opacity=0.24)


def headland(c: Canvas) -> None:
    """Draw the rocks on the right that the lighthouse stands on, grass on top and foam at their foot."""
    c.area(oval(680, 378, 170, 14), "#123a52", blur=6, opacity=0.6)
    c.area("520,368 548,340 584,330 606,306 700,300 800,292 800,384 600,380", "#7d6a72", "#4b4658")
    rocks = ["520,368 548,340 584,330 574,374", "606,306 640,312 622,350 584,330"]
    for rock in [*rocks, "700,330 742,318 768,360 716,378", "640,336 690,340 676,372 634,376"]:
        c.area(rock, "#a08a8a", "#6d6070", opacity=0.75)
    grass = "600,312 606,302 660,297 800,284 800,312 740,314 700,322 664,312 632,318"
    c.area(smooth(grass), "#7f9a55", "#55793f")
    for x in range(518, 780, 13):
        c.area(oval(x, 373 + x * 7 % 9, 6 + x * 5 % 13, 1.6 + x % 3 * 0.5), "#f6dfcf", opacity=0.8)


def lighthouse(c: Canvas) -> None:
    """Draw a red and white striped tower of 226 pixels that stands on the origin, its lamp lit."""
    tower = "-17,-166 17,-166 28,0 -28,0"
    c.area(tower, "#fbf4ea")
    for top in (-166, -99.6, -33.2):
        c.inside(tower).area(box(-40, top, 40, top + 33.2), "#d5342f")
    c.inside(tower).area(box(4, -170, 40, 0), "#2b1f4a", blur=6, opacity=0.42)
    for hole in (box(-7, -26, 7, 0, 3), box(-5, -61, 5, -43, 4), box(-5, -127, 5, -109, 4)):
        c.area(hole, "#4b3340")
    c.area(box(-14, -198, 14, -172), "#fff0a6", "#ffc95c")
    c.area(oval(0, -185, 24), "#fff2b0", blur=8, opacity=0.8)
    for x in (-14, -5, 5, 14):
        c.area([(x, -198), (x, -172)], "#4b3340", width=1.8)
    c.area(box(-25, -173, 25, -165, 2), "#4b3340")
    c.area(oval(0, -197, 18, 17, start=180, end=360), "#b32a2a", "#7d1f2a")
    c.area("0,-214 0,-226", "#4b3340", width=2)


def boat(c: Canvas, sail: str) -> None:
    """Draw a boat of 130 pixels with red or white sails, its waterline on the origin, and its image in the water."""
    light, dark = {"red": ("#ee5a46", "#b8242c"), "white": ("#ffffff", "#d9d3df")}[sail]
    for ripple in range(7):
        c.area(oval(ripple % 2 * 6 - 4, 6 + ripple * 7, 44 - ripple * 4, 3), dark, opacity=0.4 - ripple * 0.04)
    c.area(oval(0, 2, 58, 5), "#123a52", opacity=0.55, blur=2)
    c.area("-6,-22 -6,-118", "#5a3a2c", width=2.6)
    mainsail = [*smooth("-2,-112 26,-70 47,-24", closed=False), (-2, -22)]
    c.area(mainsail, light, dark, across=True)
    c.area([*smooth("-10,-104 -36,-58 -44,-22", closed=False), (-10, -22)], light, dark)
    for seam in ("-2,-50 60,-42", "-2,-80 60,-72"):
        c.inside(mainsail).area(seam, dark, width=1, opacity=0.7)
    c.area("-6,-118 14,-124 -6,-130", "#f5c342")
    c.area(smooth("62,-18 50,0 36,6 -36,6 -50,0 -60,-18", closed=False), "#7a4a34", "#4a2b26")
    c.area("-60,-18 62,-18", "#f7e6cf", width=4)
    c.area(oval(0, 6, 52, 2.6), "#f6dfcf", opacity=0.7)


def gull(c: Canvas) -> None:
    """Draw a gull on the wing around the origin, 2 pixels from tip to tip."""
    for side in (-1, 1):
        upper, lower = ([(0, 0), (side * 0.5, -0.42), (side, -0.1)], [(side, -0.1), (side * 0.5, -0.26), (0, 0.2)])
        c.area(smooth(upper, closed=False) + smooth(lower, closed=False), "#fffaf4", "#efdfe4")
        c.area(smooth([(side * 0.76, -0.36), (side, -0.1), (side * 0.72, -0.22)]), "#4b4560")
    c.area(oval(0, 0.06, 0.1, 0.16), "#fffaf4")


def pier(c: Canvas) -> None:
    """Draw the planks of a wooden pier in the front left corner, with its posts and rope."""
    deck = "0,444 168,462 236,512 0,512"
    c.area("0,470 196,486 262,530 0,530", "#0f2e44", blur=7, opacity=0.7)
    c.area(deck, "#a87a58", "#8a5d45")
    for plank in range(0, 260, 21):
        c.inside(deck).area([(plank * 0.82 - 12, 430), (plank * 1.25 - 16, 520)], "#5f3d33", width=1.8)
    c.area("0,444 168,462 236,512", "#d3a077", width=4)
    for post in (c.at(62, 462), c.at(170, 474)):
        post.area(oval(10, 4, 16, 5), "#3a2420", opacity=0.5, blur=2)
        post.area(box(-10, -44, 10, 2, 4), "#8c5f46", "#4c2f2a", across=True)
        post.area(oval(0, -42, 10, 4), "#c79672")
        post.area("-10,-20 10,-17", "#efe0bd", width=5)
    c.area(smooth("72,444 112,474 160,456", closed=False), "#efe0bd", width=3.2)


# --- The kitchen


def kitchen(c: Canvas) -> None:
    """Draw a table by the window: a mug of tea, a plate of fruit, and a clock on the wall."""
    kitchen_wall(c)
    window(c)
    clock(c.at(578, 132), *CLOCK)
    table(c)
    mug(c.at(246, 376))
    plate(c.at(496, 372))


def kitchen_wall(c: Canvas) -> None:
    """Draw the wall, the light that falls on it, the boards below and the floor."""
    c.area(box(0, 0, WIDTH, 400), "#f8e8c8", "#eccf9f")
    for x in range(16, WIDTH, 32):
        c.area([(x, 0), (x, 300)], "#e6c793", width=1.2, opacity=0.5)
    c.area("330,60 540,130 720,330 420,330", "#fff6dc", blur=22, opacity=0.55)
    c.area(box(0, 300, WIDTH, 470), "#9db8a6", "#7f9d8e")
    for x in range(0, WIDTH, 48):
        c.area([(x, 308), (x, 470)], "#6d8a7d", width=1.6)
    c.area(box(0, 296, WIDTH, 306), "#c9dccb", "#a9c2b0")
    c.area(box(0, 470, WIDTH, HEIGHT), "#a06b47", "#7c4e36")
    c.area(box(0, 462, WIDTH, 470), "#dbe6d8")


def window(c: Canvas) -> None:
    """Draw a window of four panes, the tree behind it and the curtains beside it."""
    c.area(box(52, 38, 336, 288), "#8b6a43", blur=7, opacity=0.45)
    glass = c.inside(box(66, 44, 316, 268))
    glass.area(box(66, 44, 316, 268), "#8fcdf0", "#e2f4fb")
    for x, y, half in ((222, 92, 26), (248, 82, 22), (270, 94, 24), (120, 78, 16), (138, 74, 16)):
        glass.area(oval(x, y, half, half * 0.5), "#ffffff", opacity=0.9)
    glass.area(smooth("20,300 60,226 150,212 240,232 340,208 380,300"), "#9ccb76", "#6fae58")
    tree(glass.at(142, 252, 0.74))
    for bar in ("66,44 316,44 316,268 66,268 66,44", "191,44 191,268", "66,156 316,156"):
        c.at(1.5, 2.5).area(bar, "#b79d78", width=9, opacity=0.6)
        c.area(bar, "#fffaf0", width=9)
    c.area(box(48, 271, 334, 285, 3), "#fffaf0", "#dcc9a6")
    curtain(c.at(46, 26), 1)
    curtain(c.at(336, 26), -1)
    c.area("34,24 348,24", "#7b5136", width=6)


def curtain(c: Canvas, side: int) -> None:
    """Draw a curtain of 238 pixels, tied back, that reaches from the origin to the right (``side`` 1) or left (-1)."""

    def line(points: str) -> Points:
        return [(side * x, y) for x, y in smooth(points, closed=False)]

    cloth = line("62,0 44,90 16,168 24,238") + line("-4,238 0,168 0,0")
    c.area(cloth, "#f0a35e", "#d9783f")
    for fold in ("12,0 8,100 3,168 5,238", "28,0 20,100 7,168 11,238", "44,0 31,100 11,168 18,238"):
        c.inside(cloth).area(line(fold), "#b85c2c", width=2.4, opacity=0.55)
    c.area([(side * -2, 168), (side * 17, 168)], "#fff0d0", width=7)


def tree(c: Canvas) -> None:
    """Draw a broad-leaved tree of 192 pixels that stands on the origin."""
    c.area("-13,0 -8,-50 -26,-86 -18,-90 -2,-66 4,-96 12,-96 10,-50 15,0", "#7d5438", "#5d3b2a")
    leaves = [(-42, -98, 36), (42, -98, 36), (-26, -134, 38), (30, -138, 36), (0, -108, 44), (2, -160, 32)]
    for x, y, radius in leaves:
        c.area(oval(x, y, radius), "#3f8a3d", "#2c6b34")
    for x, y, radius in leaves:
        c.area(oval(x - 7, y - 8, radius * 0.66), "#7cc257", "#4c9a45", opacity=0.75, blur=3)


def clock(c: Canvas, hours: int, minutes: int) -> None:
    """Draw a round wall clock of 140 pixels around the origin that shows a time."""

    def at(turn: float, far: float) -> tuple[float, float]:
        return math.sin(math.tau * turn) * far, -math.cos(math.tau * turn) * far

    c.area(oval(6, 10, 70), "#7d5a30", blur=7, opacity=0.5)
    c.area(oval(0, 0, 70), "#d8483d", "#a52c2c")
    c.area(oval(0, 0, 60), "#ffffff", "#f4efe4")
    for tick in range(60):
        c.area([at(tick / 60, 56 if tick % 5 else 53), at(tick / 60, 57.5)], "#40404a", width=1 if tick % 5 else 2.2)
    for hour in range(1, 13):
        c.text(*at(hour / 12, 44), str(hour), 14, 0.4, colour="#2b2b35")
    for turn, length, width in (((hours + minutes / 60) / 12, 24, 5.4), (minutes / 60, 38, 3.4)):
        c.area([at(turn + 0.5, 7), at(turn, length)], "#22222c", width=width)
    c.area(oval(0, 0, 4.5), "#c8372f")


def table(c: Canvas) -> None:
    """Draw the table and its red and white checked cloth, which hangs down in front."""
    c.area(oval(384, 500, 350, 12), "#3d2419", blur=8, opacity=0.55)
    for x in (84, 660):
        c.at(x, 430).area("0,0 26,0 22,70 4,70", "#8b5a3a", "#5f3b28", across=True)
    top, front = c.inside("92,336 676,336 734,408 34,408"), c.inside(box(34, 408, 734, 472))
    top.area(ALL, "#fff8f2")
    front.area(box(34, 408, 734, 472), "#f7ebe6", "#e7d3cf")
    for n in range(0, 28, 2):
        back, left, right = 92 + 584 * n / 28, 34 + 25 * n, 59 + 25 * n
        top.area([(back, 336), (back + 584 / 28, 336), (right, 408), (left, 408)], "#d7372f", opacity=0.5)
        front.area(box(left, 408, right, 472), "#c22f2a", opacity=0.5)
    for upper, lower in ((336, 347), (360, 375), (391, 408)):
        top.area(box(0, upper, WIDTH, lower), "#d7372f", opacity=0.5)
    front.area(box(34, 432, 734, 456), "#c22f2a", opacity=0.5)
    front.area(box(34, 402, 734, 424), "#5a1f22", blur=5, opacity=0.3)
    c.area("34,408 734,408", "#ffffff", width=2.4, opacity=0.8)
    c.area("34,472 734,472", "#b02b28", width=3)


def mug(c: Canvas) -> None:
    """Draw a blue mug of 103 pixels that stands on the origin, with tea in it and steam above."""
    c.area(oval(26, 0, 62, 11), "#5a1f22", blur=5, opacity=0.5)
    c.area(smooth("40,-78 78,-74 76,-34 38,-22", closed=False), "#1f4fa8", width=11)
    c.area([*path("-44,-92 44,-92"), *oval(0, -8, 41, 10, end=180)], "#3f7fe0", "#1c479c", across=True)
    c.area(box(-32, -80, -22, -14, 5), "#a9cbff", blur=3, opacity=0.7)
    c.area(oval(0, -92, 44, 11), "#5b95ec", "#2f66c4")
    c.area(oval(0, -90, 38, 8), "#8a4a22", "#b8733a")
    for x, wave in ((-18, 0.7), (4, 1), (24, 0.8)):
        wisp = [(x, -96), (x + 8 * wave, -116), (x - 8 * wave, -142), (x + 7 * wave, -166), (x, -184)]
        c.area(smooth(wisp, closed=False), "#ffffff", width=6, blur=2.4, opacity=0.85)


def plate(c: Canvas) -> None:
    """Draw a white plate around the origin with the oranges on it and the pear to their right."""
    c.area(oval(8, 8, 140, 24), "#5a1f22", blur=6, opacity=0.5)
    c.area(oval(0, 3, 134, 23), "#c9c9d4")
    c.area(oval(0, 0, 134, 22), "#ffffff", "#ececf2")
    c.area(oval(0, 1, 100, 14), "#dfe2ea", "#f7f8fb")
    c.area(oval(-10, 4, 104, 12), "#6b5a62", blur=5, opacity=0.5)
    pear(c.at(74, 6))
    for x, y in ((-72, -28), (10, -28), (-31, -22))[:NUM_ORANGES]:
        orange(c.at(x, y))


def orange(c: Canvas) -> None:
    """Draw an orange of 72 pixels around the origin."""
    peel = oval(0, 0, 36)
    c.area(peel, "#ff9f2e", "#e8701a")
    c.inside(peel).area(oval(16, 20, 32, 25), "#b8480f", blur=9, opacity=0.5)
    c.inside(peel).area(oval(-12, -13, 10, 8), "#ffe0a8", blur=4, opacity=0.9)
    c.area(peel, "#b8480f", width=1.2, opacity=0.5)
    c.area(oval(4, -23, 4, 2.6), "#5c7a2c")


def pear(c: Canvas) -> None:
    """Draw a green pear of 116 pixels that stands on the origin."""
    skin = smooth("0,-96 15,-84 21,-56 36,-28 22,-2 0,2 -22,-2 -36,-28 -21,-56 -15,-84")
    c.area(smooth("0,-94 2,-106 8,-114", closed=False), "#6b4226", width=4.4)
    c.area(smooth("4,-102 22,-118 42,-110 24,-98"), "#5fae48", "#3f8a3d")
    c.area(skin, "#c9dc4e", "#8fb52f")
    c.inside(skin).area(oval(26, -20, 22, 46), "#5f8a1f", blur=9, opacity=0.6)
    c.inside(skin).area(oval(-13, -40, 6, 20), "#f6fbc0", blur=4, opacity=0.9)


# --- The street


def street(c: Canvas) -> None:
    """Draw a row of houses, a bus in front of them, a dog, a tree, a sign and a traffic light."""
    c.area(box(0, 0, WIDTH, 380), "#6fb7e8", "#e6f5fa")
    for x, y in ((70, 60), (430, 40), (612, 74)):
        for dx, dy, half in ((0, 0, 44), (78, 2, 40), (40, -14, 40)):
            c.area(oval(x + dx, y + dy, half, half * 0.42), "#ffffff", "#eef7fb", opacity=0.95)
    c.area(smooth("600,400 640,352 690,332 780,344 860,400"), "#9ccb76", "#6fae58")
    for number, (colour, height) in enumerate(zip(HOUSES, (206, 238, 190, 228, 212), strict=True)):
        house(c.at(number * 137 - 4, 372), height, colour)
    road(c)
    tree(c.at(728, 388, 1.05))
    street_sign(c.at(82, 392))
    bus(c.at(220, 460))
    traffic_light(c.at(612, 502, 0.84))
    dog(c.at(96, 500))


def house(c: Canvas, height: float, colour: str) -> None:
    """Draw a house 137 pixels wide whose lower left corner is the origin: a gable roof, windows and a door."""
    light, dark, trim = {
        "red": ("#d4604c", "#b24636", "#fbeedd"),
        "white": ("#fbf7ee", "#e4ddcf", "#c7b79d"),
        "green": ("#7fb37a", "#5f965f", "#f3f5e6"),
        "pink": ("#f4a9bd", "#dd869f", "#fff3f3"),
        "blue": ("#5f93cf", "#4474b3", "#f1f6fb"),
    }[colour]
    eaves = 62 - height
    wall = box(1, eaves, 136, 0)
    c.area(box(98, -height - 4, 118, eaves), "#a8614a", "#8a4a3a")
    c.area([(-4, eaves), (68, -height), (141, eaves)], "#6d4f56", "#4d3840")
    c.area(wall, light, dark)
    c.inside(wall).area(box(1, eaves, 136, eaves + 10), "#2b1f33", blur=3, opacity=0.35)
    c.area([(-5, eaves), (142, eaves)], trim, width=6)
    c.area(oval(68, 40 - height, 12), trim)
    c.area(oval(68, 40 - height, 8), "#34506b", "#6a90ad")
    for place in (c.at(37, eaves + 44), c.at(100, eaves + 44), c.at(37, -48)):
        pane(place, trim)
    c.area(box(80, -76, 120, 0, 4), trim)
    c.area(box(85, -71, 115, 0, 3), "#5b3a4a", "#40283a")
    c.area(oval(109, -34, 2.4), "#f2d27a")


def pane(c: Canvas, trim: str) -> None:
    """Draw a window of 42 by 54 pixels around the origin."""
    c.area(box(-21, -27, 21, 27), trim)
    c.area(box(-17, -23, 17, 23), "#35536f", "#7fa6c2")
    c.area("-17,10 5,-23 13,-23 -17,22", "#ffffff", opacity=0.22)
    c.area("0,-23 0,23", trim, width=2.6)
    c.area("-17,0 17,0", trim, width=2.6)
    c.area(box(-24, 25, 24, 30, 1), trim)


def road(c: Canvas) -> None:
    """Draw the pavement before the houses, the road with its dashes, and the pavement in front."""
    c.area(box(0, 372, WIDTH, 398), "#d8d2c6", "#c3bbae")
    c.inside(box(0, 372, WIDTH, 398)).area(box(0, 364, WIDTH, 380), "#2b1f33", blur=5, opacity=0.35)
    c.area(box(0, 396, WIDTH, 402), "#9c958b")
    c.area(box(0, 402, WIDTH, 480), "#5d616b", "#494c56")
    for x in range(-30, WIDTH, 96):
        c.at(x, 426).area("8,0 58,0 56,5 4,5", "#f3f0e6")
    c.area(box(0, 478, WIDTH, 486), "#e9e3d6", "#b5ada1")
    c.area(box(0, 486, WIDTH, HEIGHT), "#d3ccbf", "#c0b8aa")
    for x in range(-40, WIDTH + 60, 64):
        c.at(x, 486).area("20,0 0,26", "#a9a195", width=1.6)


def street_sign(c: Canvas) -> None:
    """Draw the street's name on two posts, 90 pixels tall, that stand beside the origin."""
    for post in ("-50,0 -50,-70", "50,0 50,-70"):
        c.area(post, "#3d4148", width=5)
    c.area(box(-70, -86, 74, -38, 5), "#1a1a22", blur=3, opacity=0.4)
    c.area(box(-72, -90, 72, -44, 5), "#20242c")
    c.area(box(-69, -87, 69, -47, 4), "#ffffff", "#f1f1ee")
    c.text(0, -67, SIGN, 23, 0.9, colour="#14161c")


def bus(c: Canvas) -> None:
    """Draw a yellow bus of 320 by 146 pixels that drives to the right; its lower left corner is the origin."""
    glass = ("#2d4358", "#7ba3bd")
    c.area(oval(160, 0, 172, 9), "#16181e", blur=4, opacity=0.65)
    body = box(0, -132, 320, -16, 16)
    c.area(body, "#ffd23a", "#f0ad12")
    body = c.inside(body)
    body.area(box(0, -48, 320, -40), "#2c2f38")
    body.area(box(0, -132, 320, -124), "#fff0b0", opacity=0.8)
    body.area(box(284, -112, 330, -62, 8), *glass)
    body.area(box(0, -40, 5, -26), "#d5342f")
    for left in range(14, 200, 56):
        c.area(box(left, -112, left + 48, -66, 6), *glass)
        c.at(left, -66).area("6,0 24,-46 34,-46 16,0", "#ffffff", opacity=0.22)
    c.area(box(240, -112, 274, -22, 5), *glass)
    c.area("257,-110 257,-22", "#e8a914", width=3)
    c.area(box(100, -146, 168, -118, 5), "#23262e")
    c.text(134, -132, BUS_NUMBER, 24, 1, colour="#ffe9a3")
    c.area(oval(315, -34, 6, 8), "#fff8dc")
    for x in (62, 212):
        c.inside(box(0, -60, 320, -16)).area(oval(x, -22, 29), "#3a3220")
        for radius, *tints in ((23, "#2a2b31", "#17181c"), (13, "#d9dce2", "#9da2ab"), (5, "#5d616b", "#3d4148")):
            c.area(oval(x, -23, radius), *tints)


def traffic_light(c: Canvas) -> None:
    """Draw a traffic light of 292 pixels that stands on the origin, the LIT lamp shining."""
    c.area(oval(14, 0, 30, 6), "#3b352d", blur=4, opacity=0.6)
    c.area(box(-6, -140, 6, -2), "#6a6e78", "#3f434c", across=True)
    c.area(box(-17, -12, 17, 3, 3), "#3a3e46")
    c.area(box(-37, -288, 37, -120, 14), "#15171c", blur=4, opacity=0.45)
    c.area(box(-37, -292, 37, -126, 14), "#3a3f49", "#23262d", across=True)
    lamps = {"red": ("#ff4a3d", "#e01b1b"), "amber": ("#ffc23d", "#e09a1b"), "green": ("#4ade6a", "#1fa845")}
    for y, (name, tints) in zip((-262, -209, -156), lamps.items(), strict=True):
        c.area(oval(0, y, 31), tints[0], blur=10, opacity=0.8 if name == LIT else 0)
        c.area(oval(0, y, 21), *tints)
        c.area(oval(0, y, 21), "#191c22", opacity=0 if name == LIT else 0.74)
        c.area(oval(-6, y - 7, 7, 5), "#ffffff", blur=2, opacity=0.6 if name == LIT else 0.12)
        c.area(oval(0, y, 23, start=190, end=350), "#15171c", width=5)


def dog(c: Canvas) -> None:
    """Draw a brown dog of 98 pixels with a blue collar that stands on the origin and looks to the right."""
    coat, shade = "#a9683a", "#7d4827"
    c.area(oval(4, 0, 66, 7), "#3b352d", blur=4, opacity=0.6)
    for x in (-36, 30):
        c.at(x, 0).area(smooth("0,-40 13,-38 9,-4 14,0 0,0 -1,-20"), shade)
    c.area(smooth("-50,-50 -72,-64 -74,-86", closed=False), coat, width=9)
    c.area(smooth("-56,-46 -40,-62 0,-58 34,-68 52,-48 40,-26 0,-24 -42,-24"), coat, shade)
    for x in (-52, 36):
        c.at(x, 0).area(smooth("0,-42 16,-36 11,-5 18,0 2,0 1,-20"), coat, shade)
    c.area(smooth("26,-50 34,-82 58,-82 54,-46"), coat)
    c.area("28,-60 56,-58", "#2f6fd6", width=6)
    c.area(smooth("32,-78 42,-96 62,-98 74,-84 92,-78 88,-66 62,-62 42,-64"), "#b67443", coat)
    c.area(smooth("44,-96 34,-84 32,-62 46,-66 56,-92"), shade, "#6b3c20")
    c.area(oval(90, -77, 5.5, 4.5), "#1d1714")
    c.area(oval(68, -84, 3.4), "#1d1714")
    c.area(oval(69, -85.4, 1.1), "#ffffff")


# --- The chart


def chart(c: Canvas) -> None:
    """Draw a bar chart on paper, pinned on a cork board beside a yellow note."""
    cork(c)
    paper(c, "70,52 560,52 560,464 70,464", "#fffdf6", "#f4eee0")
    bars(c.at(132, 404))
    pin(c.at(315, 66), "#e0382f", "#a31d1f")
    paper(c, "590,158 722,149 731,281 601,288", "#fff08a", "#f6d94f")
    for line, word in enumerate(NOTE.split()):
        c.text(661, 206 + 36 * line, word, 30, 0.8, colour="#3a3320")
    pin(c.at(657, 160), "#3f7fe0", "#1c479c")


def cork(c: Canvas) -> None:
    """Draw the speckled board and its wooden frame."""
    c.area(ALL, "#d2a670", "#bb8a56")
    rng = random.Random(11)
    for _ in range(1500):
        x, y, size = rng.random() * WIDTH, rng.random() * HEIGHT, 1 + 2.4 * rng.random()
        c.area(oval(x, y, size, size * 0.7), "#8d6136" if rng.random() < 0.55 else "#e9c795", opacity=0.35)
    frame = "11,11 757,11 757,501 11,501 11,11"
    c.at(4, 6).area(frame, "#3d2415", width=22, blur=5, opacity=0.5)
    c.area(frame, "#8a5733", "#6b4026", width=22)
    c.area([*ALL, ALL[0]], "#b9825a", width=6)


def paper(c: Canvas, sheet: str, colour: str, to: str) -> None:
    """Draw a sheet with its shadow on the board."""
    c.at(5, 8).area(sheet, "#3d2415", blur=7, opacity=0.55)
    c.area(sheet, colour, to)


def pin(c: Canvas, colour: str, to: str) -> None:
    """Draw a drawing pin stuck in at the origin."""
    c.area(oval(7, 9, 10, 7), "#3d2415", blur=3, opacity=0.55)
    c.area(oval(0, 0, 11), colour, to)
    c.area(oval(-3, -4, 4, 3), "#ffffff", blur=1.2, opacity=0.8)


def bars(c: Canvas) -> None:
    """Draw the title, axes from 0 to 25 that meet in the origin, and a bar with its number for every day of CUPS."""
    ink = "#2d3440"
    c.text(183, -298, TITLE, 29, 0.8, colour=ink)
    for value in range(0, 26, 5):
        c.area([(0, -10 * value), (398, -10 * value)], "#c9c6bd", width=1.2)
        c.text(-12, -10 * value, str(value), 15, colour=ink, anchor="rm")
    for number, (day, cups) in enumerate(CUPS.items()):
        bar = c.at(40 + 79.6 * number, 0)
        bar.area(box(-25, -10 * cups, 25, 0), "#3f9c95", "#247a78")
        bar.area(box(-25, -10 * cups, -19, 0), "#8fd3c9", opacity=0.6)
        bar.text(0, -10 * cups - 12, str(cups), 17, 0.5, colour=ink)
        bar.text(0, 17, day, 18, 0.3, colour=ink)
    c.area("0,-258 0,0 398,0", ink, width=2.4)
    c.text(199, 43, "Day of the week", 15, colour=ink)
    c.text(-34, -272, "Cups", 15, colour=ink, anchor="lm")


PICTURES = {f"{scene.__name__}.png": scene for scene in (harbour, kitchen, street, chart)}


def draw(name: str) -> Image.Image:
    """Return one of PICTURES, RGB, 768 x 512 pixels."""
    canvas = Canvas(Image.new("RGB", (WIDTH * FINE, HEIGHT * FINE)))
    PICTURES[name](canvas)
    return canvas.picture.reduce(FINE)


def main() -> None:
    """Draw the pictures into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "pictures" / "drawings")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        draw(name).save(options.out / name, optimize=True)


if __name__ == "__main__":
    main()
