"""What trains a base model: losses against their formulas, and the shared optimiser."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ldm.diffusion.schedule import Schedule
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.clip import Clip
from ldm.models.text import ClipText, OpenClipText, TextPair
from ldm.models.tokenizer import Tokenizer
from ldm.models.unet import UNet
from ldm.pipeline import StableDiffusion
from ldm.training.callbacks import ExportWeights
from ldm.training.contrastive import ClipTraining
from ldm.training.diffusion import LatentDiffusion
from ldm.training.optimise import adamw
from ldm.training.reconstruction import AutoencoderTraining


def tiny_text() -> ClipText:
    tokenizer = Tokenizer(merges=300, context_length=16)
    return ClipText(tokenizer, hidden_size=16, intermediate_size=32, layers=1, heads=2, max_length=16)


@pytest.fixture
def sd() -> StableDiffusion:
    torch.manual_seed(0)
    unet = UNet(
        model_channels=16,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_heads=2,
        context_dim=16,
    )
    vae = AutoencoderKL(ch=8, ch_mult=(1, 2), num_res_blocks=1, mid_attention=False, scale_factor=1.0)
    return StableDiffusion(unet, vae, tiny_text(), Schedule(), name="tiny", image_size=16)


def logged(module):
    """The module with its logging caught in `module.seen`."""
    module.seen = {}
    module.log = lambda name, value, **options: module.seen.update({name: float(value.detach())})
    module.log_dict = lambda values, **options: [module.log(name, value) for name, value in values.items()]
    return module


def test_learning_rate_rises_then_falls_along_a_cosine():
    parameter = torch.nn.Parameter(torch.zeros(1))
    made = adamw([parameter], 1.0, steps=30, warmup=10)
    rates = []
    for _ in range(30):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates[0] == pytest.approx(0.01) and max(rates) == pytest.approx(1.0) and np.argmax(rates) == 10
    half_way = 0.02 + 0.98 * 0.5
    assert rates[20] == pytest.approx(half_way, abs=1e-6) and rates[29] < 0.05


@pytest.mark.parametrize("clean_weight", [0.0, 0.2])
def test_diffusion_loss_of_a_model_that_predicts_nothing(sd, clean_weight):
    """A fresh UNet predicts 0: the loss is the noise's own power, weighted by min(SNR, γ) / SNR, and that of the clean
    latents x_0 = (x_t − √(1 − ᾱ) ε) / √ᾱ that this implies."""
    module = logged(LatentDiffusion(sd, caption_dropout=0.0, min_snr=5.0, clean_weight=clean_weight))
    latents = torch.randn(256, 4, 8, 8)
    torch.manual_seed(1)
    loss = module.training_step({"latents": latents, "captions": ["a cat"] * 256}, 0)
    torch.manual_seed(1)
    torch.rand(256)
    timesteps = module.timesteps(256)
    noise = torch.randn_like(latents)
    alphas = sd.schedule.alphas_cumprod[timesteps]
    snr = alphas / (1 - alphas)
    weights = torch.minimum(snr, torch.tensor(5.0)) / snr
    assert weights.min() < 0.1 and weights.max() == 1
    noisy = sd.schedule.add_noise(latents, noise, timesteps)
    clean = noisy / alphas.sqrt()[:, None, None, None]  # of a prediction of no noise
    expected = noise.square().mean((1, 2, 3)) * weights + clean_weight * (clean - latents).square().mean((1, 2, 3))
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-4)


def test_a_share_of_the_timesteps_is_for_the_layout(sd):
    torch.manual_seed(0)
    for share in (0.0, 0.5, 1.0):
        timesteps = LatentDiffusion(sd, layout_share=share).timesteps(20_000)
        assert timesteps.dtype == torch.int64 and timesteps.min() >= 0 and timesteps.max() == 999
        assert (timesteps >= 800).float().mean().item() == pytest.approx(share + 0.2 * (1 - share), abs=0.02)
        late = timesteps[timesteps >= 800].float()
        assert late.mean().item() == pytest.approx(899.5, abs=5)


@pytest.mark.parametrize(("share", "emptied"), [(0.0, 0), (1.0, 8)])
def test_captions_are_emptied_for_guidance(sd, share, emptied):
    module = logged(LatentDiffusion(sd, caption_dropout=share))
    texts = []
    encode = sd.text.conditioning
    sd.text.conditioning = lambda prompts: texts.extend(prompts) or encode(prompts)
    module.training_step({"latents": torch.randn(8, 4, 8, 8), "captions": ["a cat"] * 8}, 0)
    assert texts.count("") == emptied and texts.count("a cat") == 8 - emptied


def test_two_text_encoders_give_the_unet_a_pooled_vector_and_zeros_for_no_caption():
    """SDXL's structure: rows without a caption are those that guidance guides away from; sizes come with the batch."""
    first, second = (Tokenizer(merges=300, context_length=16, pad=pad) for pad in ("end", "zero"))
    shape = {"layers": 2, "heads": 2, "max_length": 16}
    clip = ClipText(first, hidden_size=16, intermediate_size=32, skip=1, **shape)
    text = TextPair(clip, OpenClipText(second, hidden_size=24, pools=True, **shape))
    unet = UNet(model_channels=16, channel_mult=(1, 2), num_heads=2, context_dim=40, pooled_dim=24, pixels=2)
    vae = AutoencoderKL(ch=8, ch_mult=(1, 2), num_res_blocks=1, mid_attention=False)
    module = logged(LatentDiffusion(StableDiffusion(unet, vae, text, Schedule()), caption_dropout=0.5))
    seen, predict = [], module.predict
    module.predict = lambda latents, timesteps, context: seen.append(context) or predict(latents, timesteps, context)
    torch.manual_seed(0)
    batch = {"latents": torch.randn(8, 4, 8, 8), "captions": ["a cat"] * 8, "sizes": torch.full((8, 6), 16)}
    module.training_step(batch, 0).backward()
    (context,) = seen
    dropped = (context.text == 0).all(2).all(1)
    assert 0 < dropped.sum() < 8 and torch.equal(dropped, (context.pooled == 0).all(1))
    expected = text.context(text.tokenizer(["a cat"]))
    torch.testing.assert_close(context.text[~dropped][:1], expected.text)
    torch.testing.assert_close(context.pooled[~dropped][:1], expected.pooled)
    assert torch.equal(context.sizes, batch["sizes"])


