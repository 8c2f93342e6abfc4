"""Drawn scenes: sets of pictures with flat coloured shapes, and MIG-Bench's questions about them.

sample          one set of pictures with its questions, from a numpy Generator
iter_batches    sets without end, drawn ahead by child processes
held_out        the questions that reported numbers are measured on
write_dataset   sets on disk in MGrounding-630k's layout
"""

from .dataset import HeldOut, held_out, write_dataset
from .layout import Meta, ObjectRecord, Question, Sample
from .sprites import CLASSES, COLOURS, Box, iou
from .stream import HELD_OUT_SEED, iter_batches
from .tasks import sample
from .wordings import EASY_TASKS, ORDINALS, TASKS, format_box, parse_box, texts

__all__ = [
    "CLASSES",
    "COLOURS",
    "EASY_TASKS",
    "HELD_OUT_SEED",
    "ORDINALS",
    "TASKS",
    "Box",
    "HeldOut",
    "Meta",
    "ObjectRecord",
    "Question",
    "Sample",
    "format_box",
    "held_out",
    "iou",
    "iter_batches",
    "parse_box",
    "sample",
    "texts",
    "write_dataset",
]
