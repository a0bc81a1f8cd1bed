"""What each figure is called, which way is better, and what it means to someone who has not read a paper."""

from dataclasses import dataclass

LOWER, HIGHER = "lower is better", "higher is better"
ARROWS = {LOWER: " ↓", HIGHER: " ↑"}
PHOTOS, WORLD = "photos among themselves", "the concept itself, drawn by the world"
CONSTRUCTION = ("lfd_superclass", "lfd_neighbours", "lfd_none", "drift")  # 0 for a method anchored to its own word


@dataclass(frozen=True)
class Metric:
    """How a figure is shown.

    Attributes:
        title: in tables. better: which way. text: in plain words, for the list of terms.
        ceiling: what the best possible figure is called. percent: whether it is shown as a share.
        family: before the title, where the title stands alone.
    """

    title: str
    better: str
    text: str
    ceiling: str = PHOTOS
    percent: bool = False
    family: str = ""


@dataclass(frozen=True)
class Family:
    """Metrics of one table, by their names; `question` is its heading, `text` what the table answers."""

    question: str
    text: str
    metrics: dict[str, Metric]


def _rate(title: str, better: str, text: str) -> Metric:
    return Metric(title, better, text, ceiling=WORLD, percent=True)


FAMILIES = (
    Family(
        "Is the concept there?",
        "Samples of the concept in many settings, compared with its photos and with their prompts.",
        {
            "clip_i": Metric(
                "likeness to the photos (CLIP-I)",
                HIGHER,
                "How close samples and photos are for CLIP, a model that matches pictures with captions: the cosine of "
                "their features, 1 for the same picture. CLIP sees the background too. Copying the photos’ background "
                "raises the figure, and the photos’ likeness among themselves is out of reach in other places.",
            ),
            "dino": Metric(
                "likeness to the photos (DINO)",
                HIGHER,
                "The same for DINO, a model that was trained without captions and keeps apart what CLIP calls by one "
                "name.",
            ),
            "clip_t": Metric(
                "agreement with the prompt (CLIP-T)",
                HIGHER,
                "The cosine of a sample’s CLIP features and those of its prompt, with the plain noun for the concept.",
            ),
            "div": Metric(
                "variety of one prompt’s samples (DIV)",
                HIGHER,
                "Mean distance between samples of one prompt. It falls when a model has memorised its few photos.",
            ),
        },
    ),
    Family(
        "Has the rest of the model changed?",
        "Latent Fisher divergence (LFD): noise is added to the untouched model’s own pictures, both models predict "
        "that noise, and the mean squared difference of the two predictions is counted. 0 is the same model; 1 would "
        "be a difference as large as the noise itself.",
        {
            "lfd_context": Metric(
                "around the concept",
                LOWER,
                "Prompts that name the concept. Only changes outside the place where it stands are counted: how far "
                "learning it has spread to everything around it. Every method has something to lose here.",
                family="LFD, ",
            ),
            "lfd_superclass": Metric(
                "plain noun",
                LOWER,
                "Prompts with the plain noun: whether every such thing has become the concept.",
                family="LFD, ",
            ),
            "lfd_neighbours": Metric(
                "neighbouring nouns", LOWER, "Prompts with nouns of the same kind.", family="LFD, "
            ),
            "lfd_none": Metric("no noun", LOWER, "Prompts that name nothing of the kind.", family="LFD, "),
        },
    ),
    Family(
        "Has the concept taken its surroundings along?",
        "Distance (2-Wasserstein, W2) between what the customised model draws for the concept and what the untouched "
        "model draws for the plain noun, over the same prompts and seeds. Some of it is the concept itself. Read it "
        "against the floor: the same distance between two batches of the base model’s samples.",
        {
            "w2_latent": Metric(
                "latents",
                LOWER,
                "Of the model’s own compressed pictures (averaged over a grid of 4 × 4), by normal distributions of "
                "the same mean and spread.",
                family="W2, ",
            ),
            "w2_latent_exact": Metric(
                "latents, sample by sample", LOWER, "The same by the cheapest pairing of samples.", family="W2, "
            ),
            "w2_clip": Metric("CLIP features", LOWER, "Of what CLIP sees in the pictures.", family="W2, "),
            "w2_clip_exact": Metric(
                "CLIP features, sample by sample", LOWER, "The same by the cheapest pairing of samples.", family="W2, "
            ),
        },
    ),
    Family(
        "What becomes of prompts without the concept?",
        "The same prompts and seeds, drawn by both models.",
        {
            "drift": Metric(
                "drift",
                LOWER,
                "How much the pictures change: (1 − cos) / 2 of their CLIP features, 0 for the same picture.",
            ),
            "pres": Metric(
                "concept in the plain noun (PRES)",
                LOWER,
                "How like the concept’s photos samples of the plain noun are. Above the base model’s own figure, the "
                "concept has taken over the noun.",
            ),
        },
    ),
    Family(
        "What can be counted exactly?",
        "On the pocket world every prompt’s scene is known, and so is the background of the concept’s photos. A "
        "classifier that was trained on that world alone looks at each sample.",
        {
            "right_background": _rate(
                "background as prompted", HIGHER, "How often it sees the background that the prompt names."
            ),
            "right_style": _rate("style as prompted", HIGHER, "The same for photo or cartoon."),
            "right_place": _rate("place as prompted", HIGHER, "The same for the place in the picture."),
            "photos_background": _rate(
                "the photos’ background",
                LOWER,
                "How often it sees the background of the concept’s photos where the prompt names another.",
            ),
            "leakage": _rate(
                "leakage of that background",
                LOWER,
                "Share of the picture around the concept that is more like the photos’ background than the prompted "
                "one.",
            ),
        },
    ),
)
METRICS = {name: metric for family in FAMILIES for name, metric in family.metrics.items()}
