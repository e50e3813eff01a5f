"""Draws the figures of the pages: python docs/figures/draw.py writes the .svg files beside it.

What a layout looks like is not drawn by hand: two ranks dispatch, and their rows are drawn where they arrived.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import torch

import crossdock as cd

FOLDER = Path(__file__).parent
WIDTH = 480
"""A phone shows 343 of them; letters of 15 are still 11 there."""
INK, SOFT, LINE, PAPER = "#1f2933", "#52606d", "#9aa5b1", "#ffffff"
COLOURS = ("#56b4e9", "#e69f00", "#5cc9a7", "#dda0c5")
"""Of Okabe and Ito, lightened: black letters stand on them."""
PICKS = (torch.tensor([[0, 2], [1, 0]]), torch.tensor([[3, 1], [2, -1]]))
"""topk_idx of rank 0 and of rank 1, as on the page."""
NUM_EXPERTS, NUM_TOKENS = 4, 2


@dataclass
class Drawing:
    """An SVG in the making; y grows downward."""

    title: str
    parts: list[str] = field(default_factory=list)
    height: float = 0

    def box(self, x: float, y: float, w: float, h: float, *, fill: str = PAPER, dashed: bool = False) -> None:
        """A rectangle."""
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="5" fill="{fill}" stroke="{LINE}"{dash}/>'
        )
        self.height = max(self.height, y + h)

    def text(self, x: float, y: float, words: str, *, size: int = 15, colour: str = INK, at: str = "start") -> None:
        """A line of text, its baseline at y."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{colour}" text-anchor="{at}">{escape(words)}</text>'
        )
        self.height = max(self.height, y + 4)

    def line(self, x: float, y: float, x2: float, y2: float, *, colour: str = SOFT, arrow: bool = True) -> None:
        """A line, by default with a head."""
        head = f' marker-end="url(#{colour[1:]})"' if arrow else ""
        self.parts.append(
            f'<line x1="{x:g}" y1="{y:g}" x2="{x2:g}" y2="{y2:g}" stroke="{colour}" stroke-width="1.6"{head}/>'
        )
        self.height = max(self.height, y, y2)

    def svg(self) -> str:
        """The file."""
        height = self.height + 14
        heads = "".join(
            f'<marker id="{colour[1:]}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
            for colour in (SOFT, INK)
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
            f'font-family="system-ui, sans-serif">\n<title>{escape(self.title)}</title>\n<defs>{heads}</defs>\n'
            f'<rect width="{WIDTH}" height="{height:g}" rx="8" fill="{PAPER}"/>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def arrived(layout: cd.Layout) -> list[tuple[list[int], list[int]]]:
    """Of each rank, where each expert's rows begin, and each row's token (rank * NUM_TOKENS + token; -1: none)."""
    spec = cd.Spec(num_experts=NUM_EXPERTS, num_topk=2, hidden=4, max_tokens=NUM_TOKENS, wire=cd.Fp32(), layout=layout)

    def program(group: cd.ThreadGroup) -> tuple[list[int], list[int]]:
        with cd.Buffer(group, spec) as buffer:
            recv = buffer.dispatch(torch.ones(NUM_TOKENS, 4), PICKS[group.rank])
            source = recv.src_idx.flatten().tolist()
            if recv.src_idx.dim() == 2:
                return list(range(0, len(source), recv.src_idx.shape[1])), source
            return [] if recv.expert_offsets is None else recv.expert_offsets[:-1].tolist(), source

    return cd.run_local(program, 2)


def layout_figure(layout: cd.Layout, words: Sequence[str]) -> Drawing:
    """The tokens of two ranks above, their rows at the ranks that hold the experts below."""
    drawing = Drawing(title=f"{type(layout).__name__}: " + " ".join(words))
    half, cell, tall, gap = WIDTH / 2, 58, 40, 16
    places: dict[int, tuple[float, float]] = {}
    for rank in range(2):
        drawing.text(gap + rank * half, 24, f"rank {rank} sends")
        for token in range(NUM_TOKENS):
            x, source = gap + rank * half + token * 104, rank * NUM_TOKENS + token
            picks = [str(pick) for pick in PICKS[rank][token].tolist() if pick >= 0]
            drawing.box(x, 36, 92, tall + 6, fill=COLOURS[source])
            drawing.text(x + 46, 54, f"token {token}", at="middle", size=14)
            drawing.text(x + 46, 73, f"expert {' and '.join(picks)}", at="middle", size=11)
            places[source] = (x + 46, 36 + tall + 6)
    top = 176
    for rank, (starts, rows) in enumerate(arrived(layout)):
        x0, y = 12 + rank * half, float(top)
        drawing.text(gap + rank * half, top - 24, f"rank {rank} gets, experts {2 * rank} and {2 * rank + 1}", size=13)
        for number, source in enumerate(rows):
            if number in starts:
                if number:
                    y += 10
                drawing.text(x0 + cell + 104, y + 24, f"expert {2 * rank + starts.index(number)}", size=13, colour=SOFT)
            if source >= 0:
                drawing.box(x0 + 40, y, cell + 50, tall - 4, fill=COLOURS[source])
                drawing.text(x0 + 40 + 54, y + 23, f"rank {source // 2} token {source % 2}", at="middle", size=13)
            else:
                drawing.box(x0 + 40, y, cell + 50, tall - 4, dashed=True)
                drawing.text(x0 + 40 + 54, y + 23, "no row", at="middle", size=13, colour=SOFT)
            drawing.text(x0 + 32, y + 23, str(number), at="end", size=13, colour=SOFT)
            y += tall
    for x, y in places.values():
        drawing.line(x, y + 2, x, y + 26)
    bottom = drawing.height
    for number, said in enumerate(words):
        drawing.text(gap, bottom + 28 + 20 * number, said, size=14, colour=SOFT)
    return drawing


WALK = (
    ("spec.py, layout.py, wire.py", "what all ranks agree on"),
    ("arena.py", "regions and bytes of a segment"),
    ("transport/", "ranks meet, and map each other's segments"),
    ("consent.py", "words: earlier calls are over, this slot is free"),
    ("plan.py", "counts, prefix sums: the final place of each row"),
    ("backends/: push_rows", "cast, and stored in its place at the expert's rank"),
    ("your experts", "run on recv.x"),
    ("backends/: combine", "pulled or pushed back, summed in float32"),
)


def walk_figure() -> Drawing:
    """One row from Buffer.dispatch to the sum at its token's owner."""
    drawing = Drawing(title="The walk of a row: from a Spec to a sum, and the file of each step")
    y = 16.0
    for number, (place, what) in enumerate(WALK):
        is_users = place == "your experts"
        drawing.box(16, y, WIDTH - 32, 50, fill="#fdf3dc" if is_users else "#eef6fb")
        drawing.text(30, y + 31, str(number + 1), size=17, colour=SOFT)
        drawing.text(56, y + 21, place, size=15)
        drawing.text(56, y + 40, what, size=14, colour=SOFT)
        if number + 1 < len(WALK):
            drawing.line(WIDTH / 2, y + 50, WIDTH / 2, y + 63)
        y += 64
    return drawing


Event = tuple[str, str, str]
WORDS: tuple[Event, ...] = (
    ("own", "both count their picks", ""),
    ("cross", "counts, then a word", "call 7, dispatch, slot 1 is free"),
    ("own", "both poll until all words are here", ""),
    ("bar", "nobody has touched another's rows so far", ""),
    ("own", "plan: prefix sums, the same on both", ""),
    ("cross", "rows", "into slot 1, each in its final place"),
    ("cross", "arrived", "released behind the rows"),
    ("own", "both poll arrived: recv is ready", ""),
)


def words_figure() -> Drawing:
    """What two ranks tell each other in one dispatch."""
    drawing = Drawing(title="One dispatch between two ranks: counts and words, rows, arrived")
    left, right = 84.0, WIDTH - 84.0
    for x, rank in ((left, 0), (right, 1)):
        drawing.box(x - 44, 12, 88, 30, fill="#eef6fb")
        drawing.text(x, 32, f"rank {rank}", at="middle")
    y = 70.0
    for kind, words, more in WORDS:
        if kind == "own":
            drawing.text(WIDTH / 2, y, words, at="middle", size=14)
            y += 30
        elif kind == "bar":
            drawing.box(16, y - 16, WIDTH - 32, 32, fill="#fdf3dc")
            drawing.text(WIDTH / 2, y + 5, words, at="middle", size=14)
            y += 44
        else:
            drawing.text(WIDTH / 2, y, words, at="middle", size=15)
            drawing.text(WIDTH / 2, y + 19, more, at="middle", size=13, colour=SOFT)
            drawing.line(left + 6, y + 28, right - 6, y + 44, colour=INK)
            drawing.line(right - 6, y + 28, left + 6, y + 44, colour=INK)
            y += 76
    end = y - 16
    for x in (left, right):
        drawing.parts.insert(0, f'<line x1="{x:g}" y1="42" x2="{x:g}" y2="{end:g}" stroke="#d5dbe1" stroke-width="2"/>')
    return drawing


def timeline_figure(recorded: Path) -> Drawing:
    """A step of four ranks, of which one is late: recorded, spans of rank, track, name, milliseconds from and to."""
    trace = json.loads(recorded.read_text(encoding="utf-8"))
    drawing = Drawing(title="A step of four ranks: three of them wait in combine for rank 2, which comes late")
    first, last = min(span[3] for span in trace["spans"]), max(span[4] for span in trace["spans"])
    left, right, row = 62.0, WIDTH - 14.0, 66

    def at(ms: float) -> float:
        return left + (right - left) * (ms - first) / (last - first)

    for rank in range(4):
        drawing.text(10, 40 + row * rank, f"rank {rank}", size=14)
    for rank, track, name, began, ended in trace["spans"]:
        y = 22 + row * rank
        if track == "calls":
            drawing.box(at(began), y, at(ended) - at(began), 24, fill=COLOURS[0])
            if at(ended) - at(began) > 60:
                drawing.text((at(began) + at(ended)) / 2, y + 17, name, size=13, at="middle")
        else:
            drawing.box(at(began), y + 26, at(ended) - at(began), 20, fill=COLOURS[1])
            if at(ended) - at(began) > 150:
                drawing.text((at(began) + at(ended)) / 2, y + 41, name.removeprefix("for "), size=13, at="middle")
    for rank, began, waiting, ended in trace["arrows"]:
        below = 0 if waiting > rank else 24
        drawing.line(
            at(began), 22 + row * rank + 24 - below, at(ended), 22 + row * waiting + 26 + 20 * (below > 0), colour=INK
        )
    y = 22 + row * 4 + 6
    drawing.box(left, y, 14, 14, fill=COLOURS[0])
    drawing.text(left + 20, y + 12, "in a call", size=13)
    drawing.box(left + 100, y, 14, 14, fill=COLOURS[1])
    drawing.text(left + 120, y + 12, "waits for a rank", size=13)
    drawing.text(right, y + 12, f"{last - first:.0f} ms", size=13, at="end", colour=SOFT)
    return drawing


def figures() -> Iterator[tuple[str, Drawing]]:
    """All of them, with the names of their files."""
    yield (
        "layout-compact.svg",
        layout_figure(
            cd.Compact(), ["Compact: a row for each token and rank,", "however many of its experts are there."]
        ),
    )
    yield (
        "layout-expanded.svg",
        layout_figure(
            cd.Expanded(alignment=2),
            ["Expanded(alignment=2): a row for each pick, expert after", "expert; each begins at a multiple of 2."],
        ),
    )
    yield (
        "layout-padded.svg",
        layout_figure(
            cd.Padded(capacity=3),
            ["Padded(capacity=3): three rows for each expert at every", "call, however many came."],
        ),
    )
    yield "walk.svg", walk_figure()
    yield "words.svg", words_figure()
    yield "late_rank.svg", timeline_figure(FOLDER / "late_rank.json")


if __name__ == "__main__":
    for name, drawing in figures():
        (FOLDER / name).write_text(drawing.svg(), encoding="utf-8")
