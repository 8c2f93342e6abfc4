"""Draws a stratified sample from a source of any size: equal shares of the tasks, of picture counts, of resolutions.

Every record has a priority, a hash of the seed and its content. Each stratum (task, number of pictures, resolution
class) keeps the places of its lowest ones while the source is read once; then the samples are shared out and the
chosen records read again, their pictures decoded. A chosen record whose picture fails is replaced by the next of its
stratum. So the result depends on the seed and the records, not on their order or how they are spread over files.
"""

import hashlib
import heapq
from collections.abc import Callable, Collection, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from .records import BadRecord, Example, Place, Source, Tally
from .store import Sample, resolution_of

__all__ = ["Drawn", "Stratum", "draw", "share_out", "shares"]

Stratum = tuple[str, int, str]  # task, number of pictures, resolution class
Ranked = tuple[int, Place]  # priority, lowest first
K = TypeVar("K", bound=Hashable)

_SPARE = 64  # replacements that a stratum keeps for records whose pictures do not decode


@dataclass(frozen=True)
class Drawn:
    """What draw() found: the samples in order of priority, and what was met on the way."""

    samples: list[Sample]
    tally: Tally


def _priority(seed: int, key: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, person=b"calib", salt=_salt(seed)).digest(), "big")


def _salt(seed: int) -> bytes:
    return hashlib.blake2b(str(seed).encode(), digest_size=16).digest()


def shares(capacity: Mapping[K, int], total: int, seed: int) -> dict[K, int]:
    """Shares total out over keys as equally as their capacities allow.

    Two shares differ by more than 1 only where the smaller is its capacity. Who gets one more is drawn from the seed,
    and no order of the keys changes it.
    """
    given = dict.fromkeys(capacity, 0)
    order = sorted(capacity, key=lambda key: _priority(seed, repr(key).encode()))
    while total > 0 and (open_ := [key for key in order if given[key] < capacity[key]]):
        each = max(1, total // len(open_))
        for key in open_[:total]:
            more = min(each, capacity[key] - given[key])
            given[key] += more
            total -= more
    return given


def share_out(capacity: Mapping[Stratum, int], total: int, seed: int) -> dict[Stratum, int]:
    """Shares total out over the tasks, a task's share over its picture counts, and theirs over the resolutions."""
    return _share_level(capacity, total, seed, 0)


def _share_level(capacity: Mapping[Stratum, int], total: int, seed: int, level: int) -> dict[Stratum, int]:
    if level == 3:
        (stratum,) = capacity
        return {stratum: total}
    groups: dict[str | int, dict[Stratum, int]] = {}
    for stratum, n in capacity.items():
        groups.setdefault(stratum[level], {})[stratum] = n
    sizes = {key: sum(group.values()) for key, group in groups.items()}
    result: dict[Stratum, int] = {}
    for key, share in shares(sizes, total, seed).items():
        result |= _share_level(groups[key], share, seed, level + 1)
    return result


def _collect(
    source: Source, limit: int, seed: int, tasks: Collection[str], tally: Tally, progress: Callable[[int], None] | None
) -> dict[Stratum, list[Ranked]]:
    """Reads the source once; returns the limit lowest of each stratum, lowest first."""
    heaps: dict[Stratum, list[tuple[int, tuple[int, int], Place]]] = {}
    for place, record, sizes in source.records(tally, tasks=tasks, progress=progress):
        heap = heaps.setdefault((record.task, len(sizes), resolution_of(sizes)), [])
        item = -_priority(seed, record.key), (-place.file, -place.start), place
        if len(heap) < limit:
            heapq.heappush(heap, item)
        else:
            heapq.heappushpop(heap, item)
    return {stratum: sorted((-p, place) for p, _, place in heap) for stratum, heap in heaps.items()}


def _check(source: Source, place: Place, tally: Tally) -> Sample | None:
    """The sample at a place, or None with its reason in the tally."""
    file = source.file_name(place)
    try:
        record = source.load(place)
    except BadRecord as bad:
        tally.skip(bad.reason, Example(file, place.number, bad.detail))
        return None
    images: list[Path | np.ndarray] = [Path(image) for image in record.images]
    return Sample(record.task, images, list(record.turns), record.id or f"{file}:{place.number}", file)


def draw(
    source: Source,
    samples: int,
    seed: int,
    *,
    tasks: Collection[str] = (),
    reading: Callable[[int], None] | None = None,
    checking: Callable[[int], None] | None = None,
) -> Drawn:
    """Draws up to so many samples of some tasks (all when empty); fewer where the source has not enough.

    reading: called with the number of bytes read.   checking: with the number of samples found sound.
    Memory: the places of at most samples + 64 records per stratum, the ids' hashes, and one record.
    """
    tally, found = Tally(), dict[Place, Sample]()
    strata = _collect(source, samples + _SPARE, seed, tasks, tally, reading)
    while True:
        given = share_out({s: len(ranked) for s, ranked in strata.items()}, samples, seed) if strata else {}
        chosen = sorted(one for stratum, n in given.items() for one in strata[stratum][:n])
        bad = set()
        for _, place in chosen:
            if place in found:
                continue
            one = _check(source, place, tally)
            if one is None:
                bad.add(place)
                continue
            found[place] = one
            if checking:
                checking(min(len(found), samples))
        if not bad:
            return Drawn([found[place] for _, place in chosen], tally)
        strata = {s: kept for s, ranked in strata.items() if (kept := [one for one in ranked if one[1] not in bad])}
