"""What each figure is called, and which way is better; docs/metrics.md defines them."""

from typing import NamedTuple

LOWER, HIGHER = "lower is better", "higher is better"
ARROWS = {LOWER: " ↓", HIGHER: " ↑", "": ""}
LIKENESS, CHANGE = ("identity", "dino", "clip_i"), "lfd_context"  # the primary endpoints: the first that there is, and
CONSTRUCTION = ("lfd_superclass", "lfd_neighbours", "lfd_none", "drift")  # 0 for a method anchored to its own word
KEPT = ("noun", "right_background", "right_place", "right_style")  # what the message says to be kept or lost
READ_AGAINST = {  # parts of a figure -> their rows in tables
    "base": "base model",
    "floor": "floor",
    "ceiling": "ceiling",
    "ceiling_decoded": "ceiling through the autoencoder",
}


class Metric(NamedTuple):
    """How a figure is shown; `percent`: as a share."""

    title: str
    better: str = ""
    percent: bool = False

    @property
    def head(self) -> str:
        return self.title + ARROWS[self.better]


FAMILIES = {  # heading -> what its table answers, and its metrics
    "The concept": (
        "Samples of the concept in many settings, compared with its photos and with their prompts.",
        {
            "identity": Metric("likeness (identity)", HIGHER),
            "dino": Metric("likeness (DINO)", HIGHER),
            "dinov2": Metric("likeness (DINOv2)", HIGHER),
            "clip_i": Metric("likeness (CLIP-I)", HIGHER),
            "silhouette": Metric("silhouette", HIGHER),
            "colour": Metric("colour", HIGHER),
            "texture": Metric("texture", HIGHER),
            "noun": Metric("noun kept", HIGHER, percent=True),
            "clip_t": Metric("agreement with the prompt (CLIP-T)", HIGHER),
            "div": Metric("variety (DIV)", HIGHER),
        },
    ),
    "The rest of the model": (
        "Latent Fisher divergence (LFD): how differently both models predict the same noise; 0 is the same. Its "
        "floor is that of the untrained method. Drift and PRES are of prompts without the concept.",
        {
            "lfd_context": Metric("LFD, around the concept", LOWER),
            "lfd_superclass": Metric("LFD, plain noun", LOWER),
            "lfd_neighbours": Metric("LFD, neighbouring nouns", LOWER),
            "lfd_none": Metric("LFD, no noun", LOWER),
            "drift": Metric("drift", LOWER),
            "pres": Metric("concept in the plain noun (PRES)", LOWER),
        },
    ),
    "The surroundings": (
        "Distance of the concept’s samples from the untouched model’s of the plain noun, part of which is the concept "
        "itself. The floor is that of two batches of the untouched model’s.",
        {
            "w2_latent": Metric("W2, latents", LOWER),
            "w2_latent_exact": Metric("W2, latents, by pairing", LOWER),
            "w2_clip": Metric("W2, CLIP features", LOWER),
            "w2_clip_exact": Metric("W2, CLIP features, by pairing", LOWER),
            "kid": Metric("KID", LOWER),
        },
    ),
    "The rest of the prompt": (
        "How often a classifier of the pocket world, where every scene is known, sees what was asked for.",
        {
            "right_background": Metric("background as prompted", HIGHER, percent=True),
            "right_style": Metric("style as prompted", HIGHER, percent=True),
            "right_place": Metric("place as prompted", HIGHER, percent=True),
            "photos_background": Metric("the photos’ background", LOWER, percent=True),
            "leakage": Metric("leakage of that background", LOWER, percent=True),
        },
    ),
}
METRICS = {name: metric for _, metrics in FAMILIES.values() for name, metric in metrics.items()}


def metric_of(name: str) -> Metric:
    """How a figure is shown; one that has no words here is shown by its name."""
    return METRICS.get(name, Metric(name.replace("_", " ")))
