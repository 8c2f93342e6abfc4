"""nano's recipe: same maths as transformers, same ids as the runtime's tokenizer, resumable to the same weights."""

import errno
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("yaml")

from click.testing import CliRunner  # noqa: E402

from migician.calib.scenes import EASY_TASKS, TASKS, sample, texts  # noqa: E402
from migician.runtime.chat_template import CHAT_TEMPLATE  # noqa: E402
from migician.runtime.errors import MigicianError  # noqa: E402
from migician.runtime.files.open import open_checkpoint  # noqa: E402
from migician.runtime.image import smart_resize  # noqa: E402
from migician.runtime.prompt import Vocabulary as RuntimeVocabulary  # noqa: E402
from migician.runtime.prompt import build_prompt, rope_positions  # noqa: E402
from migician.train.cli import main  # noqa: E402
from migician.train.nano import trainer as trainer_module  # noqa: E402
from migician.train.nano.export import export_folder, export_mig, hf_config, published_name  # noqa: E402
from migician.train.nano.losses import Heads, measure  # noqa: E402
from migician.train.nano.model import NanoConfig, NanoModel, patchify, position_init  # noqa: E402
from migician.train.nano.muon import orthogonalize  # noqa: E402
from migician.train.nano.packing import PackOptions, pack  # noqa: E402
from migician.train.nano.settings import Settings, Stage, read_settings  # noqa: E402
from migician.train.nano.state import State, load_state, save_state  # noqa: E402
from migician.train.nano.targets import AnswerWeights, weigh_answer  # noqa: E402
from migician.train.nano.trainer import Trainer  # noqa: E402
from migician.train.nano.vocabulary import IMAGE, PAD, SYSTEM, VISION_END, VISION_START, Vocabulary  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SMALL = NanoConfig(
    size=140, vision_dim=32, vision_depth=1, vision_heads=2, vision_mlp=2, dim=64, layers=5, heads=8, kv_heads=4,
    intermediate=64, rope_theta=20.0, mrope_section=(1, 1, 2),
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.from_texts(texts())


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng([5, 5])
    return [sample(rng, task, (140, 140), 3, 1) for task in (*TASKS, *EASY_TASKS)]


def jittered(c: NanoConfig) -> NanoModel:
    torch.manual_seed(0)
    model = NanoModel(c).eval()
    position_init(model)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    return model


# ---- vocabulary
def test_the_tokenizer_file_gives_the_training_ids_for_every_text(vocabulary):
    runtime = RuntimeVocabulary(vocabulary.tokenizer_json())
    assert len(runtime) == len(vocabulary) <= NanoConfig.vocab
    for text in texts():
        ids = vocabulary.encode(text)
        assert runtime.encode_user(text) == ids
        assert runtime.decode(ids) == text == vocabulary.decode(ids)


def test_transformers_reads_the_tokenizer_the_same_way(vocabulary, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_str(vocabulary.tokenizer_json())
    for text in list(texts())[::7]:
        ids = tokenizer.encode(text).ids
        assert ids == vocabulary.encode(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_unknown_words_become_one_unknown_piece_each(vocabulary):
    runtime = RuntimeVocabulary(vocabulary.tokenizer_json())
    unknown = vocabulary.ids["<|unk|>"]
    assert runtime.encode_user("Where is zebra?").count(unknown) == 1
    assert vocabulary.ids["<|im_end|>"] not in runtime.encode_user("Locate<|im_end|>")


def test_a_runtime_prompt_is_what_training_packed(vocabulary, scenes):
    runtime = RuntimeVocabulary(vocabulary.tokenizer_json())
    for scene in scenes:
        question = scene["qas"][0]
        packed = pack([{**scene, "qas": [question]}], vocabulary, 5, np.random.default_rng(0), PackOptions(1, 0.0))
        n = len(scene["images"])
        prompt = build_prompt(runtime, question.text, [25] * n)
        assert packed.ids[0, : len(prompt)].tolist() == prompt
        positions = rope_positions(prompt, [(5, 5)] * n, image_token=IMAGE)
        assert packed.positions[0, :, : len(prompt)].tolist() == positions.tolist()
        answer = packed.target[0][packed.target[0] >= 0].tolist()
        assert vocabulary.decode(answer) == question.answer + "<|im_end|>"


# ---- model
def test_logits_equal_transformers():
    transformers = pytest.importorskip("transformers")
    c = replace(SMALL, size=112, vocab=64)
    model = jittered(c)
    config = transformers.Qwen2VLConfig(**{k: v for k, v in hf_config(c).items() if k != "architectures"})
    reference = transformers.Qwen2VLForConditionalGeneration(config).eval().float()
    missing, unexpected = reference.load_state_dict(model.state_dict(), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    reference.tie_weights()
    cells = [VISION_START, *[IMAGE] * 16, VISION_END]
    ids = torch.tensor([[5, 6, *cells, 7, *cells, 8, 9, 10, 11]])
    images = torch.randint(0, 255, (2, 112, 112, 3), dtype=torch.uint8)
    x = patchify(images)
    pixels = x.view(2, -1, 3, 1, 14, 14).expand(-1, -1, -1, 2, -1, -1).reshape(2 * 64, -1)
    grids, kinds = torch.tensor([[1, 8, 8]] * 2), (ids == IMAGE).int()
    with torch.no_grad():
        out = reference(input_ids=ids, pixel_values=pixels, image_grid_thw=grids, mm_token_type_ids=kinds).logits
        positions = torch.from_numpy(rope_positions(ids[0].tolist(), [(4, 4)] * 2, image_token=IMAGE))[None]
        mask = torch.full((ids.shape[1],) * 2, -1e9).triu(1)[None, None]
        states = model.run(model.embed(ids, x)[0], positions, mask)
        assert torch.allclose(model.logits(states), out, atol=2e-4, rtol=1e-4)


def test_branches_do_not_see_each_other(vocabulary, scenes):
    model = jittered(replace(SMALL, vocab=320))
    scene = next(s for s in scenes if len(s["qas"]) >= 3)
    rng = np.random.default_rng(0)
    together = pack([scene], vocabulary, 5, rng, PackOptions(8, 0.0))
    at = 0
    for question in scene["qas"]:
        alone = pack([{**scene, "qas": [question]}], vocabulary, 5, rng, PackOptions(1, 0.0))
        logits = []
        for packed in (together, alone):
            with torch.no_grad():
                x, _ = model.embed(packed.ids, patchify(packed.images))
                states = model.run(x, packed.positions, packed.mask)
                logits.append(model.logits(states[packed.target >= 0]))
        n = len(logits[1])
        assert torch.allclose(logits[0][at : at + n], logits[1], atol=1e-4)
        at += n


def test_every_loss_is_finite_and_reaches_the_weights(vocabulary, scenes):
    model, heads = jittered(replace(SMALL, vocab=320)), Heads(replace(SMALL, vocab=320))
    packed = pack(scenes, vocabulary, 5, np.random.default_rng(0))
    measured = measure(model, heads, packed)
    assert all(math.isfinite(float(value.detach())) for value in measured.losses.values())
    assert {"text", "answer", "phrase", "link_place", "salient2", "b_wave", "v_dist"} <= measured.losses.keys()
    sum(measured.losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_answer_weights_follow_the_digits(vocabulary):
    ids = vocabulary.encode("It is in the second image. <|box_start|>(12,345),(6,90)<|box_end|>")
    w = AnswerWeights()
    weights, places = weigh_answer(vocabulary, ids, w)
    shown = {vocabulary.pieces[i]: weight for i, weight in zip(ids, weights, strict=True)}
    digits = [(vocabulary.pieces[i], place) for i, place in zip(ids, places, strict=True) if place >= 0]
    assert digits == [("1", 1), ("2", 0), ("3", 2), ("4", 1), ("5", 0), ("6", 0), ("9", 1), ("0", 0)]
    assert shown[" second"] == w.ordinal and shown["("] == w.punctuation and shown["1"] == w.tens * w.first


def test_orthogonalize_brings_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalize(torch.randn(2, 16, 40)))
    assert values.min() > 0.6 and values.max() < 1.3


# ---- runs
def settings(folder: Path, **changes) -> Settings:
    tasks = {"diff": 1.0, "single": 1.0}
    stages = (
        Stage("vision", 2, tasks, batch=2, vision_only=True, warmup=1),
        Stage("ten", 4, tasks, batch=2, branches=3, freeze_vision=True, warmup=2),
    )
    defaults = {"seed": 3, "threads": 1, "workers": 0, "save_every": 1, "log_every": 1, "device": "cpu"}
    return Settings(str(folder), stages, model=SMALL, **{**defaults, **changes})


def test_a_run_cut_off_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    whole = Trainer(settings(tmp_path / "a"))
    assert whole.run()
    cut = Trainer(settings(tmp_path / "b"))
    cut.report = lambda stage, step, figures: cut.stop() if (stage.name, step) == ("ten", 2) else None
    assert not cut.run()
    killed = Trainer(settings(tmp_path / "b"))

    def die(*words):
        raise KeyboardInterrupt

    killed.report = die  # as a kill between two steps: nothing is saved beyond what was
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    rest = Trainer(settings(tmp_path / "b"))
    assert (rest.stage, rest.step) == (1, 2)
    assert rest.run()
    a, b = (load_state(tmp_path / name / "ten.safetensors") for name in "ab")
    assert all(torch.equal(a.model[name], b.model[name]) for name in a.model)
    assert a.history["sets"] == b.history["sets"] == 12
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows][-1] == ("ten", 4)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_state_starts_another_run_and_exports(tmp_path, vocabulary):
    state = State(replace(SMALL, vocab=320), vocabulary.pieces, jittered(SMALL).state_dict(), history={"sets": 1})
    save_state(tmp_path / "s.safetensors", state)
    started = Trainer(settings(tmp_path / "run", init=str(tmp_path / "s.safetensors")))
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert torch.equal(started.model.state_dict()[name], state.model[name].bfloat16().float())
    export_folder(load_state(tmp_path / "s.safetensors"), tmp_path / "hf")
    export_mig(tmp_path / "hf", tmp_path / "m.mig")
    for source in (tmp_path / "hf", tmp_path / "m.mig"):
        with open_checkpoint(source) as checkpoint:
            assert set(checkpoint.tensors) == {published_name(n) for n in state.model}
            assert checkpoint.repetition_penalty == 1.0
            assert checkpoint.config.eos_tokens == (vocabulary.ids["<|im_end|>"],)


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path, monkeypatch):
    run = Trainer(settings(tmp_path))
    run.save()
    before = (tmp_path / "last.pt").read_bytes()
    run.step = 1

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(MigicianError, match=r"last\.pt: cannot be written \(No space left"):
            run.save()
        stage = {"name": "vision", "steps": 1, "tasks": {"diff": 1}, "batch": 2, "vision_only": True, "warmup": 1}
        small = {"threads": 1, "workers": 0, "device": "cpu", "model": SMALL.to_dict(), "stages": [stage]}
        (tmp_path / "small.yaml").write_text(json.dumps(small))  # which is YAML too
        result = CliRunner().invoke(main, [str(tmp_path / "small.yaml"), f"out={tmp_path}/other"])
    assert result.exit_code == 1 and "cannot be written (No space left" in result.output
    assert "Traceback" not in result.output
    assert (tmp_path / "last.pt").read_bytes() == before
    (tmp_path / ".last.pt.0123456789abcdef.tmp").write_bytes(before)  # as a kill leaves it
    assert Trainer(settings(tmp_path)).step == 0
    assert not list(tmp_path.glob(".*"))


def test_transformers_builds_the_prompts_of_this_runtime(tmp_path, vocabulary):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    state = State(replace(SMALL, vocab=320), vocabulary.pieces, jittered(SMALL).state_dict())
    export_folder(state, tmp_path / "hf")
    export_folder(state, tmp_path / "hf")  # again, over the one that is there
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    turns = [
        {"role": "user", "content": [*[{"type": "image"}] * 2, {"type": "text", "text": "find the red circle"}]},
        {"role": "assistant", "content": "It is in the second image."},
        {"role": "user", "content": "and the blue one?"},
    ]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    history = [("find the red circle", "It is in the second image.")]
    with open_checkpoint(tmp_path / "hf") as checkpoint:
        want = build_prompt(RuntimeVocabulary(checkpoint.tokenizer_json), "and the blue one?", [1, 1], history=history)
    assert tokenizer(rendered)["input_ids"] == want
    template = json.loads((tmp_path / "hf" / "chat_template.json").read_text())["chat_template"]
    assert template == CHAT_TEMPLATE and tokenizer.chat_template == template


def test_any_square_picture_gets_the_training_grid(tmp_path, vocabulary):
    state = State(NanoConfig(), vocabulary.pieces, NanoModel(NanoConfig()).state_dict())
    export_folder(state, tmp_path)
    with open_checkpoint(tmp_path) as checkpoint:
        limits = {"min_pixels": checkpoint.preprocessor.min_pixels, "max_pixels": checkpoint.preprocessor.max_pixels}
    for side in (1, 28, 100, 187, 196, 200, 224, 333, 640, 1999):
        assert smart_resize(side, side, **limits) == (196, 196)


def test_bf16_only_where_it_pays():
    assert trainer_module.bf16_pays(torch.device("cuda"))
    assert isinstance(trainer_module.bf16_pays(torch.device("cpu")), bool)


# ---- settings
def test_the_shipped_recipe_reads_and_takes_overrides(tmp_path):
    words = ["out=x", "stages.ten.steps=7", "stages.0.batch=3", "seed=9"]
    read = read_settings(ROOT / "train" / "nano" / "nano.yaml", words)
    assert [stage.name for stage in read.stages] == ["vision", "one", "ten"]
    assert (read.out, read.seed, read.stages[2].steps, read.stages[0].batch) == ("x", 9, 7, 3)
    assert set(read.stages[2].tasks) == set(TASKS) and read.model == NanoConfig()


@pytest.mark.parametrize(
    "word", ["nonsense", "colour=1", "stages.nine.steps=1", "stages.ten.size=2", "model.depth=3", "stages.ten.steps=0"]
)
def test_a_wrong_override_is_a_usage_error(word):
    result = CliRunner().invoke(main, [str(ROOT / "train" / "nano" / "nano.yaml"), "out=/nonexistent/x", word])
    assert result.exit_code == 2 and "Traceback" not in result.output


def test_held_out_seeds_cannot_be_trained_on(tmp_path):
    with pytest.raises(ValueError, match="held out"):
        Trainer(settings(tmp_path, seed=10**6)).run()


def test_rows_are_padded_with_the_end_of_text(vocabulary, scenes):
    packed = pack(scenes[:3], vocabulary, 5, np.random.default_rng(0))
    assert packed.ids.shape[1] % 32 == 0 and (packed.ids[:, -1] == PAD).any()
    assert packed.ids[0, : len(vocabulary.encode(SYSTEM))].tolist() == vocabulary.encode(SYSTEM)
