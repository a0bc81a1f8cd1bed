import pytest
import torch
import torch.nn.functional as F

from clipseg.model import MEAN, STD, ClipSeg
from ldm.models.tokenizer import Tokenizer

PROMPTS = ["cat", "a photo of a dog", "a cropped photo of the red car"]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_logits_are_those_of_transformers_own_forward(clipseg, images):
    normal = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        ours = clipseg(images, PROMPTS)
        theirs = clipseg.network(input_ids=clipseg.tokenizer(PROMPTS), pixel_values=normal).logits
    assert ours.shape == (3, 64, 64) and ours.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.std().item())


def test_masks_are_sigmoids_averaged_over_prompts(clipseg, images):
    masks = clipseg.masks(images, PROMPTS)
    with torch.no_grad():
        single = [clipseg(images, [prompt] * 3).sigmoid() for prompt in PROMPTS]
    torch.testing.assert_close(masks, torch.stack(single).mean(0))
    assert (single[0] - single[1]).abs().max() > 1e-3  # prompts matter


def test_a_mask_depends_on_its_own_image_only(clipseg, images):
    together = clipseg.masks(images, PROMPTS)
    torch.testing.assert_close(clipseg.masks(images[1:2], PROMPTS)[0], together[1])
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_images_of_any_shape_are_squeezed(clipseg):
    wide = torch.rand(1, 3, 40, 90)
    square = F.interpolate(wide, (64, 64), mode="bilinear", antialias=True)
    assert torch.equal(clipseg.masks(wide, ["cat"]), clipseg.masks(square, ["cat"]))


def test_both_towers_and_the_decoder_have_gradients(clipseg, images):
    clipseg(images, PROMPTS).square().mean().backward()
    idle = {name for name, p in clipseg.network.named_parameters() if p.grad is None or not p.grad.any()}
    clipseg.zero_grad()
    unused = ("logit_scale", "visual_projection", "post_layernorm", "k_proj.bias")  # softmax ignores a key's bias
    assert {name for name in idle if not any(part in name for part in unused)} == set()


def test_no_prompt_is_refused(clipseg, images):
    with pytest.raises(ValueError, match="prompts"):
        clipseg.masks(images, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 900}, "ids"),
        ({"end": 7}, "for the end"),
        ({"context": 8}, "context_length"),
        ({"image_size": 60}, "multiple of the patch size 16"),
    ],
)
def test_parts_that_do_not_fit_are_refused(small_config, change, message):
    tokenizer = Tokenizer(merges=1000, context_length=16)
    fits = {"vocab_size": tokenizer.vocab_size, "end": tokenizer.eos, "context": 16, "image_size": 64} | change
    size = fits.pop("image_size")
    with pytest.raises(ValueError, match=message):
        ClipSeg(small_config(**fits), tokenizer, size)
