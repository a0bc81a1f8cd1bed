"""Rebuild the sprite atlas of pocket two's world from three sets of emoji drawings.

    npm install @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 \\
        emoji-datasource-google@16.0.0
    python -m scripts.pocket_two.build_atlas --packages node_modules

Fluent 3D (MIT) gives the sprites of the style "photo", Noto (Apache-2.0) those of "cartoon"; Twemoji (CC-BY-4.0) is a
third drawing of the same nouns that the world never shows, from which concepts with an unseen shape are made.
"""

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path

import resvg_py
from PIL import Image

from data.pocket_two.scene import NOUNS
from data.pocket_two.world import ATLAS

SPRITE = 48  # pixels; objects are drawn 28 to 46 pixels wide, so sprites are only ever reduced

# Names whose drawing is found under another name in emoji-datasource-google.
ALIASES = {"backpack": "school_satchel", "hat": "tophat"}


def code_points(packages: Path) -> dict[str, str]:
    """Name of an emoji, long or short -> its code point in hexadecimal, without the variation selector.

    A short name wins where both exist: "cat" is the whole animal there.
    """
    entries = json.loads((packages / "emoji-datasource-google" / "emoji.json").read_text())
    names = {entry[key].lower(): entry["unified"] for key in ("name", "short_name") for entry in entries}
    return {name: code.lower().replace("-fe0f", "") for name, code in names.items()}


class Icons:
    """SVG drawings of one iconify package, rasterised."""

    def __init__(self, folder: Path):
        self.icons = json.loads((folder / "icons.json").read_text())
        self.names = json.loads((folder / "chars.json").read_text())

    def draw(self, code: str) -> Image.Image:
        icon = self.icons["icons"][self.names[code]]
        width = icon.get("width", self.icons.get("width", 16))
        height = icon.get("height", self.icons.get("height", 16))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256))))


def fit(drawing: Image.Image) -> Image.Image:
    """Cut the empty margin, then fit the drawing into a square sprite with one pixel of margin."""
    drawing = drawing.convert("RGBA")
    drawing = drawing.crop(drawing.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox())
    scale = (SPRITE - 2) / max(drawing.size)
    size = tuple(max(1, round(side * scale)) for side in drawing.size)
    sprite = Image.new("RGBA", (SPRITE, SPRITE))
    sprite.paste(drawing.resize(size, Image.Resampling.LANCZOS), tuple((SPRITE - side) // 2 for side in size))
    return sprite


def build(packages: Path, codes: Sequence[str], out: Path) -> None:
    """Writes an atlas with a column for each code point, and a row for each drawing set: Fluent 3D, Noto, Twemoji."""
    noto, twemoji = (Icons(packages / "@iconify-json" / name) for name in ("noto", "twemoji"))
    fluent = packages / "@lobehub" / "fluent-emoji-3d" / "assets"
    atlas = Image.new("RGBA", (SPRITE * len(codes), SPRITE * 3))
    for column, code in enumerate(codes):
        webp = next(path for path in (fluent / f"{code}.webp", fluent / f"{code}-fe0f.webp") if path.exists())
        drawings = (Image.open(webp), noto.draw(code), twemoji.draw(code))
        for row, drawing in enumerate(drawings):
            atlas.paste(fit(drawing), (SPRITE * column, SPRITE * row))
    atlas.save(out, optimize=True)


def parse(description: str, atlas: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--packages", type=Path, required=True, help="the node_modules folder with the four packages")
    parser.add_argument("--out", type=Path, default=atlas, help="atlas to write (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    flags = parse(__doc__.splitlines()[0], ATLAS)
    codes = code_points(flags.packages)
    build(flags.packages, [codes[ALIASES.get(noun, noun)] for noun in NOUNS], flags.out)


if __name__ == "__main__":
    main()
