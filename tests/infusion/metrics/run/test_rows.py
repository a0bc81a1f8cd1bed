"""Rows of words and of pictures, and what figures are read against."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from infusion.metrics.measures import fidelity
from infusion.metrics.measures.kid import kid
from infusion.metrics.run.evaluate import check, evaluate
from infusion.metrics.run.features import ZeroShot, crop_to
from infusion.metrics.run.options import EVALUATION_SEED, METRICS, Tools, lacks, metrics_of
from infusion.metrics.run.protocol import CONTEXT, GROUPS
from infusion.metrics.run.subject import Pictures, Subject, in_words, untrained
from infusion.sampling.sample import sample
from tests.infusion.metrics.conftest import ROUNDING

PHOTOS = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
DRAWING = {"steps": 2, "scale": 2.0, "seed": EVALUATION_SEED}
OF_SAMPLES = ("w2", "kid", "clip_t", "clip_i", "noun", "div")


class Colours:
    """Features that are mean colours."""

    name, width = "colours", 3

    def __call__(self, images):
        return F.normalize(images.mean((2, 3)) + 0.1, dim=1)


class Corner:
    """In place of CLIPSeg: everything stands in a corner."""

    def masks(self, images, prompts):
        masks = torch.zeros(len(images), 16, 16)
        masks[:, :4, :4] = 0.5
        return masks


class Bright:
    """Sees a cat in what is bright at the left."""

    name, nouns = "bright", ("cat", "dog")

    def sees(self, images, noun):
        return [(noun == "cat") == bool(image[:, :, :8].mean() > image[:, :, 8:].mean()) for image in images]


@pytest.fixture
def whole(options):
    return replace(options, metrics=tuple(name for name in METRICS if name not in ("dino", "dinov2", "exact")))


@pytest.fixture
def everything(tools):
    return replace(tools, identity=Colours(), classifier=Bright())


def test_words_are_the_base_model_told_them(sd, protocol, whole, everything, subject, cache):
    concept = subject("infusion").with_photos(PHOTOS, "cats")
    (row,) = in_words([concept], ["a striped blue cat"])
    found = evaluate(sd, row, protocol, whole, cache, everything)
    assert (found["kind"], found["group"], found["label"]) == ("words", "words", "words: a striped blue cat")
    assert found["described"] == "a striped blue cat" and found["photos"] == "cats" and not found["training"]
    names = {
        "w2_latent",
        "w2_latent_exact",
        "w2_clip",
        "w2_clip_exact",
        "kid",
        "clip_t",
        "identity",
        "clip_i",
        "noun",
        "div",
    }
    assert set(found["figures"]) == names
    prompts = [prompt.replace("{}", "striped blue cat") for prompt in protocol.concept] * 2
    drawn = sd.sample(prompts, **DRAWING)
    like = fidelity.pairwise(everything.clip(drawn), everything.clip(PHOTOS)).mean().item()
    assert found["figures"]["clip_i"]["value"] == pytest.approx(like, abs=1e-4)
    assert found["figures"]["clip_i"]["base"]["value"] != found["figures"]["clip_i"]["value"]
    assert "beta" not in found["figures"]["clip_i"]["settings"]


def test_one_row_of_words_for_a_concept_however_often_it_was_learned(subject):
    cat = subject("infusion").with_photos(PHOTOS, "photos/cat")
    again, dog = replace(cat, label="again"), replace(cat, label="dog", photos_from="photos/dog")
    assert [row.label for row in in_words([cat, again], ["a blue cat"] * 2)] == ["words: a blue cat"]
    rows = in_words([cat, again, dog], ["a blue cat", "a blue cat", "an old dog"])
    assert [(row.label, row.described, row.photos_from) for row in rows] == [
        ("words cat", "a blue cat", "photos/cat"),
        ("words dog", "an old dog", "photos/dog"),
    ]
    namesake = replace(dog, photos_from="others/cat")
    labels = [row.label for row in in_words([cat, namesake], ["a blue cat", "a red cat"])]
    assert labels == ["words cat", "words others/cat: a red cat"] and in_words([cat], [""]) == []


def test_pictures_are_measured_as_they_are(sd, protocol, whole, everything, subject, cache):
    """A concept's own samples, as pictures, have the concept's figures."""
    learned = subject("lora", learning_rate=0.05).with_photos(PHOTOS, "cats")
    options = replace(whole, metrics=(*OF_SAMPLES, "identity", "lfd", "drift", "pres"))
    theirs = evaluate(sd, learned, protocol, options, cache, everything)
    images = sample(sd, list(protocol.concept) * 2, [learned.concept], **DRAWING)
    row = Subject(
        "peft", photos=PHOTOS, pictures=Pictures("elsewhere", images, protocol.concept, "in turn"), superclass="cat"
    )
    found = evaluate(sd, row, protocol, options, cache, everything)
    assert (found["kind"], found["label"], found["group"]) == ("pictures", "peft", "peft")
    assert found["prompts_by"] == "in turn" and found["file"] == "elsewhere"
    assert not {"lfd_none", "drift", "pres"} & set(found["figures"])
    for name in ("w2_clip", "kid", "clip_t", "clip_i", "identity", "noun", "div"):
        ours, one = found["figures"][name], theirs["figures"][name]
        assert ours["value"] == pytest.approx(one["value"], abs=1e-4), name
        assert ours.get("base") == one.get("base") and ours["n"] == one["n"], name
    json.dumps({key: value for key, value in found.items() if key != "pictures"}, allow_nan=False)


def test_pictures_of_a_prompt_each_have_no_diversity_and_need_no_more_samples(sd, protocol, options, tools, cache):
    pictures = Pictures("", torch.rand(5, 3, 16, 16), tuple(f"a {{}} in room {i}" for i in range(5)))
    row = Subject("five", pictures=pictures, superclass="cat")
    options = replace(options, metrics=("div", "clip_t"), samples=2)
    figures = evaluate(sd, row, protocol, options, cache, tools)["figures"]
    assert set(figures) == {"clip_t"} and figures["clip_t"]["n"] == 5


def test_too_few_pictures_for_a_distance_between_clouds_are_named(sd, protocol, options, tools, cache):
    row = Subject("two", pictures=Pictures("drawn/two", torch.rand(2, 3, 16, 16), ("a {}",)), superclass="cat")
    with pytest.raises(ValueError, match=r"--pictures: .*\(kid\) needs at least 3 pictures in drawn/two, not 2"):
        evaluate(sd, row, protocol, replace(options, metrics=("kid",)), cache, tools)


@pytest.mark.parametrize("method", ["infusion", "lora", "custom_diffusion", "perfusion"])
def test_every_divergence_has_that_of_the_untrained_method(sd, protocol, options, tools, subject, method, cache):
    options = replace(options, metrics=("lfd",))
    figures = evaluate(sd, subject(method), protocol, options, cache, tools)["figures"]
    itself = evaluate(sd, subject(method, steps=0), protocol, options, cache, tools)["figures"]
    rare = method in ("lora", "custom_diffusion")
    for name in GROUPS:
        floor = figures[f"lfd_{name}"]["floor"]
        assert set(floor) == {"value", "stderr", "n"} and floor["n"] == 4
        assert floor["value"] == pytest.approx(itself[f"lfd_{name}"]["value"], rel=1e-6, abs=1e-10)
        assert (floor["value"] > 1e-6) == (rare and name == CONTEXT), name
        assert floor["value"] <= (ROUNDING if name == CONTEXT else 0) or method != "infusion"


def test_trainings_of_one_kind_share_their_floor(sd, subject):
    first, second = (untrained(sd, subject("lora", steps=steps).concept) for steps in (1, 2))
    assert first.sha256 == second.sha256 and first.concept.steps == 0


def test_a_likeness_has_a_ceiling_through_the_autoencoder(sd, protocol, options, everything, subject, cache):
    options = replace(options, metrics=("identity", "clip_i"))
    found = evaluate(sd, subject("infusion").with_photos(PHOTOS), protocol, options, cache, everything)["figures"]
    decoded = sd.decode(sd.vae.encode(PHOTOS * 2 - 1))
    for metric, network in (("identity", everything.identity), ("clip_i", everything.clip)):
        wanted = fidelity.among(network(PHOTOS), network(decoded)).mean().item()
        assert found[metric]["ceiling_decoded"]["value"] == pytest.approx(wanted, abs=1e-5)
        assert found[metric]["ceiling"]["value"] == pytest.approx(
            fidelity.among(network(PHOTOS)).mean().item(), abs=1e-6
        )
    assert found["identity"]["settings"]["backbone"] == "colours"


def test_the_noun_is_counted_by_a_classifier_or_by_clip(sd, protocol, options, everything, subject, cache):
    options, learned = replace(options, metrics=("noun",)), subject("lora", learning_rate=0.5).with_photos(PHOTOS)
    found = evaluate(sd, learned, protocol, options, cache, everything)["figures"]["noun"]
    base = sd.sample([prompt.replace("{}", "cat") for prompt in protocol.concept] * 2, **DRAWING)
    assert found["base"]["value"] == sum(Bright().sees(base, "cat")) / 4 and found["settings"]["classifier"] == "bright"
    assert found["ceiling"]["value"] == sum(Bright().sees(PHOTOS, "cat")) / 3
    tools = replace(everything, classifier=None)
    found = evaluate(sd, learned, protocol, options, cache, tools)["figures"]["noun"]
    reader = ZeroShot(tools.clip, ("cat", "dog", "owl"))
    assert found["base"]["value"] == sum(reader.sees(base, "cat")) / 4
    assert found["settings"]["classifier"] == "fake, zero-shot" and found["settings"]["nouns"] == 3


def test_kid_and_w2_say_how_many_samples_and_numbers_they_are_of(sd, protocol, options, tools, subject, cache):
    options, learned = replace(options, metrics=("w2", "kid")), subject("lora", learning_rate=0.5)
    figures = evaluate(sd, learned, protocol, options, cache, tools)["figures"]
    for name, width in (("kid", 48), ("w2_clip", 48), ("w2_latent", 64)):
        settings = figures[name]["settings"]
        assert settings["samples"] == 4 and settings["dimensions"] == width, name
    templates = list(protocol.concept) * 2
    base = sd.sample([template.replace("{}", "cat") for template in templates], **DRAWING)
    ours = sample(sd, templates, [learned.concept], **DRAWING)
    wanted = kid(tools.clip(base), tools.clip(ours))
    assert figures["kid"]["value"] == pytest.approx(wanted.value, abs=1e-5)
    assert figures["kid"]["stderr"] == pytest.approx(wanted.stderr, rel=1e-2)
    assert figures["kid"]["floor"]["n"] == 4


def test_under_which_law_and_with_which_network_is_said(sd, protocol, options, tools, subject, cache):
    options = replace(options, metrics=("lfd", "drift"))
    figures = evaluate(sd, subject("infusion"), protocol, options, cache, tools)["figures"]
    settings = figures["lfd_context"]["settings"]
    assert settings["x_0"] == "base samples, guidance 2" and settings["predictions"] == "without guidance"
    assert figures["drift"]["settings"]["backbone"] == "fake" and "DINOv2" in fidelity.__doc__


def test_cropping_compares_subjects_alone(sd, protocol, options, everything, subject, cache):
    options, learned = replace(options, metrics=("identity", "clip_i")), subject("infusion").with_photos(PHOTOS)
    everything = replace(everything, clipseg=Corner())
    whole = evaluate(sd, learned, protocol, options, cache, everything)["figures"]
    cropped = evaluate(sd, learned, protocol, replace(options, crop=True), cache, everything)["figures"]
    assert cropped["identity"]["value"] == whole["identity"]["value"]  # of a network that knows whole scenes
    assert cropped["clip_i"]["value"] != whole["clip_i"]["value"] and "crop" in cropped["clip_i"]["settings"]
    corners = crop_to(PHOTOS, everything.clipseg.masks(PHOTOS, []))
    photos = fidelity.among(everything.clip(corners)).mean().item()
    assert cropped["clip_i"]["ceiling"]["value"] == pytest.approx(photos, abs=1e-5)
    with pytest.raises(ValueError, match="--crop needs it"):
        check(learned, protocol, replace(options, metrics=("clip_t",), crop=True), Tools(clip=everything.clip))


def test_a_crop_is_the_square_around_a_mask():
    images, masks = torch.zeros(2, 3, 40, 40), torch.zeros(2, 20, 20)
    images[0, :, 10:20, 10:20] = images[1, :, 36:, 36:] = 1.0
    masks[0, 5:10, 5:10] = masks[1, 18:, 18:] = 0.3
    masks[0, 15, 15] = 0.1  # faint
    found = crop_to(images, masks)
    assert found.shape == (2, 3, 40, 40)
    assert found[0].mean() == pytest.approx((10 / 12) ** 2, abs=0.02)  # a tenth more on each side
    assert found[1, 0, -8:, -8:].min() > 0.9  # moved into the picture


def test_one_place_says_which_rows_have_what(subject):
    concept = subject("infusion")
    (words,) = in_words([concept], ["a blue cat"])
    assert metrics_of(concept, METRICS) == list(METRICS)
    assert metrics_of(words, ("lfd", "clip_t", "drift")) == ["clip_t"]
    assert lacks("clip_i", concept, {"clip"}).startswith("--images: clip_i compares")
    assert lacks("clip_i", concept.with_photos(PHOTOS), {"clip"}) == ""
    assert lacks("noun", concept, set()).startswith("--clip: ") and lacks("noun", concept, {"classifier"}) == ""


def test_samples_seen_are_steps_times_the_batch_where_it_is_known(subject):
    known = subject("infusion")
    assert known.about()["training_samples"] is None
    checkpoint = replace(known.last, concept=replace(known.concept, steps=5, batch_size=16))
    assert replace(known, checkpoints=(checkpoint,)).about()["training_samples"] == 80
