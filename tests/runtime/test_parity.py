"""The engines against transformers' Qwen2-VL on small random checkpoints: ids, grids, positions, log-probabilities.

transformers is driven by itself here, from its own reading of the folder to its own positions, and not through backend
torch: that one shares its prompts, pixels and positions with the native engine.
"""


import numpy as np
import pytest
from checkpoints import make_checkpoint
from reference import draw, reference_logprobs

from migician.runtime.backends.native import Pool, Session, Weights, positions
from migician.runtime.backends.native import patchify as core_patchify
from migician.runtime.files.open import open_checkpoint
from migician.runtime.image import load_picture, patchify
from migician.runtime.model import load
from migician.runtime.prompt import Vocabulary, build_prompt

torch = pytest.importorskip("torch", reason="transformers is the reference; install the [test] extra")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.slow

SHAPES = {
    "mha-tied": {"hidden": 128, "heads": 4, "kv_heads": 4, "tied": True, "v_dim": 64},
    "gqa2-untied-v5": {
        "hidden": 256,
        "layers": 3,
        "heads": 8,
        "kv_heads": 4,
        "tied": False,
        "v_dim": 160,
        "layout": "v5",
    },
    "gqa7-sharded": {"hidden": 448, "heads": 7, "kv_heads": 1, "tied": False, "v_dim": 128, "v_heads": 4, "shards": 3},
    "deep-nested": {
        "hidden": 192,
        "layers": 6,
        "heads": 6,
        "v_dim": 96,
        "v_heads": 3,
        "v_depth": 4,
        "layout": "nested",
    },
    "wide-f32": {"hidden": 1024, "heads": 8, "inter": 1408, "v_dim": 80, "v_heads": 1, "dtype": "float32"},
    "head128-v5-sharded": {"hidden": 512, "tied": False, "v_dim": 128, "layout": "v5", "shards": 2},
}
SETS = {
    "text": [],
    "one": [(97, 61)],
    "two": [(9, 13), (300, 40)],
    "four": [(40, 280), (212, 199), (31, 30), (120, 90)],
}
NEW = 16


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request, tmp_path_factory):
    folder = make_checkpoint(
        tmp_path_factory.mktemp(request.param), seed=3, max_pixels=28 * 28 * 64, **SHAPES[request.param]
    )
    torch.set_num_threads(2)
    reference = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    with load(folder, precision="fp32") as model:
        yield model, reference, folder


@pytest.mark.parametrize("pictures", list(SETS))
def test_greedy_logprobs_match(pair, pictures):
    model, reference, folder = pair
    images = draw(SETS[pictures])
    answer = model.ground(images, "find the thing", max_new_tokens=NEW, repetition_penalty=1.0)
    loaded = [load_picture(image, model.preprocessor) for image in images]
    cells = [p.rgb.shape[0] * p.rgb.shape[1] // 784 for p in loaded]
    prompt = build_prompt(model._vocabulary, "find the thing", cells)
    assert answer.prompt_tokens == len(prompt)
    new = [t.id for t in answer.tokens]
    want = reference_logprobs(reference, folder, prompt + new, images)[len(prompt) - 1 :]
    assert len(new) == NEW or answer.finish == "stop"
    for i, token in enumerate(answer.tokens):
        assert abs(token.logprob - want[i, token.id]) < 2e-3
        assert want[i].max() - want[i, token.id] < 2e-3  # greedy there too, but for ties


@pytest.mark.parametrize(("backend", "atol"), [("native", 2e-3), ("torch", 1e-4)])
def test_teacher_forced_logprobs_match(pair, backend, atol):
    _, reference, folder = pair
    images, text = draw(SETS["two"], seed=1), "It is (12,34),(56,78) in the image."
    with load(folder, precision="fp32", backend=backend) as model:
        got = model.logprobs(images, "where?", text)
    cells = [p.rgb.shape[0] * p.rgb.shape[1] // 784 for p in (load_picture(i, model.preprocessor) for i in images)]
    prompt, tail = build_prompt(model._vocabulary, "where?", cells), model._vocabulary.encode(text)
    want = reference_logprobs(reference, folder, prompt + tail, images)[len(prompt) - 1 : -1]
    assert got.dtype == np.float32 and got.shape == (len(tail),)
    np.testing.assert_allclose(got, want[np.arange(len(tail)), tail], atol=atol)


def test_token_ids_and_positions_match(pair):
    model, reference, folder = pair
    grids = [(2, 3), (5, 1), (4, 4)]
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    pads = "".join("<|vision_start|>" + "<|image_pad|>" * h * w + "<|vision_end|>" for h, w in grids)
    text = "the <|object_ref_start|>red cup<|object_ref_end|> at <|box_start|>(1,2),(3,4)<|box_end|>, 10 %?"
    rendered = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"{pads}{text}<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = build_prompt(model._vocabulary, text, [h * w for h, w in grids])
    assert ids == tokenizer(rendered)["input_ids"]
    t = torch.tensor([ids])
    kinds = (t == reference.config.image_token_id).int()
    thw = torch.tensor([[1, 2 * h, 2 * w] for h, w in grids])
    want, _ = reference.model.get_rope_index(t, kinds, image_grid_thw=thw)
    np.testing.assert_array_equal(positions(model._engine._weights, ids, grids), want[:, 0].numpy())


def test_the_core_and_numpy_agree_on_patches(pair):
    model, _, _ = pair
    rgb = np.random.default_rng(0).integers(0, 255, (56, 84, 3), np.uint8)
    np.testing.assert_allclose(core_patchify(model._engine._weights, rgb), patchify(rgb, model.preprocessor), atol=1e-6)


def test_kept_prefix_and_cold_start_agree(pair):
    model, _, folder = pair
    images = draw(SETS["two"])
    chat = model.chat(images)
    first = chat.ask("what is it?", max_new_tokens=6)
    second = chat.ask("and where?", max_new_tokens=6)
    with open_checkpoint(folder) as checkpoint:
        weights, vocabulary = Weights(checkpoint), Vocabulary(checkpoint.tokenizer_json)
        loaded = [load_picture(image, model.preprocessor) for image in images]
        cells = [p.rgb.shape[0] * p.rgb.shape[1] // 784 for p in loaded]
        ids = build_prompt(vocabulary, "and where?", cells, history=[("what is it?", [t.id for t in first.tokens])])
        cold = Session(weights, Pool(1), context=len(ids) + 8, fp32=True)
        cold.sync(ids, [cold.encode(p.rgb) for p in loaded])
        for token in second.tokens:
            got, logprob = cold.greedy(1.0)
            assert got == token.id and abs(logprob - token.logprob) < 1e-3
            cold.append([got])


def test_a_mig_file_answers_as_its_folder(pair, tmp_path):
    from migician.runtime.files.mig import write_mig

    model, _, folder = pair
    images = draw(SETS["one"])
    with open_checkpoint(folder) as checkpoint:
        write_mig(tmp_path / "model.mig", checkpoint)
    with load(tmp_path / "model.mig", precision="fp32") as other:
        a = model.ground(images, "where?", max_new_tokens=8)
        b = other.ground(images, "where?", max_new_tokens=8)
    assert a.tokens == b.tokens
