"""The training loop: stages one after the other, resumable after every kind of end.

A run lives in a folder:

    last.pt            weights, heads, optimizers and counters; whole at any moment
    metrics.jsonl      one JSON object per line
    STAGE.safetensors  the state after each finished stage, what export.py takes

Batches are functions of (seed, number), so a run that was cut off goes on to the same weights as one that was not.
"""

import io
import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ...calib.scenes import Sample, iter_batches, texts
from ...runtime.files.write import remove_leftovers, whole_file
from .losses import DEFAULT_WEIGHTS, Heads, Measured, measure
from .model import NanoModel, position_init
from .muon import Muon
from .packing import PackOptions, pack
from .settings import Settings, Stage
from .state import State, load_state, save_state
from .vocabulary import Vocabulary

__all__ = ["Trainer", "bf16_pays"]

_SEED_STEP = 1000  # every stage draws from a stream of its own


def bf16_pays(device: torch.device) -> bool:
    """Tells whether bf16 arithmetic is faster than fp32: on GPUs, and on CPUs with instructions for it."""
    if device.type == "cuda":
        return True
    cpu: Any = torch.cpu
    return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())


class Trainer:
    """One run. report(stage, step, figures) is called after every step."""

    def __init__(
        self, settings: Settings, report: Callable[[Stage, int, dict[str, float]], None] | None = None
    ) -> None:
        self.settings, self.report = settings, report or (lambda stage, step, figures: None)
        torch.manual_seed(settings.seed)
        if settings.threads:
            torch.set_num_threads(settings.threads)
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(auto if settings.device == "auto" else settings.device)
        self.folder = Path(settings.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.folder)
        names = [stage.name for stage in settings.stages]
        self.stage = names.index(settings.first) if settings.first else 0
        self.step, self.sets, self.seconds = 0, 0, 0.0
        self.stopped = False
        self.optimizers: list[torch.optim.Optimizer] = []
        self._waiting: list[dict[str, Any]] = []  # optimizer states of a checkpoint, until the optimizers exist
        self._build()

    # ---- start
    def _build(self) -> None:
        """Model and heads: from last.pt, from the state `init`, or new."""
        last = self.folder / "last.pt"
        kept = torch.load(last, map_location="cpu", weights_only=True) if last.exists() else None
        state = load_state(self.settings.init) if self.settings.init and kept is None else None
        config = state.config if state else self.settings.model
        pieces = kept["pieces"] if kept else state.pieces if state else None
        self.vocabulary = Vocabulary(pieces) if pieces else Vocabulary.from_texts(texts())
        if len(self.vocabulary) > config.vocab:
            raise ValueError(f"model.vocab {config.vocab} is below the {len(self.vocabulary)} pieces of the scenes")
        self.model, self.heads = NanoModel(config), Heads(config)
        self.history: dict[str, Any] = dict(state.history) if state else {}
        if kept:
            self._restore(kept)
        elif state:
            self.model.load_state_dict(state.model)
            self.heads.load_state_dict(state.heads, strict=False)
        else:
            position_init(self.model)
        self.model.to(self.device)
        self.heads.to(self.device)

    def _restore(self, kept: dict[str, Any]) -> None:
        if kept["config"] != self.model.config.to_dict():
            raise ValueError(f"{self.folder}/last.pt is of another model; choose another `out` or remove it")
        self.model.load_state_dict(kept["model"])
        self.heads.load_state_dict(kept["heads"])
        self.stage, self.step, self.sets, self.seconds = (kept[name] for name in ("stage", "step", "sets", "seconds"))
        self.history, self._waiting = kept["history"], kept["optimizers"]

    def save(self) -> None:
        """Writes last.pt; it is complete under its name at any moment."""
        content = {
            "model": self.model.state_dict(), "heads": self.heads.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "stage": self.stage, "step": self.step, "sets": self.sets, "seconds": self.seconds,
            "history": self.history, "config": self.model.config.to_dict(), "pieces": self.vocabulary.pieces,
        }  # fmt: skip
        buffer = io.BytesIO()
        torch.save(content, buffer)  # on its own it would say "unexpected pos" of a full disk
        with whole_file(self.folder / "last.pt", advice="free some space and run the same command again") as file:
            file.write(buffer.getbuffer())

    # ---- run
    def run(self) -> bool:
        """Trains what is left of the stages; returns False when stop() ended it before."""
        while self.stage < len(self.settings.stages):
            stage = self.settings.stages[self.stage]
            self._run_stage(stage)
            if self.stopped:
                self.save()
                return False
            self.history[stage.name] = {"steps": stage.steps, "batch": stage.batch, "tasks": dict(stage.tasks)}
            self.history.update(sets=self.sets, minutes=round(self.seconds / 60, 1), seed=self.settings.seed)
            parts = self.model.state_dict(), self.heads.state_dict()
            state = State(self.model.config, self.vocabulary.pieces, *parts, self.history)
            save_state(self.folder / f"{stage.name}.safetensors", state)
            self.stage, self.step, self.optimizers = self.stage + 1, 0, []
            self.save()
        return True

    def stop(self) -> None:
        """Asks run() to save and return after the step under way."""
        self.stopped = True

    def _run_stage(self, stage: Stage) -> None:
        trained = self._choose_parameters(stage)
        self._make_optimizers(stage, trained)
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        started, first = time.monotonic() - self.seconds, True
        batches = self._batches(stage)
        try:
            while self.step < stage.steps and not self.stopped:
                for optimizer, bases in zip(self.optimizers, rates, strict=True):
                    for group, base in zip(optimizer.param_groups, bases, strict=True):
                        group["lr"] = base * stage.rate(self.step)
                figures = self._train(stage, next(batches), trained)
                self.step, self.sets, self.seconds = self.step + 1, self.sets + stage.batch, time.monotonic() - started
                self._log(stage, figures)
                self.report(stage, self.step, figures)
                if self.step % self.settings.save_every == 0 and self.step < stage.steps:
                    self._rest(rates)
                    self.save()
                first = False
        finally:
            batches.close()
            if not first:
                self._rest(rates)

    def _rest(self, rates: list[list[float]]) -> None:
        """Puts the full learning rates back, so that a checkpoint holds those."""
        for optimizer, bases in zip(self.optimizers, rates, strict=True):
            for group, base in zip(optimizer.param_groups, bases, strict=True):
                group["lr"] = base

    def _choose_parameters(self, stage: Stage) -> list[tuple[str, nn.Parameter]]:
        named = [*self.model.named_parameters(), *self.heads.named_parameters(prefix="heads")]
        for name, parameter in named:
            vision = "visual" in name or name.startswith("heads.vis")
            parameter.requires_grad_(vision if stage.vision_only else not (stage.freeze_vision and vision))
        return [(name, parameter) for name, parameter in named if parameter.requires_grad]

    def _make_optimizers(self, stage: Stage, trained: list[tuple[str, nn.Parameter]]) -> None:
        """Muon for the matrices of both towers, AdamW for everything else."""

        def of_muon(name: str, parameter: nn.Parameter) -> bool:
            inside = any(part in name for part in ("layers.", "blocks.", "merger."))
            return parameter.dim() == 2 and inside and not name.startswith("heads")

        rest = [p for name, p in trained if not of_muon(name, p)]
        groups = [
            {"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.02},
            {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
        ]
        muon = Muon([p for name, p in trained if of_muon(name, p)], lr=stage.muon_lr)
        self.optimizers = [muon, torch.optim.AdamW(groups, lr=stage.adam_lr, betas=(0.9, 0.98))]
        for optimizer, state in zip(self.optimizers, self._waiting, strict=False):
            optimizer.load_state_dict(state)
        self._waiting = []

    def _batches(self, stage: Stage) -> Any:
        c, s = self.model.config, self.settings
        stream = s.seed + _SEED_STEP * self.stage
        return iter_batches(
            stream, stage.batch, stage.tasks, (c.size, c.size), s.max_images,
            workers=s.workers, difficulty=s.difficulty, start=self.step,
        )  # fmt: skip

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if bf16_pays(self.device) else nullcontext()

    def _train(self, stage: Stage, scenes: list[Sample], trained: list[tuple[str, nn.Parameter]]) -> dict[str, float]:
        """One step; returns its figures."""
        if stage.vision_only:
            scenes = [{**scene, "qas": []} for scene in scenes]
        rng = np.random.default_rng([self.settings.seed, self.stage, self.step, 1])
        options = PackOptions(stage.branches, stage.corrupt)
        batch = pack(scenes, self.vocabulary, self.model.config.grid, rng, options).to(self.device)
        with self._precision():
            measured = measure(self.model, self.heads, batch, vision_only=stage.vision_only)
        loss = self._weigh(stage, measured)
        loss.backward()
        norm = nn.utils.clip_grad_norm_([parameter for _, parameter in trained], 1.0)
        if not torch.isfinite(norm):
            raise RuntimeError(f"stage {stage.name}, step {self.step}: the loss is not a number; lower the rates")
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        figures = {name: float(value.detach()) for name, value in measured.losses.items()}
        return {"loss": float(loss.detach()), **figures, **measured.watched, "gradient": float(norm)}

    def _weigh(self, stage: Stage, measured: Measured) -> torch.Tensor:
        weights = {**DEFAULT_WEIGHTS, **stage.loss}
        total = [weights[name] * value for name, value in measured.losses.items()]
        return torch.stack([value.float() for value in total]).sum()

    def _log(self, stage: Stage, figures: dict[str, float]) -> None:
        if self.step % self.settings.log_every and self.step != stage.steps:
            return
        row = {"stage": stage.name, "step": self.step, "sets": self.sets, "seconds": round(self.seconds, 1)}
        row.update({name: round(value, 4) for name, value in figures.items()})
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