def test_diffusion_trains_unet_and_text_tower_and_never_the_autoencoder(sd):
    module = logged(LatentDiffusion(sd))
    module.trainer = SimpleNamespace(max_steps=10)
    before = {name: value.clone() for name, value in sd.state_dict().items()}
    optimizer = module.configure_optimizers()["optimizer"]
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(3):
        optimizer.zero_grad()
        module.training_step({"latents": torch.randn(8, 4, 8, 8), "captions": ["a cat"] * 8}, 0).backward()
        optimizer.step()
    changed = {name.split(".")[0] for name, value in sd.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"unet", "text"}


def test_diffusion_weights_have_the_names_of_a_checkpoint(sd):
    names = LatentDiffusion(sd).weights()
    assert {name.split(".")[0] for name in names} == {"model", "first_stage_model", "cond_stage_model"}
    assert len(names) == len(sd.state_dict())


def test_v_prediction_is_refused(sd):
    sd.schedule = Schedule(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="v_prediction"):
        LatentDiffusion(sd)


def test_autoencoder_loss_is_l1_plus_l2_plus_kl():
    torch.manual_seed(0)
    vae = AutoencoderKL(ch=8, ch_mult=(1, 2), num_res_blocks=1, mid_attention=False)
    module = logged(AutoencoderTraining(vae, kl_weight=0.25))
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.manual_seed(2)
    loss = module.training_step({"images": images}, 0)
    torch.manual_seed(2)
    mean, logvar = vae.moments(images)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    decoded = vae.decode(vae.scale_factor * (mean + posterior.scale * torch.randn_like(mean)))
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    expected = F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + 0.25 * kl
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert module.seen["train/kl"] == pytest.approx(kl.item(), rel=1e-4)


@pytest.fixture
def clip() -> Clip:
    torch.manual_seed(0)
    return Clip(tiny_text(), image_size=16, patch_size=8, width=16, layers=1, heads=2, features=8)


def test_clip_features_are_unit_vectors_of_every_image_size(clip):
    for side in (16, 24):
        features = clip.image_features(torch.rand(3, 3, side, side))
        assert features.shape == (3, 8)
        torch.testing.assert_close(features.norm(dim=1), torch.ones(3))


def test_clip_reads_texts_at_their_first_end_token(clip):
    alone, batched = clip.text_features(["a cat"]), clip.text_features(["a cat", "a photo of a dog on snow"])
    torch.testing.assert_close(alone[0], batched[0])
    assert (batched[0] - batched[1]).abs().max() > 1e-3
    pad = clip.text.tokenizer.pad
    clip.text.tokenizer.pad = 5  # what follows the end token does not matter
    torch.testing.assert_close(clip.text_features(["a cat"]), alone)
    clip.text.tokenizer.pad = pad


def test_contrastive_loss_of_indistinguishable_pairs_is_log_of_their_number(clip):
    module = logged(ClipTraining(clip))
    batch = {"images": torch.zeros(4, 3, 16, 16), "captions": ["a cat"] * 4}
    assert module.training_step(batch, 0).item() == pytest.approx(np.log(4), rel=1e-4)


def test_labels_are_read_from_both_towers_beside_the_contrast(clip):
    module = logged(ClipTraining(clip, parts=[3, 2]))
    torch.nn.init.zeros_(module.reader.weight)
    torch.nn.init.zeros_(module.reader.bias)
    labels = torch.tensor([[0, 1], [2, 0], [1, 1], [0, 0]])
    batch = {"images": torch.zeros(4, 3, 16, 16), "captions": ["a cat"] * 4, "labels": labels}
    blind = np.log(4) + 2 * (np.log(3) + np.log(2))  # a reader of zeros guesses evenly
    assert module.training_step(batch, 0).item() == pytest.approx(blind, rel=1e-4)

    with torch.no_grad():
        module.reader.bias[0] = 2.0  # leans to the first class of the first label, which half of the batch has
    features = F.normalize(torch.randn(4, clip.text_projection.out_features), dim=1)
    first = -torch.tensor([2.0, 0, 0]).log_softmax(0)[labels[:, 0]].mean()
    assert module.reading(features, labels).item() == pytest.approx(first.item() + np.log(2), rel=1e-5)


def test_the_reader_is_not_exported(clip):
    assert set(ClipTraining(clip, parts=[3, 2]).weights()) == set(clip.state_dict())


def test_exported_weights_are_the_modules_in_half_precision(tmp_path, clip):
    module = ClipTraining(clip)
    ExportWeights().on_train_end(SimpleNamespace(default_root_dir=tmp_path), module)
    stored = load_file(tmp_path / "models" / "weights.safetensors")
    assert set(stored) == set(clip.state_dict())
    for name, tensor in clip.state_dict().items():
        assert torch.equal(stored[name], tensor.half())
