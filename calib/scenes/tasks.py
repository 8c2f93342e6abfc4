"""The ten tasks of MIG-Bench in drawn scenes, and two easy ones: each adds pictures and questions to a Draft.

Questions have one right answer by construction: a task draws again (Retry) rather than ask what two things answer.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from .layout import LARGE_PX, MIN_PX, SMALL_PX, Draft, Key, Retry, Sample, Spec
from .sprites import CLASSES, COLOURS, Box, Thing, area, overlaps, render, thing
from .views import View
from .wordings import EASY_TASKS, REASONING, TASKS, format_ref

__all__ = ["sample"]

Track = Sequence[Thing]  # one thing in picture after picture


# ---- one picture
def _single(draft: Draft) -> None:
    """Objects among others, named in full; or for the task "naming", what is at a box."""
    base = draft.combos(1)
    things = draft.place(base + draft.combos(draft.integer(0, (1, 2, 3)[draft.level]), base, base))
    draft.add(render(draft.background(), things), things)
    for t in things:
        if draft.task == "naming":
            draft.ask_name(0, t, aux=False)
        else:
            phrase = draft.describe(t, things) or ""  # never empty: no two things are alike
            draft.ask(0, t.box, phrase=format_ref(re.sub("^an? ", "the ", phrase)))
    if draft.task == "single":
        draft.ask_extra(0, 2)


# ---- several pictures without a marked object
def _group_grounding(draft: Draft) -> None:
    """A description fits one object in one of the pictures: which picture, and where."""
    counts = [draft.count() for _ in range(draft.integer(2, draft.max_images))]
    base = draft.combos(1)
    specs: list[Spec] = [*base, *draft.combos(sum(counts) - 1, base, base)]
    if draft.level and draft.chance(0.4):  # a pair told apart by its size alone
        cls, colour = specs[-1][:2]
        small, large = draft.side(1, MIN_PX, SMALL_PX - 4), draft.side(1, LARGE_PX + 4, 90)
        specs[-2:] = [(cls, colour, small), (cls, colour, large)]
    specs = draft.shuffled(specs)
    pairs: list[tuple[int, Thing]] = []
    for i, n in enumerate(counts):
        things = draft.place([specs.pop() for _ in range(n)])
        draft.add(render(draft.background(), things), things)
        pairs += [(i, t) for t in things]
    for i, t in draft.shuffled(pairs):
        phrase = draft.describe(t, [other for _, other in pairs]) if len(draft.questions) < 7 else None
        if phrase:
            draft.ask_group(phrase, i, t.box)
    draft.ask_extra(0, 1)


def _common_object(draft: Draft) -> None:
    """One object is in every picture: where is it in the n-th."""
    n = draft.integer(min(draft.max_images, 3 if draft.level else 2), draft.max_images)
    counts = [max(1, draft.count() - 1) for _ in range(n)]
    shared = draft.combos(1)
    rest = draft.combos(sum(counts), shared, shared)
    pictures = [draft.place(shared + [rest.pop() for _ in range(k)]) for k in counts]
    if set.intersection(*({t.cls for t in things} for things in pictures)) != {shared[0][0]}:
        raise Retry  # another class in every picture could be meant
    for i, things in enumerate(pictures):
        background = draft.background()
        draft.add(render(background, draft.shuffled(things)), things)
        draft.ask(i, things[0].box, nth=i + 1)
    draft.ask_extra(1, 1)


# ---- two pictures alike but for one thing
def _change(draft: Draft, kinds: Sequence[str]) -> tuple[list[Thing], list[Thing]]:
    """Two lists of things alike but for number 0 (hidden where absent)."""
    specs = draft.combos(max(2, draft.count() + 1))
    before, kind = draft.place(specs), draft.pick(kinds)
    after = [replace(t) for t in before]
    before[0].hidden, after[0].hidden = kind == "add", kind == "remove"
    while kind in ("recolour", "swap") and after[0].key in specs:
        old, cls, colour = before[0], draft.integer(0, len(CLASSES) - 1), draft.integer(0, len(COLOURS) - 1)
        cls, colour = (old.cls, colour) if kind == "recolour" else (cls, old.colour)
        after[0] = thing(cls, colour, old.cx, old.cy, old.side, tint=old.tint)
    if not draft.inside(after[0].box) or any(overlaps(after[0].box, t.box) for t in after[1:]):
        raise Retry
    return before, after


def _diff(draft: Draft) -> None:
    """Find the difference: something came, went, or changed colour or shape."""
    before, after = _change(draft, ["add", "remove", "recolour", "swap"])
    background, a, b = draft.background(), before[0].box, after[0].box
    draft.add(render(background, before), before)
    brightness = draft.rng.uniform(0.94, 1.04) if draft.level == 2 else 1.0
    draft.add(render(background, after, brightness), after)
    draft.ask(1, (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    draft.ask_extra(1, 1)


def _view_diff(draft: Draft) -> None:
    """Find the difference although the view changed too."""
    before, after = _change(draft, ["add", "recolour", "swap"] * 2 + ["remove"])
    view = View(draft, before + after, (0.85, 1.15), 0.14, 0)
    background, seen = draft.background(), [view.move(t) for t in after]
    draft.add(render(background, before), before)
    draft.add(view.picture(background, seen), seen)
    draft.ask(1, seen[0].box)
    draft.ask_extra(1, 1)


# ---- an object marked in the first picture, asked for in a later one
def _ask_later(draft: Draft, pairs: Sequence[tuple[Track, int]]) -> None:
    """Up to six questions: the object at this box in the first picture, where is it in the n-th."""
    for track, n in draft.shuffled(pairs)[:6]:
        draft.ask(n, track[n].box, source=draft.box_text(track[0].box), nth=n + 1)
    draft.ask_extra(0, 1)


def _multi_view(draft: Draft) -> None:
    """The same things seen from elsewhere."""
    things = draft.place(draft.combos(draft.count()))
    background, views = draft.background(), [things]
    draft.add(render(background, things), things)
    for _ in range(draft.integer(1, draft.max_images - 1)):
        view = View(draft, things, (0.7, 1.35), 0.25, (0, 0.3, 0.5)[draft.level])
        views.append([view.move(t) for t in things])
        draft.add(view.picture(background, views[-1]), views[-1])
    _ask_later(draft, [(track, n) for track in zip(*views, strict=True) for n in range(1, len(views))])


def _path(draft: Draft, t: Thing, n: int, others: Sequence[Track]) -> Track:
    """A straight way for t through n pictures, clear of the other tracks."""
    for attempt in range(60):
        speed = draft.rng.uniform(4, (14, 20, 26)[draft.level] if attempt < 40 else 10) * draft.k
        angle, growth = draft.rng.uniform(0, 2 * math.pi), draft.rng.uniform(0.93, 1.08)
        track = []
        for i in range(n):
            cx, cy = t.cx + i * speed * math.cos(angle), t.cy + i * speed * math.sin(angle)
            track.append(thing(t.cls, t.colour, cx, cy, t.side * growth**i, tint=t.tint))
        if all(
            draft.inside(p.box) and not any(overlaps(p.box, other[i].box) for other in others)
            for i, p in enumerate(track)
        ):
            return track
    raise Retry


def _followable(track: Track, tracks: Sequence[Track]) -> bool:
    """True when no twin could be taken for this thing: each step is under half the way to any twin."""

    def distance(a: Thing, b: Thing) -> float:
        return math.hypot(a.cx - b.cx, a.cy - b.cy)

    twins = [other for other in tracks if other is not track and other[0].key == track[0].key]
    return all(
        2 * distance(track[i], track[i + 1]) < min(distance(track[i], twin[i + 1]), distance(twin[i], track[i + 1]))
        for twin in twins
        for i in range(len(track) - 1)
    )


def _object_tracking(draft: Draft) -> None:
    """Things on straight ways through three or more pictures."""
    n = draft.integer(min(3, draft.max_images), draft.max_images)
    specs, background = draft.combos(draft.count()), draft.background()
    if draft.level == 2 and draft.chance(0.3) and len(specs) < 6:
        specs.append(specs[0])  # a twin: only the motion tells them apart
    tracks: list[Track] = []
    for t in draft.place(specs):
        tracks.append(_path(draft, t, n, tracks))
    for things in zip(*tracks, strict=True):
        draft.add(render(background, things), things)
    _ask_later(draft, [(track, i) for track in tracks if _followable(track, tracks) for i in range(1, n)])


# ---- pictures of different kinds
def _region(draft: Draft) -> None:
    """Cut-outs of the first picture, enlarged: where were they cut."""
    things = draft.place(draft.combos(max(2, draft.count())))
    source = render(draft.background(), things)
    draft.add(source, things)
    targets = draft.shuffled(things)
    for i, t in enumerate(targets[: draft.integer(1, draft.max_images - 1)][:3]):
        margins = (draft.rng.uniform(0, 0.05 + 0.06 * draft.level, 4) * t.side).astype(int).tolist()
        x1, y1 = max(0, t.box[0] - margins[0]), max(0, t.box[1] - margins[1])
        x2, y2 = min(draft.width, t.box[2] + margins[2]), min(draft.height, t.box[3] + margins[3])
        draft.add(*_cut_out(draft, source, (x1, y1, x2, y2), things))
        draft.ask(0, (x1, y1, x2, y2), nth=i + 1)
    draft.ask_extra(0, 2)


def _cut_out(draft: Draft, source: np.ndarray, window: Box, things: Iterable[Thing]) -> tuple[np.ndarray, list[Thing]]:
    """A window of the source enlarged onto a grey picture, and the things seen in it."""
    width, height, (x, y, x2, y2) = draft.width, draft.height, window
    zoom = min(width / (x2 - x), height / (y2 - y))
    w, h = round((x2 - x) * zoom), round((y2 - y) * zoom)
    left, top = (width - w) // 2, (height - h) // 2
    picture = np.full_like(source, 128)
    enlarged = Image.fromarray(source).resize((w, h), Image.Resampling.BILINEAR, box=window)
    picture[top : top + h, left : left + w] = enlarged

    def across(v: float) -> float:
        return min(width, (v - x) * zoom + left)

    def down(v: float) -> float:
        return min(height, (v - y) * zoom + top)

    seen = []
    for t in things:
        part = max(t.box[0], x), max(t.box[1], y), min(t.box[2], x2), min(t.box[3], y2)
        if part[2] > part[0] and part[3] > part[1]:
            box = across(part[0]), down(part[1]), across(part[2]), down(part[3])
            seen.append(replace(t, box=box, visible=area(part) > 0.9 * area(t.box)))
    return picture, seen


def _refer_grounding(draft: Draft) -> None:
    """An object alone in the first picture is among others in the second."""
    keys = draft.combos(1)
    alone = draft.alone(keys[0])
    things = draft.place(keys + draft.combos(max(1, draft.count() - 1), keys, keys))
    draft.add(render(draft.background(plain=True), [alone]), [alone])
    draft.add(render(draft.background(), things), things)
    draft.ask(1, things[0].box)
    draft.ask_extra(2, 1)


def _correspondence(draft: Draft) -> None:
    """An object in a red frame: the one of its shape, in another colour, in the second picture."""
    order, colours = draft.shuffled(range(len(CLASSES))), range(len(COLOURS))
    classes = order[: draft.integer(2, (2, 3, 5)[draft.level])]
    first = draft.place([(c, draft.pick(colours)) for c in classes], margin=5)
    framed = first[0].colour
    specs = [(classes[0], draft.pick([c for c in colours if c != framed]))]
    specs += [(c, framed if draft.chance(0.3) else draft.pick(colours)) for c in classes[1:]]
    second = draft.place(specs)
    picture, (x1, y1, x2, y2) = Image.fromarray(render(draft.background(), first)), first[0].box
    frame = (max(0, x1 - 5), max(0, y1 - 5), min(draft.width - 1, x2 + 4), min(draft.height - 1, y2 + 4))
    ImageDraw.Draw(picture).rectangle(frame, outline=(255, 0, 0), width=3)
    draft.add(np.array(picture), first)
    draft.add(render(draft.background(), second), second)
    draft.ask(1, second[0].box)
    draft.ask_extra(2, 1)


def _reasoning_hits(kind: str, key: Key, things: Iterable[Thing]) -> list[Thing]:
    """Things that a reasoning question may mean, given what the first picture shows."""
    cls, colour = key
    if kind in ("largest", "smallest"):
        same = sorted((t for t in things if t.colour == colour), key=lambda t: t.side, reverse=kind == "largest")
        sides = sorted(t.side for t in same[:2])
        return same[:1] if len(same) > 1 and sides[1] >= 1.3 * sides[0] else []
    want = {"colour": (False, True), "shape": (True, False), "same": (True, True), "neither": (False, False)}[kind]
    return [t for t in things if (t.cls == cls, t.colour == colour) == want]


def _reasoning(draft: Draft) -> None:
    """What in the second picture shares colour, shape, both or neither with the object in the first."""
    key = draft.combos(1)[0]
    classes = draft.shuffled([c for c in range(len(CLASSES)) if c != key[0]])
    colours = draft.shuffled([c for c in range(len(COLOURS)) if c != key[1]])
    specs = [(classes.pop(), key[1]), (key[0], colours.pop())]
    if draft.chance(0.4):
        specs.append(key)
    if draft.level and draft.chance(0.4):  # two of the colour: the size decides
        specs.append((classes.pop(), key[1]))
    specs += [(classes.pop(), colours.pop()) for _ in range(draft.integer(0, 1 + draft.level))]
    alone, things = draft.alone(key), draft.place(specs)
    draft.add(render(draft.background(plain=True), [alone]), [alone])
    draft.add(render(draft.background(), things), things)
    for kind in draft.shuffled(list(REASONING)):
        hits = _reasoning_hits(kind, key, things)
        if len(hits) == 1:
            draft.ask(1, hits[0].box, question=draft.pick(REASONING[kind]))
    draft.ask_extra(1, 1)


_MAKERS: dict[str, Callable[[Draft], None]] = {
    "group_grounding": _group_grounding,
    "common_object": _common_object,
    "diff": _diff,
    "region": _region,
    "refer_grounding": _refer_grounding,
    "object_tracking": _object_tracking,
    "multi_view": _multi_view,
    "view_diff": _view_diff,
    "correspondence": _correspondence,
    "reasoning": _reasoning,
    "single": _single,
    "naming": _single,
}


def sample(
    rng: np.random.Generator,
    task: str,
    size: tuple[int, int] = (196, 196),
    max_images: int = 4,
    difficulty: float = 2,
) -> Sample:
    """Draws one set of pictures with its questions; the same state of rng gives the same set.

    task: one of TASKS or EASY_TASKS.   size: (H, W) in px, at least 140 each.   max_images: 2..6.
    difficulty: 0..2; a fraction is the chance of the next level.
    Raises ValueError on arguments out of range.
    """
    if task not in _MAKERS:
        raise ValueError(f"unknown task {task!r}; choose from {', '.join((*TASKS, *EASY_TASKS))}")
    if not 2 <= max_images <= 6 or min(size) < 140 or not 0 <= difficulty <= 2:
        raise ValueError(
            f"max_images {max_images}, size {tuple(size)}, difficulty {difficulty}: "
            "give 2..6 pictures of at least 140 px a side and a difficulty of 0..2"
        )
    for _ in range(500):
        level = min(2, int(difficulty) + int(rng.random() < difficulty % 1))
        draft = Draft(rng, task, size, max_images, level)
        try:
            _MAKERS[task](draft)
        except Retry:
            continue
        if any(not q.meta["aux"] for q in draft.questions):
            return draft.finish()
    raise RuntimeError(f"no scene for {task} at {size}; give larger pictures")
