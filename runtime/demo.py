"""`make demo`: puts the bundled questions to the embedded model and compares its boxes with the truth.

python -m migician.runtime.demo [--draw OUT.png]
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent / "examples"


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def _ask(example: dict[str, Any], draw: Path) -> bool:
    """Runs migician-run on one example and tells the story; False if it failed."""
    pictures = [str(EXAMPLES / name) for name in example["images"]]
    print(f"$ migician-run {shlex.join(example['images'])} {shlex.quote(example['prompt'])} --draw {draw}", flush=True)
    command = [sys.executable, "-m", "migician.runtime.run", *pictures, example["prompt"]]
    done = subprocess.run([*command, "--model", "nano", "--json", "--draw", str(draw)], stdout=subprocess.PIPE)
    if done.returncode:
        return False
    answer = json.loads(done.stdout)
    print(answer["text"])
    for box in answer["boxes"]:
        truths = [truth["xyxy"] for truth in example["boxes"] if truth["image"] == box["image"]]
        overlap = max((iou(box["xyxy"], truth) for truth in truths), default=0.0)
        corners = ", ".join(f"{value:.0f}" for value in box["xyxy"])
        print(f"  picture {box['image']}: ({corners})  score {box['score']:.2f}  IoU with the truth {overlap:.2f}")
    stats = answer["stats"]
    spent = sum(stats[name] for name in ("preprocess_ms", "vision_ms", "prefill_ms", "decode_ms"))
    print(f"  {spent:.0f} ms, {stats['peak_rss_mb']:.0f} MB at most; with boxes: {draw.resolve()}\n", flush=True)
    return True


def main(argv: Sequence[str]) -> int:
    """Runs every example; the first sheet goes to the path after --draw, the others to numbered ones beside it."""
    first = Path(argv[1]) if len(argv) == 2 and argv[0] == "--draw" else Path("demo.png")
    examples = json.loads((EXAMPLES / "examples.json").read_text("utf-8"))
    for number, example in enumerate(examples, 1):
        if not _ask(example, first if number == 1 else first.with_stem(f"{first.stem}-{number}")):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
