"""Training settings: a YAML file, and `key=value` words that go before it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ...calib.scenes import EASY_TASKS, TASKS
from .losses import DEFAULT_WEIGHTS
from .model import NanoConfig

__all__ = ["Settings", "Stage", "read_settings"]


@dataclass(frozen=True)
class Stage:
    """One part of the recipe. The learning rate rises over `warmup` steps and falls to 5 % over the last share `decay`.

    tasks: task -> how often its scenes come.   branches: questions per scene.   loss: weights other than losses.py's.
    vision_only: the vision tower alone, on the losses of its cells.   freeze_vision: the language model alone.
    """

    name: str
    steps: int
    tasks: Mapping[str, float]
    batch: int = 12
    branches: int = 6
    corrupt: float = 0.2
    vision_only: bool = False
    freeze_vision: bool = False
    muon_lr: float = 3e-3
    adam_lr: float = 2e-3
    warmup: int = 100
    decay: float = 0.35
    loss: Mapping[str, float] = field(default_factory=dict)

    def rate(self, step: int) -> float:
        """The learning rate's factor at a step."""
        falling = (1 - step / self.steps) / max(self.decay, 1e-6)
        return min(1.0, (step + 1) / self.warmup) * min(1.0, max(0.05, falling))


@dataclass(frozen=True)
class Settings:
    """A whole run. out: its folder.   init: a state to start from.   first: the stage to begin with, by name.

    save_every, log_every: steps.
    """

    out: str
    stages: tuple[Stage, ...]
    seed: int = 1
    init: str = ""
    first: str = ""
    device: str = "auto"
    threads: int = 0
    workers: int = 1
    max_images: int = 3
    difficulty: float = 1
    save_every: int = 200
    log_every: int = 5
    model: NanoConfig = field(default_factory=NanoConfig)


def _override(values: dict[str, Any], words: Sequence[str]) -> None:
    """Applies `key=value`; a dotted key goes into a table, or into the stage of that name or number."""
    import yaml

    for word in words:
        key, equals, text = word.partition("=")
        *path, last = key.split(".")
        if not equals or not last:
            raise ValueError(f"{word!r} is not key=value")
        place: Any = values
        for part in path:
            if isinstance(place, list):
                names = [str(stage.get("name")) for stage in place]
                index = names.index(part) if part in names else int(part) if part.isdigit() else len(place)
                if index >= len(place):
                    raise ValueError(f"{key}: no stage {part!r}; there are {', '.join(names)}")
                place = place[index]
            else:
                place = place.setdefault(part, {})
            if not isinstance(place, (dict, list)):
                raise ValueError(f"{key}: {part!r} holds no further settings")
        place[last] = yaml.safe_load(text)


def _check(kind: type, values: Mapping[str, Any], where: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected settings by name")
    if unknown := sorted(values.keys() - {entry.name for entry in fields(kind)}):
        raise ValueError(f"{where}: no such setting: {', '.join(unknown)}")


def _stage(values: Mapping[str, Any], number: int) -> Stage:
    where = f"stages.{number}"
    _check(Stage, values, where)
    if missing := [name for name in ("name", "steps", "tasks") if name not in values]:
        raise ValueError(f"{where}: {', '.join(missing)} is missing")
    stage = Stage(**values)
    if unknown := sorted(stage.tasks.keys() - {*TASKS, *EASY_TASKS}):
        raise ValueError(f"{where}.tasks: no such task: {', '.join(unknown)}")
    if unknown := sorted(stage.loss.keys() - DEFAULT_WEIGHTS.keys()):
        raise ValueError(f"{where}.loss: no such loss: {', '.join(unknown)}")
    if stage.steps < 1 or stage.batch < 1 or stage.branches < 1 or stage.warmup < 1:
        raise ValueError(f"{where}: steps, batch, branches and warmup start at 1")
    return stage


def read_settings(path: Path, words: Sequence[str] = ()) -> Settings:
    """Reads a YAML file and applies the words. Raises ValueError with the place of whatever does not fit."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected settings by name")
    _override(values, words)
    _check(Settings, values, str(path))
    if not values.get("out") or not values.get("stages"):
        raise ValueError(f"{path}: out and stages are needed")
    stages = tuple(_stage(stage, i) for i, stage in enumerate(values.pop("stages")))
    if len({stage.name for stage in stages}) < len(stages):
        raise ValueError(f"{path}: two stages of one name")
    if values.get("first") and values["first"] not in {stage.name for stage in stages}:
        raise ValueError(f"{path}: first: no stage {values['first']!r}")
    model = NanoConfig.from_dict(values.pop("model", None) or {})
    return Settings(**values, stages=stages, model=model)
