"""Draw a picture of runs from their TensorBoard event files: small charts side by side, and what the models guess.

python tests/benchmarks/plot_runs.py picture.png PyTorch=output/pytorch JAX=output/jax

Of several runs in a folder it takes the newest. Pillow comes with TensorBoard.
"""

import argparse
import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CHARTS = {
    "train/loss": "training loss",
    "eval/loss": "evaluation loss",
    "eval/perplexity": "evaluation perplexity",
    "eval/accuracy": "evaluation accuracy",
    "train/learning_rate": "learning rate",
    "train/grad_norm": "gradient norm",
    "train/tokens_per_second": "tokens per second",
}
COLOURS = ("#d1495b", "#00798c", "#edae49", "#5f4b8b")
INK, GREY, LINE = "#222222", "#777777", "#dddddd"
SCALE = 2  # Drawn larger and made smaller: smooth lines.
WIDTH, HEIGHT, COLUMNS = 300, 210, 4
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 34, 36  # Around the chart in its cell.


def read_events(folder):
    """Return the events of all files under a folder, oldest file first."""
    folders = {path.parent for path in Path(folder).rglob("*tfevents*")}
    if not folders:
        raise SystemExit(f"{folder}: no event files")
    # Of several runs in a folder, the newest.
    newest = max(folders, key=lambda path: max(file.stat().st_mtime for file in path.iterdir()))
    return EventAccumulator(str(newest), size_guidance={"scalars": 0, "tensors": 0}).Reload()


def read_points(events, tag):
    """Return the (step, value) pairs of a chart, in the order of steps."""
    found = {point.step: point.value for point in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}
    return sorted((step, value) for step, value in found.items() if math.isfinite(value))


def read_guesses(events, row):
    """Return (masked sentence, [(step, best guess)], token of the text) of a row of the tables of guesses."""
    tag = "eval/guesses/text_summary"
    found = {event.step: event.tensor_proto.string_val[0].decode() for event in events.Tensors(tag)}
    cells = {step: text.splitlines()[2 + row].strip("| ").split(" | ") for step, text in sorted(found.items())}
    sentence, _, token = next(iter(cells.values()))
    return sentence, [(step, guesses.split("%")[0] + "%") for step, (_, guesses, _) in cells.items()], token


def ticks(low, high):
    """Return three to six round numbers from below `low` to above `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) or abs(high) or 1))
    step = next(step * factor for factor in (0.2, 0.5, 1, 2, 5) if (high - low) / (step * factor) <= 4.5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def number(value):
    """Return a number as an axis shows it."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.2g}"


