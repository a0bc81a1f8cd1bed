"""What each figure is called, which way is better, and what it means to someone who has not read a paper."""

from dataclasses import dataclass

LOWER, HIGHER, NEITHER = "lower is better", "higher is better", ""


@dataclass(frozen=True)
class Metric:
    """How a figure is shown.

    Attributes:
        title: in tables. better: which way. text: in plain words, for the list of terms.
        base, ceiling: what these are called beside it.
        percent: whether it is shown as a share.
    """

    title: str
    better: str
    text: str
    base: str = "base model"
    ceiling: str = "photos among themselves"
    percent: bool = False


@dataclass(frozen=True)
class Family:
    """Metrics of one table.

    Attributes:
        question: its heading. text: what the table answers. metrics: their names.
    """

    question: str
    text: str
    metrics: tuple[str, ...]


WORLD = "the concept itself, drawn by the world"
DISTANCE = "Read it against the floor: what the same measurement gives for two batches of the base model’s samples."
METRICS = {
    "lfd_context": Metric(
        "around the concept",
        LOWER,
        "Prompts that name the concept, and the change counted only outside the place where it stands: how far "
        "learning it has spread to everything around it. Every method has something to lose here.",
    ),
    "lfd_superclass": Metric(
        "plain noun",
        LOWER,
        "Prompts with the plain noun: whether every such thing has become the concept.",
    ),
    "lfd_neighbours": Metric("neighbouring nouns", LOWER, "Prompts with nouns of the same kind."),
    "lfd_none": Metric("no noun", LOWER, "Prompts that name nothing of the kind."),
    "w2_latent": Metric(
        "latents",
        LOWER,
        "Of the model’s own compressed pictures (averaged over a grid of 4 × 4), by normal distributions of the same "
        f"mean and spread. {DISTANCE}",
    ),
    "w2_latent_exact": Metric("latents, sample by sample", LOWER, "The same by the cheapest pairing of samples."),
    "w2_clip": Metric(
        "CLIP features", LOWER, f"Of what CLIP, a model that matches pictures with captions, sees in them. {DISTANCE}"
    ),
    "w2_clip_exact": Metric("CLIP features, sample by sample", LOWER, "The same by the cheapest pairing of samples."),
    "clip_i": Metric(
        "likeness to the photos (CLIP-I)",
        HIGHER,
        "How close samples and photos are for CLIP: the cosine of their features, 1 for the same picture. It sees the "
        "background too, so that copying the photos’ background raises it; the photos’ likeness among themselves is "
        "out of reach where prompts ask for other places.",
    ),
    "dino": Metric(
        "likeness to the photos (DINO)",
        HIGHER,
        "The same for DINO, a model that was trained without captions and keeps apart what CLIP calls by one name.",
    ),
    "clip_t": Metric(
        "agreement with the prompt (CLIP-T)",
        HIGHER,
        "The cosine of a sample’s CLIP features and those of its prompt, where the plain noun stands for the concept.",
    ),
    "div": Metric(
        "variety of one prompt’s samples (DIV)",
        HIGHER,
        "Mean distance of samples of one prompt. Falls where a model has learned its few photos by heart.",
    ),
    "drift": Metric(
        "drift",
        LOWER,
        "How much pictures of prompts without the concept change, from the same seeds: (1 − cos) / 2 of their CLIP "
        "features, 0 for the same picture.",
    ),
    "pres": Metric(
        "concept in the plain noun (PRES)",
        LOWER,
        "How like the concept’s photos samples of the plain noun are. Above the base model’s own, the noun has been "
        "taken over by the concept.",
    ),
    "right_background": Metric(
        "background as prompted",
        HIGHER,
        "How often a classifier, trained on the pocket world alone, sees in a sample the background that its prompt "
        "names.",
        ceiling=WORLD,
        percent=True,
    ),
    "right_style": Metric("style as prompted", HIGHER, "The same of photo or cartoon.", ceiling=WORLD, percent=True),
    "right_place": Metric(
        "place as prompted",
        HIGHER,
        "The same of the place in the picture, for prompts that name one.",
        ceiling=WORLD,
        percent=True,
    ),
    "photos_background": Metric(
        "the photos’ background",
        LOWER,
        "How often it sees the background of the concept’s photos where the prompt names another.",
        ceiling=WORLD,
        percent=True,
    ),
    "leakage": Metric(
        "leakage of that background",
        LOWER,
        "Share of the picture around the concept that is more like the photos’ background than like the prompted one.",
        ceiling=WORLD,
        percent=True,
    ),
}

FAMILIES = (
    Family(
        "Is the concept there?",
        "Samples of the concept in many settings, held against its photos and against their prompts.",
        ("clip_i", "dino", "clip_t", "div"),
    ),
    Family(
        "Has the rest of the model changed?",
        "Latent Fisher divergence (LFD): noise is added to the untouched model’s own pictures, both models say what "
        "they take for noise, and the mean squared difference of the two answers is counted. 0 is the same "
        "model; 1 would be a difference as large as the noise itself.",
        ("lfd_context", "lfd_superclass", "lfd_neighbours", "lfd_none"),
    ),
    Family(
        "Has the concept taken its surroundings along?",
        "Distance (2-Wasserstein, W2) between what the customised model draws for the concept and what the untouched "
        "model draws for the plain noun, over the same prompts and seeds. Some of it is the concept itself.",
        ("w2_latent", "w2_latent_exact", "w2_clip", "w2_clip_exact"),
    ),
    Family(
        "What becomes of prompts without the concept?",
        "The same prompts and seeds, drawn by both models.",
        ("drift", "pres"),
    ),
    Family(
        "What can be counted exactly?",
        "On the pocket world every prompt’s scene is known, and so is the background of the concept’s photos.",
        ("right_background", "right_style", "right_place", "photos_background", "leakage"),
    ),
)
CONSTRUCTION = ("lfd_superclass", "lfd_neighbours", "lfd_none", "drift")  # 0 for a method anchored to its own word
