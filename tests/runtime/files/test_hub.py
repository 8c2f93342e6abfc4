"""Models by hub id from the local cache: which revision is meant, what is said of one that is not whole. No network."""

import shutil
from pathlib import Path

import pytest
from checkpoints import make_checkpoint
from click.testing import CliRunner

from migician.runtime.errors import MigicianError
from migician.runtime.files.describe import describe, describe_line, describe_text
from migician.runtime.files.hub_cache import find_in_cache, hub_cache, parse_name, revision_of
from migician.runtime.files.open import open_checkpoint

OLD, NEW, NEAR = "0123456789abcdef0123456789abcdef01234567", "89" * 20, "0123" + "f" * 36
PLACES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("hub") / "model", shards=2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a device without a network."""
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def place(cache: Path, model: Path, commit: str, *refs: str, repo: str = "Org/Tiny-VL") -> Path:
    """Puts a model into the cache as huggingface_hub does; returns the snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    for file in model.iterdir():
        shutil.copy(file, root / "blobs" / f"{commit[:4]}-{file.name}")
        (snapshot / file.name).symlink_to(f"../../blobs/{commit[:4]}-{file.name}")
    for ref in refs:
        (root / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
        (root / "refs" / ref).write_text(commit)
    return snapshot


def opened(word: str) -> tuple[str, str | None]:
    """(what the model is called, its commit)."""
    with open_checkpoint(word) as checkpoint:
        found = describe(checkpoint)
        assert checkpoint.tensors
    return found["name"], found["revision"]


def refused(word: str) -> str:
    with pytest.raises(MigicianError) as caught:
        open_checkpoint(word)
    message = str(caught.value)
    assert message.isprintable() and "; " in message and len(message) < 900, message  # long paths, named three times
    return message


@pytest.mark.parametrize(
    ("word", "repo", "revision"),
    [
        ("Qwen/Qwen2-VL-7B-Instruct", "Qwen/Qwen2-VL-7B-Instruct", ""),
        ("Michael4933/Migician@main", "Michael4933/Migician", "main"),
        ("a/b@v1.0", "a/b", "v1.0"),
        ("a/b@feature/x", "a/b", "feature/x"),
        ("a/b@refs/pr/3", "a/b", "refs/pr/3"),
        (f"a/b@{OLD}", "a/b", OLD),
        ("org/Qwen2.5-VL", "org/Qwen2.5-VL", ""),
    ],
)
def test_names_of_the_hub(word: str, repo: str, revision: str) -> None:
    name = parse_name(word)
    assert name is not None
    assert (name.repo, name.revision) == (repo, revision)


NO_NAMES = """../x a/../b a/.. ./a/b /a/b a/b/c a//b a~/b ~a/b a/b@ a/b@../../x a/b@x/../y a/b@/etc a/b@x//y a/b@.hidden
    -a/b a/-b a--b/c a/b--c a/b. models/foo.mig models/foo.safetensors models/foo.gguf runs/answers.jsonl a/b.git a\\b
    gpt2"""


@pytest.mark.parametrize("word", [*NO_NAMES.split(), "", "a/b\n", "a/b@x\n", "a/b@x\ny", "a/b c", "ä/b"])
def test_what_is_no_name_of_the_hub(word: str) -> None:
    assert parse_name(word) is None


def test_main_is_taken_without_a_word_about_the_revision(cache: Path, model: Path) -> None:
    place(cache, model, OLD, "main")
    place(cache, model, NEW)
    assert opened("Org/Tiny-VL") == ("Org/Tiny-VL", OLD)
    assert opened("Org/Tiny-VL@main") == ("Org/Tiny-VL@main", OLD)


def test_the_only_revision_is_taken_and_named(cache: Path, model: Path) -> None:
    place(cache, model, OLD)
    assert opened("Org/Tiny-VL") == (f"Org/Tiny-VL@{OLD[:12]}", OLD)


def test_a_pinned_revision_without_main(cache: Path, model: Path) -> None:
    place(cache, model, OLD, "v1.0")
    assert opened("Org/Tiny-VL") == (f"Org/Tiny-VL@{OLD[:12]}", OLD)
    assert opened("Org/Tiny-VL@v1.0") == ("Org/Tiny-VL@v1.0", OLD)


def test_several_revisions_without_main_are_listed(cache: Path, model: Path) -> None:
    for commit, ref in ((OLD, "v1.0"), (NEW, "refs/pr/3"), (NEAR, "")):
        place(cache, model, commit, *[ref] * bool(ref))
    message = refused("Org/Tiny-VL")
    names = ["Org/Tiny-VL@v1.0", "Org/Tiny-VL@refs/pr/3", f"Org/Tiny-VL@{NEAR[:12]}"]
    for name, commit in zip(names, (OLD, NEW, NEAR), strict=True):
        assert name in message
        assert opened(name) == (name, commit)


def test_what_another_tool_left_in_part_is_no_revision_to_choose(cache: Path, model: Path) -> None:
    place(cache, model, OLD)
    for file in place(cache, model, NEW).iterdir():  # as transformers' AutoConfig does
        if file.name != "config.json":
            file.unlink()
    assert opened("Org/Tiny-VL") == (f"Org/Tiny-VL@{OLD[:12]}", OLD)


@pytest.mark.parametrize("word", [OLD, OLD[:12], OLD[:5], OLD[:7].upper(), NEW[:4], "v2", "branch/of/mine"])
def test_revisions_by_commit_branch_and_tag(cache: Path, model: Path, word: str) -> None:
    place(cache, model, OLD, "main")
    place(cache, model, NEW, "v2", "branch/of/mine")
    place(cache, model, NEAR)
    commit = OLD if word.lower() in OLD else NEW
    assert opened(f"Org/Tiny-VL@{word}") == (f"Org/Tiny-VL@{word}", commit)


def test_a_commit_cut_too_short_is_ambiguous(cache: Path, model: Path) -> None:
    place(cache, model, OLD, "main")
    place(cache, model, NEAR)
    message = refused("Org/Tiny-VL@0123")
    assert "Org/Tiny-VL@main" in message and f"Org/Tiny-VL@{NEAR[:12]}" in message
    refused("Org/Tiny-VL@012")  # three digits are no commit
    refused("Org/Tiny-VL@0123456789abd")


@pytest.mark.parametrize("ref", ["../../../..", "..", "", "a b", "\0", "snapshots/x"])
def test_a_ref_that_leads_elsewhere_is_not_followed(cache: Path, model: Path, ref: str) -> None:
    place(cache, model, OLD, "main")
    (cache / "models--Org--Tiny-VL" / "refs" / "main").write_text(ref)
    for folder in (cache / "models--Org--Tiny-VL", cache.parent, cache):
        shutil.copytree(model, folder, dirs_exist_ok=True)
    message = refused("Org/Tiny-VL")
    assert "not in the Hugging Face cache" in message and f"Org/Tiny-VL@{OLD[:12]}" in message


def test_a_main_that_never_arrived_is_not_replaced_by_another(cache: Path, model: Path) -> None:
    place(cache, model, OLD, "main")
    (cache / "models--Org--Tiny-VL" / "refs" / "main").write_text(NEW)
    assert "hf download Org/Tiny-VL" in refused("Org/Tiny-VL")
    assert opened(f"Org/Tiny-VL@{OLD}")[1] == OLD


PARTS = ["model-00002-of-00002.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"]


@pytest.mark.parametrize("gone", [*PARTS, "preprocessor_config.json"])
@pytest.mark.parametrize("how", ["link", "blob"])
def test_a_copy_that_lacks_something(cache: Path, model: Path, gone: str, how: str) -> None:
    link = place(cache, model, OLD, "main") / gone
    (link if how == "link" else link.resolve()).unlink()
    message = refused("Org/Tiny-VL")
    assert f"lacks {gone}" in message and "hf download Org/Tiny-VL" in message and "cut off" not in message
    (cache / "models--Org--Tiny-VL" / "blobs" / "1234.incomplete").touch()
    assert "cut off" in refused("Org/Tiny-VL")
    assert "hf download Org/Tiny-VL --revision 0123" in refused("Org/Tiny-VL@0123")


def test_weights_of_another_kind_are_not_taken_for_missing(cache: Path, model: Path) -> None:
    snapshot = place(cache, model, OLD, "main")
    for file in snapshot.glob("model*"):
        file.unlink()
    (snapshot / "pytorch_model.bin").touch()
    assert "convert" in refused("Org/Tiny-VL")


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PLACES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DISK", str(tmp_path / "disk"))
    assert hub_cache() == tmp_path / ".cache/huggingface/hub"
    for name, value, place in [
        ("XDG_CACHE_HOME", "~/xdg", "xdg/huggingface/hub"),
        ("HF_HOME", "$DISK/hf", "disk/hf/hub"),
        ("HUGGINGFACE_HUB_CACHE", "~/old", "old"),
        ("HF_HUB_CACHE", "$DISK/new", "disk/new"),
    ]:
        monkeypatch.setenv(name, value)
        assert hub_cache() == tmp_path / place
    monkeypatch.setenv("HF_HUB_CACHE", "")
    assert hub_cache() == tmp_path / "old"


def test_find_in_cache(cache: Path, model: Path) -> None:
    assert find_in_cache("Org/Tiny-VL") is None
    snapshot = place(cache, model, OLD)
    place(cache, model, OLD, repo="Org/Other")
    assert find_in_cache("Org/Tiny-VL") == find_in_cache("Org/Tiny-VL@0123") == snapshot
    assert find_in_cache("../Org/Tiny-VL") is find_in_cache("Org/Tiny-VL@v9") is None
    place(cache, model, NEW)
    assert find_in_cache("Org/Tiny-VL") is None


def test_the_revision_is_shown(cache: Path, model: Path) -> None:
    snapshot = place(cache, model, OLD, "main")
    with open_checkpoint("Org/Tiny-VL") as checkpoint:
        found = describe(checkpoint)
    assert describe_line(found).startswith(f"model Org/Tiny-VL (revision {OLD}): bf16")
    assert f"revision       {OLD}" in describe_text(found).splitlines()
    with open_checkpoint(snapshot) as checkpoint:  # by its path
        assert checkpoint.name == f"Org/Tiny-VL@{OLD[:12]}"
    with open_checkpoint(model) as checkpoint:
        found = describe(checkpoint)
    assert found["revision"] is None and "revision" not in describe_line(found) + describe_text(found)
    assert revision_of(snapshot / "config.json") == OLD and revision_of(model) is None


def test_stats_show_the_revision(cache: Path, model: Path) -> None:
    from migician.runtime.run import command

    place(cache, model, OLD)
    words = ["--model", "Org/Tiny-VL", "--stats", "--max-new-tokens", "2", "What is this?"]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert f"model Org/Tiny-VL@{OLD[:12]} (revision {OLD})" in done.stderr
