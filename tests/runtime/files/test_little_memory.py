"""Opening a model where the address space is nearly full: one line of our own, never a library's abort."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

pytestmark = pytest.mark.slow

PIECES = 100_000
LIMITS_MB = (1, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 200, 1000)

# One process with everything imported forks a child for each limit; each says what became of it.
CODE = """
import os, resource, sys, tokenizers
from migician.runtime.errors import MigicianError
from migician.runtime.model import load
from migician.runtime.prompt import Vocabulary
import migician.runtime.backends.native
for limit in map(int, sys.argv[2:]):
    sys.stdout.flush()
    if (child := os.fork()) == 0:
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (limit << 20), resource.RLIM_INFINITY))
        try:
            load(sys.argv[1], threads=1).close()
            print(limit, "opened")
        except MigicianError as error:
            print(limit, type(error).__name__, str(error))
        sys.stdout.flush()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print(limit, "died", status)
"""


@pytest.fixture(scope="module")
def bulky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a large vocabulary, whose tokenizer takes more memory than its weights."""
    folder = make_checkpoint(
        tmp_path_factory.mktemp("bulky") / "model", vocab=PIECES + 320, hidden=32, heads=2, v_dim=32
    )
    table = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocab = table["model"]["vocab"]
    table["model"]["vocab"] |= {f"piece {i} of many, long enough": len(vocab) + i for i in range(PIECES)}
    table["added_tokens"] = [{**token, "id": token["id"] + PIECES} for token in table["added_tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(table), "utf-8")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {key: number + PIECES for key, number in config.items() if key.endswith("_token_id")}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["folder", "mig"])
def test_little_address_space(bulky: Path, tmp_path: Path, kind: str) -> None:
    from migician.runtime.files.mig import write_mig
    from migician.runtime.files.open import open_checkpoint

    source = bulky
    if kind == "mig":
        source = tmp_path / "bulky.mig"
        with open_checkpoint(bulky) as model:
            write_mig(source, model)
    command = [sys.executable, "-c", CODE, str(source), *map(str, LIMITS_MB)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(LIMITS_MB), done.stdout + done.stderr
    ends = [line.split()[1] for line in lines]
    assert set(ends) == {"OutOfMemory", "opened"}, done.stdout
    assert ends == sorted(ends), done.stdout  # from some limit on it opens
    for line in lines[: ends.index("opened")]:
        assert source.name in line and ("memory" in line or "address space" in line), line
