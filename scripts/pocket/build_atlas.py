"""Rebuild the sprite atlas of the pocket world from three sets of emoji drawings.

    npm install @lobehub/fluent-emoji-3d @iconify-json/noto @iconify-json/twemoji emoji-datasource-google
    python -m scripts.pocket.build_atlas --packages node_modules

Fluent 3D (MIT) gives the sprites of the style "photo", Noto (Apache-2.0) those of "cartoon"; Twemoji (CC-BY-4.0) is a
third drawing of the same nouns that the world never shows, from which concepts with an unseen shape are made.
"""

import json
from pathlib import Path

from data.pocket.world import ATLAS, NOUNS
from scripts.pocket_two.build_atlas import build, parse

# Names whose drawing is found under another name in emoji-datasource-google.
ALIASES = {"apple": "red apple", "airplane": "airplane", "avocado": "avocado", "backpack": "school satchel",
           "balloon": "balloon", "bee": "honeybee", "book": "closed book", "bus": "bus", "car": "automobile",
           "cat": "cat face", "cow": "cow face", "crown": "crown", "dog": "dog face", "fish": "tropical fish",
           "gift": "wrapped present", "hat": "top hat", "horse": "horse face", "pig": "pig face",
           "pizza": "slice of pizza", "rabbit": "rabbit face", "umbrella": "umbrella with rain drops"}  # fmt: skip


def code_points(packages: Path) -> dict[str, str]:
    """Lower-case emoji name -> code point in hexadecimal, without the variation selector."""
    entries = json.loads((packages / "emoji-datasource-google" / "emoji.json").read_text())
    return {entry["name"].lower(): entry["unified"].lower().replace("-fe0f", "") for entry in entries}


def main() -> None:
    flags = parse(__doc__.splitlines()[0], ATLAS)
    codes = code_points(flags.packages)
    build(flags.packages, [codes[ALIASES.get(noun, noun)] for noun in NOUNS], flags.out)


if __name__ == "__main__":
    main()
