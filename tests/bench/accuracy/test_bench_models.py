"""Families' forms, and answering models: ours, transformers' LLaVA-OneVision and Qwen2-VL."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_checkpoint, make_tokenizer
from noise_pictures import save_noise
from PIL import Image
from rendered_questions import RENDERED, a_question

from migician.bench.accuracy import families
from migician.bench.accuracy.families import FAMILIES, detect, find, on_grid, render
from migician.bench.accuracy.models import Ours, Transformers, open_answerer, parts
from migician.bench.engines import PHASES, Answered
from migician.runtime.errors import MigicianError, ModelFileError, UnsupportedError
from migician.runtime.model import load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return save_noise(tmp_path_factory.mktemp("pictures"), [(90, 60), (64, 80)])


class Fake:
    """Remembers what it is asked; answers always the same."""

    name, versions = "fake", {"fake": "1"}

    def __init__(self, family: str, response: str = "(1,2),(3,4)") -> None:
        self.family, self.response = family, response
        self.asked: list[tuple[tuple[Path, ...], str, int]] = []

    def answer(self, images: Any, text: str, max_new_tokens: int) -> Answered:
        self.asked.append((tuple(images), text, max_new_tokens))
        return Answered(self.response)

    def close(self) -> None: ...


# ---- families
def test_every_family_has_a_rendered_form() -> None:
    assert RENDERED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", sorted(RENDERED))
def test_a_question_is_written_as_published(name: str, pictures: tuple[Path, ...]) -> None:
    fake = Fake(name)
    families.ask(a_question(pictures), fake)
    ((images, text, _),) = fake.asked
    assert text == RENDERED[name]
    assert images == (pictures[:1] if name == "cogvlm" else pictures)


def test_a_source_box_without_its_parenthesis_stays_as_published() -> None:
    text = "the object (<|box_start|>(1,2),(3,4)<|box_end|> in it"
    assert render(find("llava_onevision"), text, 0) == "the object (<box>(1,2),(3,4)</box> in it"


def test_cogvlm_is_told_where_to_look_for_differences(pictures: tuple[Path, ...]) -> None:
    fake = Fake("cogvlm")
    families.ask(a_question(pictures, task="diff"), fake)
    assert fake.asked[0][1].endswith("[[x0,y0,x1,y1]].Ground it in the right image.")


@pytest.mark.parametrize(
    ("name", "tokens"),
    {
        "migician": 128, "qwen2_vl": 128, "qwen2_5_vl": 128, "internvl2_8b": 1024, "mantis": 1024,
        "llava_onevision": 100, "mplug_owl3": 256,
    }.items(),
)  # fmt: skip
def test_new_tokens_are_the_published_ones(name: str, tokens: int, pictures: tuple[Path, ...]) -> None:
    fake = Fake(name)
    families.ask(a_question(pictures), fake)
    assert fake.asked[0][2] == tokens


def test_only_migician_is_y_scaled() -> None:
    assert [name for name, family in FAMILIES.items() if family.y_scaled] == ["migician"]
    assert [name for name, family in FAMILIES.items() if family.pixels] == ["qwen2_5_vl"]
    assert {name: f.longest_side for name, f in FAMILIES.items() if f.longest_side} == {"minicpm": 500}


@pytest.mark.parametrize(
    ("model", "kind", "family"),
    [
        ("Michael4933/Migician", "qwen2_vl", "migician"),
        ("/models/migician-int4.mig", None, "migician"),
        ("/models/migician/2b", "qwen2_vl", "qwen2_vl"),  # the folder above says nothing
        ("Qwen/Qwen2-VL-7B-Instruct", None, "qwen2_vl"),
        ("Qwen/Qwen2.5-VL-7B-Instruct/", None, "qwen2_5_vl"),
        ("qwen2.5vl:7b", None, "qwen2_5_vl"),
        ("checkpoint-400", "qwen2_5_vl", "qwen2_5_vl"),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", None, "llava_onevision"),
        ("x", "llava_onevision", "llava_onevision"),
        ("OpenGVLab/InternVL2-8B", None, "internvl2_8b"),
        ("openbmb/MiniCPM-V-2_6", None, "minicpm"),
        ("TIGER-Lab/Mantis-8B-Idefics2", "idefics2", "mantis"),
        ("mPLUG/mPLUG-Owl3-7B-240728", None, "mplug_owl3"),
        ("THUDM/cogvlm-chat-hf", None, "cogvlm"),
    ],
)
def test_a_family_is_told_by_name_then_by_model_type(model: str, kind: str | None, family: str) -> None:
    found = detect(model, kind)
    assert found is not None
    assert found.name == family


def test_an_unknown_model_has_no_family() -> None:
    assert detect("gpt-4o") is None
    assert detect("x", "llama") is None
    assert find("Qwen2.5-VL").name == "qwen2_5_vl"
    with pytest.raises(MigicianError, match="choose from cogvlm, internvl2_8b"):
        find("qwen9")


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("(50,20),(100,100)", "(0.250000,0.200000),(0.500000,0.999999)"),
        ("at [50, 20, 100, 60].", "at (0.250000,0.200000),(0.500000,0.600000)."),
        ('[{"bbox_2d": [0, 1, 2.5, 3]}]', '[{"bbox_2d": (0.000000,0.010000),(0.012500,0.030000)}]'),
        ("<box>2 4 6 8</box>", "(0.010000,0.040000),(0.030000,0.080000)"),
        ("(1,1),(9,9) and (2,2),(4,4)", "(0.005000,0.010000),(0.045000,0.090000) and (0.010000,0.020000),"
         "(0.020000,0.040000)"),
        ("no box in the 2 of 3 pictures (2, 3)", "no box in the 2 of 3 pictures (2, 3)"),
    ],
)  # fmt: skip
def test_pixels_become_fractions(response: str, expected: str) -> None:
    assert on_grid(response, 200, 100) == expected


def test_pixels_are_divided_by_the_target_as_it_was_seen(tmp_path: Path) -> None:
    images = save_noise(tmp_path, [(280, 140), (50, 110)])  # the second becomes 56 x 112
    fake = Fake("qwen2_5_vl", "(14,28),(28,56)")
    reply = families.ask(a_question(images, target=1), fake)
    assert reply.response == "(0.250000,0.250000),(0.500000,0.500000)"
    assert reply.extra == {"pixels": "(14,28),(28,56)", "seen": [56, 112]}
    first = families.ask(a_question(images, target=0), fake)
    assert first.response == "(0.050000,0.200000),(0.100000,0.400000)"
    assert families.ask(a_question(images, target=None), fake).response == reply.response
    fake.seen = lambda image: (28, 56)  # type: ignore[attr-defined]
    assert families.ask(a_question(images, target=1), fake).extra["seen"] == [28, 56]


def test_thousandths_are_left_alone(pictures: tuple[Path, ...]) -> None:
    reply = families.ask(a_question(pictures), Fake("migician", "(14,28),(28,56)"))
    assert (reply.response, dict(reply.extra)) == ("(14,28),(28,56)", {})


def test_pictures_stand_where_the_text_says() -> None:
    inline, front = find("llava_onevision"), find("qwen2_vl")
    assert parts(inline, 2, "1:<image>\n2:<image>\nwhere?") == ["1:", None, "\n2:", None, "\nwhere?"]
    assert parts(inline, 2, "<image><image>where?") == [None, None, "where?"]
    assert parts(inline, 2, "no headers") == [None, None, "no headers"]
    assert parts(front, 1, "a <image> b") == [None, "a <image> b"]


# ---- ours
def test_our_models_answer_without_special_tokens(tiny: Path, pictures: tuple[Path, ...]) -> None:
    with load(tiny) as model:
        expected = model.ground(pictures, "where?", max_new_tokens=24)
        special = {i for word, i in model._vocabulary.special.items()}
        text = model._vocabulary.decode(t.id for t in expected.tokens if t.id not in special)
    answerer = open_answerer(str(tiny))
    assert isinstance(answerer, Ours)
    assert answerer.answer(pictures, "where?", 24).text == text
    answerer.close()
    with pytest.raises(MigicianError, match="closed"):
        answerer.answer(pictures, "where?", 24)


def test_special_tokens_are_left_out_of_an_answer(tiny: Path, pictures: tuple[Path, ...], monkeypatch: Any) -> None:
    answerer = Ours(str(tiny))
    vocabulary = answerer._model._vocabulary
    ids = vocabulary.encode("<|box_start|>(1,2),(3,4)<|box_end|>")
    made = answerer._model.ground(pictures, "where?", max_new_tokens=1)
    tokens = tuple(type(made.tokens[0])(i, 0.0) for i in ids)
    answer = replace(made, tokens=tokens)
    monkeypatch.setattr(type(answerer._model), "ground", lambda *_, **__: answer)
    assert answerer.answer(pictures, "where?", 24).text == "(1,2),(3,4)"
    answerer.close()


def test_a_second_question_about_the_same_pictures_is_a_first_one(tiny: Path, pictures: tuple[Path, ...]) -> None:
    fresh = []
    for text in ("where?", "what else?"):
        answerer = open_answerer(str(tiny))
        fresh.append(answerer.answer(pictures, text, 24).text)
        answerer.close()
    answerer = open_answerer(str(tiny))
    assert [answerer.answer(pictures, text, 24).text for text in ("where?", "what else?")] == fresh
    assert answerer.answer(pictures[::-1], "where?", 24).text != fresh[0]
    assert answerer.answer(pictures, "where?", 24).text == fresh[0]
    answerer.close()


def test_a_longest_side_reaches_our_models(tiny: Path, tmp_path: Path) -> None:
    images = save_noise(tmp_path, [(280, 168)])
    with load(tiny, precision="fp32") as model:
        ids = [[t.id for t in model.ground(images, "?", max_new_tokens=24, max_side=s).tokens] for s in (84, None)]
        small, large = (model._vocabulary.decode(i, skip_special=True) for i in ids)
    assert small != large
    answerer = open_answerer(str(tiny), max_side=84, precision="fp32", threads=1)
    assert answerer.answer(images, "?", 24).text == small
    answerer.close()


def test_our_families(tiny: Path, tmp_path: Path) -> None:
    def family(model: str | Path, **settings: Any) -> str:
        answerer = open_answerer(str(model), **settings)
        answerer.close()
        return answerer.family

    assert family("nano") == "qwen2_vl"
    assert family(tiny) == "qwen2_vl"
    assert family(tiny, family="migician") == "migician"
    (tmp_path / "Migician-7B").symlink_to(tiny)
    assert family(tmp_path / "Migician-7B") == "migician"
    with pytest.raises(UnsupportedError, match="puts pictures into the text"):
        open_answerer(str(tiny), family="internvl2_8b")


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("/nowhere/at.mig", {}, "no such model"),
        ("nano", {"precision": "int2"}, "choose auto or fp32"),
        ("nano", {"max_side": 0}, "from 1 up"),
        ("nano", {"family": "qwen9"}, "choose from"),
        ("http://127.0.0.1:1", {"threads": 2}, "set where it runs"),
        ("http://127.0.0.1:1", {"precision": "fp32"}, "set where it runs"),
        ("http://127.0.0.1:port", {}, "not a server's address"),
        ("http://", {}, "not a server's address"),
        ("http://me:secret@127.0.0.1:1#migician", {}, "no name or password"),
    ],
)
def test_what_cannot_be_opened(model: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MigicianError, match=message) as caught:
        open_answerer(model, **settings)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


# ---- transformers
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}IMAGE{% endif %}{% endfor %}"
    "{% for content in message['content'] %}{% if content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(folder: Path, **files: Any) -> None:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), "utf-8")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-OneVision folder of random weights: transformers' own class, a 28-pixel SigLIP, a Qwen2 of two layers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llava") / "llava-onevision-tiny"
    folder.mkdir()
    tokenizer = make_tokenizer(288)
    first = max(token["id"] for token in tokenizer["added_tokens"]) + 1
    for i, word in enumerate(("<image>", "<video>")):
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": first + i, "content": word})
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    write(
        folder,
        tokenizer=tokenizer,
        tokenizer_config={"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        preprocessor_config={
            "image_processor_type": "LlavaOnevisionImageProcessor", "size": {"height": 28, "width": 28},
            "image_grid_pinpoints": [[28, 28], [28, 56], [56, 28], [56, 56]],
        },
        processor_config={
            "processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 4, "vision_aspect_ratio": "anyres_max_9",
            "vision_feature_select_strategy": "full",
        },
    )  # fmt: skip
    (folder / "chat_template.jinja").write_text(CHAT.replace("IMAGE", "<image>"), "utf-8")
    config = transformers.LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
        },
        image_token_index=ids["<image>"], video_token_index=ids["<video>"],
        image_grid_pinpoints=[[28, 28], [28, 56], [56, 28], [56, 56]],
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlavaOnevisionForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.repetition_penalty = 1.05
    model.save_pretrained(folder)
    return folder


def test_llava_onevision_answers_end_to_end(llava: Path, pictures: tuple[Path, ...]) -> None:
    answerer = open_answerer(str(llava))
    assert isinstance(answerer, Transformers)
    assert (answerer.family, answerer.name) == ("llava_onevision", "llava-onevision-tiny")
    reply = families.ask(a_question(pictures), answerer)
    assert reply.response == by_hand(llava, pictures, RENDERED["llava_onevision"], 100)
    assert len(reply.response) > 5
    other = save_noise(pictures[0].parent, [(90, 60), (64, 80), (50, 50)])[2]
    assert answerer.answer([pictures[0], other], RENDERED["llava_onevision"], 100).text != reply.response
    answerer.close()


def by_hand(folder: Path, images: tuple[Path, ...], text: str, new_tokens: int) -> str:
    """LLaVA-OneVision's answer step by step: ids put together here, greedy steps by plain forward passes."""
    import torch
    from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlavaOnevisionForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
    processor = LlavaOnevisionImageProcessorPil.from_pretrained(folder)
    shown = processor([[Image.open(image) for image in images]], return_tensors="pt")
    # several pictures: 2 x 2 patches each and one token for the end of a line
    prompt = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n".replace("<image>", "<image>" * 5)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.inference_mode():
        for _ in range(new_tokens):
            logits = model(input_ids=ids, **shown).logits[0, -1].float()
            seen = ids[0].unique()
            logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.05, logits[seen] * 1.05)
            token = int(logits.argmax())
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
            if token == model.generation_config.eos_token_id:
                break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(
    ("max_side", "seen"),
    [(None, (84, 56)), (80, (84, 56)), (56, (56, 28)), (28, (28, 28))],
)
def test_transformers_and_ours_answer_alike(
    tmp_path: Path, pictures: tuple[Path, ...], max_side: int | None, seen: tuple[int, int]
) -> None:
    pytest.importorskip("transformers")
    folder = make_checkpoint(
        tmp_path / "model", seed=5, repetition_penalty=1.05, dtype="float32", min_pixels=28 * 28, max_pixels=28 * 28 * 6
    )
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    (folder / "chat_template.jinja").write_text(system + CHAT.replace("IMAGE", image), "utf-8")
    question, answers = a_question(pictures), []
    for model in (str(folder), f"transformers:{folder}"):
        answerer = open_answerer(model, precision="fp32", max_side=max_side)
        answers.append(families.ask(question, answerer).response)
        if isinstance(answerer, Transformers):
            assert answerer.seen(pictures[0]) == seen
        answerer.close()
    assert answers[0] == answers[1]
    assert len(answers[0]) > 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llava_twovision"}, "llava_twovision"),
        (None, "cannot be opened in transformers"),
    ],
)
def test_a_damaged_folder_is_one_line(llava: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder = tmp_path / "llava-onevision"
    shutil.copytree(llava, folder)
    if change is None:
        (folder / "model.safetensors").unlink()
    else:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        write(folder, config={**config, **change})
    with pytest.raises(ModelFileError, match=message) as caught:
        open_answerer(str(folder))
    assert "\n" not in str(caught.value)


def test_a_model_that_no_family_asks_is_refused(llava: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(llava, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    write(folder, config={**config, "model_type": "llava"})
    with pytest.raises(UnsupportedError, match=r"model_type llava does not say .* --family, one of cogvlm"):
        open_answerer(str(folder))


def test_ours_tells_its_times_and_takes_pixels(tiny: Path, pictures: tuple[Path, ...]) -> None:
    engine = Ours(str(tiny), threads=1)
    pixels = [np.asarray(Image.open(path).convert("RGB")) for path in pictures]
    first, second = engine.answer(pictures, "where?", 8), engine.answer(pixels, "where?", 8)
    assert first.text == second.text and first.times is not None and second.times is not None
    assert first.times.prompt_tokens == second.times.prompt_tokens
    assert first.times.total_ms == pytest.approx(sum(first.times.to_dict()[f"{phase}_ms"] for phase in PHASES))
    assert engine.versions["backend"] == "native" and engine.family == "qwen2_vl"
