"""Rotations: orthogonal, cheap, and nothing that a model computes changes with them."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from checkpoints import make_checkpoint  # noqa: E402

from migician.export.rotate import Rotation, hadamard  # noqa: E402
from migician.export.units import Rotations, chunks_of, list_units, load_unit  # noqa: E402
from migician.runtime.files.open import open_checkpoint  # noqa: E402


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 28, 40, 48, 80, 128, 192])
def test_hadamard_rows_are_orthogonal(order: int) -> None:
    h = hadamard(order)
    assert h is not None and set(np.unique(h)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(h @ h.T, order * np.eye(order))


@pytest.mark.parametrize("order", [3, 5, 6, 10, 37])
def test_no_hadamard_matrix_where_none_is_known_to_us(order: int) -> None:
    assert hadamard(order) is None


@pytest.mark.parametrize("size", [4, 48, 80, 96, 192, 256, 296, 1280, 1536])
@pytest.mark.parametrize("keeps_ones", [False, True])
def test_rotation_is_orthogonal_and_spreads(size: int, keeps_ones: bool) -> None:
    rotation = Rotation(size, 7, keeps_ones=keeps_ones)
    q = rotation.apply(torch.eye(size))
    torch.testing.assert_close(q @ q.T, torch.eye(size), atol=1e-5, rtol=0)
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.apply(x), x @ q, atol=1e-5, rtol=1e-5)
    if keeps_ones:
        torch.testing.assert_close(q @ torch.ones(size), torch.ones(size), atol=1e-4, rtol=0)
    if size >= 48:
        assert q.abs().max() < 6 / size**0.5  # one channel's outlier is spread over all of them
        assert not torch.equal(Rotation(size, 8).apply(x), rotation.apply(x))
    assert torch.equal(Rotation(size, 7, keeps_ones=keeps_ones).apply(x), rotation.apply(x))


@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"tied": False, "heads": 4, "kv_heads": 4},
        {"hidden": 96, "heads": 6, "kv_heads": 2, "inter": 160, "v_dim": 96, "v_heads": 2, "layers": 3, "v_depth": 3},
    ],
)
def test_a_rotated_model_is_the_same_model(geometry: dict, tmp_path) -> None:
    """transformers gives the same log-probabilities for the folded and rotated weights, untied, in float32."""
    transformers = pytest.importorskip("transformers")
    folder = make_checkpoint(tmp_path / "m", dtype="float32", **geometry)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.torch_dtype = config.dtype = torch.float32
    kind = transformers.Qwen2VLForConditionalGeneration
    original = kind.from_pretrained(folder, dtype=torch.float32).eval()
    with open_checkpoint(folder) as checkpoint:
        state = _rotated(checkpoint)
        image = checkpoint.config.image_token
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    rotated = kind(config).float().eval()
    names = rotated.state_dict()
    renamed = {_modern(name): value for name, value in state.items()}
    assert set(renamed) == set(names)
    rotated.load_state_dict({name: value.view(names[name].shape) for name, value in renamed.items()})
    ids = torch.tensor([[1, 2, 3, *[image] * 6, 4, 5, 6]])
    ids = torch.where(ids == image, ids, ids % 250)
    grid = torch.tensor([[1, 6, 4]])
    pixels = torch.randn(24, 1176, generator=torch.Generator().manual_seed(1))
    given = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid}
    given["mm_token_type_ids"] = (ids == image).int()
    with torch.inference_mode():
        want, got = (model(**given).logits.log_softmax(-1) for model in (original, rotated))
    assert (want - got).abs().max() < 2e-4
    assert not torch.allclose(state["model.embed_tokens.weight"], original.get_input_embeddings().weight, atol=1e-2)


def _rotated(checkpoint) -> dict:
    rotations, state = Rotations(checkpoint.config), {}
    for unit in list_units(checkpoint.config):
        if unit.kind in ("embedding", "head"):
            state[unit.prefix + "weight"] = torch.cat(list(chunks_of(checkpoint, unit, rotations, 48)))
        else:
            state |= load_unit(checkpoint, unit, rotations)
    state["model.norm.weight"] = torch.ones(checkpoint.config.text.hidden)
    return state


def _modern(name: str) -> str:
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name