class Picture:
    """A picture of a size in points."""

    def __init__(self, width, height):
        self.image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
        self.draw = ImageDraw.Draw(self.image)

    def text(self, place, text, colour=INK, size=11, anchor="la"):
        """Write at a place; `anchor` says which corner of the text that is, as in Pillow."""
        font = ImageFont.load_default(size * SCALE)
        self.draw.text([value * SCALE for value in place], text, fill=colour, font=font, anchor=anchor)

    def width(self, text, size):
        """Return the width of a text in points."""
        return ImageFont.load_default(size * SCALE).getlength(text) / SCALE

    def line(self, points, colour, width=1.0):
        """Draw a line through points."""
        points = [(x * SCALE, y * SCALE) for x, y in points]
        self.draw.line(points, fill=colour, width=round(width * SCALE), joint="curve")

    def dot(self, point, colour, radius=2.5):
        """Draw a dot."""
        x, y = (value * SCALE for value in point)
        radius *= SCALE
        self.draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def chart(self, corner, title, series, last_step):
        """Draw a chart in a cell: `series` is [(colour, [(step, value)])]."""
        left, top = corner[0] + LEFT, corner[1] + TOP
        right, bottom = corner[0] + WIDTH - RIGHT, corner[1] + HEIGHT - BOTTOM
        values = [value for _, points in series for _, value in points] or [0, 1]
        marks, steps = ticks(min(0, *values), max(values)), ticks(0, last_step)
        across = {step: left + (right - left) * step / steps[-1] for step in (0, *steps)}
        self.text((left, corner[1] + 8), title, size=13)
        for mark in marks:
            y = bottom - (bottom - top) * (mark - marks[0]) / (marks[-1] - marks[0])
            self.line([(left, y), (right, y)], LINE)
            self.text((left - 6, y), number(mark), GREY, 10, "rm")
        for step, x in across.items():
            self.text((x, bottom + 5), number(step), GREY, 10, "ma")
        self.text(((left + right) / 2, bottom + 19), "step", GREY, 10, "ma")
        # The first one is widest: it shows where another covers it.
        for width, (colour, points) in zip(range(2 * len(series), 0, -2), series):
            places = [
                (
                    left + (right - left) * step / steps[-1],
                    bottom - (bottom - top) * (value - marks[0]) / (marks[-1] - marks[0]),
                )
                for step, value in points
            ]
            if len(places) > 1:
                self.line(places, colour, width)
            for place in places if len(places) < 12 else []:
                self.dot(place, colour, width + 1.5)

    def legend(self, corner, names):
        """Write which colour is which run."""
        for i, name in enumerate(names):
            x, y = corner[0] + LEFT, corner[1] + TOP + 24 * i
            self.line([(x, y + 8), (x + 26, y + 8)], COLOURS[i], 3)
            self.text((x + 36, y + 8), name, size=13, anchor="lm")

    def guesses(self, top, runs, rows):
        """Write, for some rows of the tables of guesses, the sentence and each run's best guess at each evaluation."""
        for row in rows:
            found = {name: read_guesses(events, row) for name, events in runs.items()}
            sentence, _, token = next(iter(found.values()))
            self.text((LEFT, top), sentence, size=13)
            self.text((LEFT + self.width(f"{sentence}   ", 13), top), f"(the text: {token})", GREY, 13)
            for i, (name, (_, guesses, _)) in enumerate(found.items()):
                top += 20
                self.text((LEFT + 16, top), name, COLOURS[i], 12)
                places = [LEFT + 110 + 1050 * j / len(guesses) for j in range(len(guesses))]
                for x, (step, guess) in zip(places, guesses):
                    word, share = guess.rsplit(" ", 1)
                    self.text((x, top), f"step {step}:", GREY, 12)
                    x += self.width(f"step {step}:  ", 12)
                    self.text((x, top), f"{word} {share}", INK if word == token else GREY, 12)
                    if word == token:
                        self.line([(x, top + 16), (x + self.width(word, 12), top + 16)], COLOURS[i], 1.5)
            top += 30


def draw(runs, rows):
    """Return the picture of {name: events}."""
    names = list(runs)
    lines = -(-(len(CHARTS) + 1) // COLUMNS)
    height = lines * HEIGHT + 8 + len(rows) * (30 + 20 * len(runs)) + 4
    picture = Picture(COLUMNS * WIDTH, height)
    points = {tag: [read_points(events, tag) for events in runs.values()] for tag in CHARTS}
    last_step = max(step for series in points.values() for run in series for step, _ in run)
    cells = [(WIDTH * (i % COLUMNS), HEIGHT * (i // COLUMNS)) for i in range(len(CHARTS) + 1)]
    for corner, (tag, title) in zip(cells, CHARTS.items()):
        picture.chart(corner, title, list(zip(COLOURS, points[tag])), last_step)
    picture.legend(cells[-1], names)
    picture.guesses(lines * HEIGHT + 8, runs, rows)
    small = picture.image.resize((COLUMNS * WIDTH, height), Image.Resampling.LANCZOS)
    return small.quantize(128, dither=Image.Dither.NONE)


def main():
    """Draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("picture", help="the PNG file to write")
    parser.add_argument("runs", nargs="+", help="name=folder of event files, at most four")
    parser.add_argument("--sentences", type=int, nargs="*", default=[1, 3, 4], help="which sentences to show, from 1")
    args = parser.parse_args()
    runs = {name: read_events(folder) for name, folder in (run.split("=", 1) for run in args.runs)}
    draw(runs, [number - 1 for number in args.sentences]).save(args.picture, optimize=True)


if __name__ == "__main__":
    main()
