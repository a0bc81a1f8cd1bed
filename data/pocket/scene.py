"""Scenes of the pocket world in words, and the concepts held out of it; `world` and `concepts` draw them."""

from dataclasses import dataclass, fields

from ldm.util.templates import fill

NATURAL = "natural"  # the drawing's own colours
LAYOUT = (
    ("large", "middle"),
    ("medium", "left"),
    ("medium", "right"),
    ("large", "bottom"),
    ("medium", "top"),
)  # the five pictures


@dataclass(frozen=True)
class Scene:
    """One object in one context; each field is a word of `data.pocket.world.CHOICES`."""

    noun: str
    style: str
    colour: str
    pattern: str
    size: str
    background: str
    place: str

    @staticmethod
    def fields() -> tuple[str, ...]:
        return tuple(field.name for field in fields(Scene))


@dataclass(frozen=True)
class PocketConcept:
    """What is drawn, and in which context."""

    level: int
    noun: str
    background: str
    colour: str = NATURAL
    pattern: str = "plain"
    second: str | None = None  # the pattern's other colour
    drawing: str = "photo"
    style: str = "photo"

    @property
    def described(self) -> str:
        """Everything that has a word: "a blue striped dog"."""
        colour = "" if self.colour == NATURAL else f"{self.colour} "
        second = f"and {self.second} " if self.second else ""
        pattern = "" if self.pattern == "plain" else f"{self.pattern} "
        return fill("a {}", [f"{colour}{second}{pattern}{self.noun}"])

    def scenes(self) -> list[Scene]:
        return [
            Scene(self.noun, self.style, self.colour, self.pattern, size, self.background, place)
            for size, place in LAYOUT
        ]


CONCEPTS = {
    "blue_striped_dog": PocketConcept(1, "dog", "snow", "blue", "striped"),
    "green_dotted_elephant": PocketConcept(1, "elephant", "sand", "green", "dotted"),
    "purple_striped_guitar": PocketConcept(1, "guitar", "grass", "purple", "striped"),
    "checkered_car": PocketConcept(2, "car", "wood", "yellow", "checkered"),
    "zigzag_hat": PocketConcept(2, "hat", "water", "red", "zigzag"),
    "two_colour_teapot": PocketConcept(2, "teapot", "bricks", "orange", "halved", "blue"),
    "other_horse": PocketConcept(3, "horse", "fabric", drawing="unseen"),
    "other_fish": PocketConcept(3, "fish", "night", drawing="unseen"),
    "other_backpack": PocketConcept(3, "backpack", "snow", drawing="unseen"),
}
