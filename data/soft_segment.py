"""Masks for a folder of photos, by CLIPSeg: how much each pixel belongs to what a word names.

    python data/soft_segment.py --image_dir photos/cat --super_class cat
    python data/soft_segment.py --image_dir photos/cat --super_class cat --model_weight rd64-uni-refined.pth --clip DIR
    python data/soft_segment.py --image_dir photos/cat --super_class cat --model_weight pocket    # 64-pixel drawings

`photos/cat/IMG_1.jpg` gets `photos/cat/mask/IMG_1.png`, which training finds, and for the eye
`photos/cat/mask/overlay/IMG_1.png`. A mask is CLIPSeg's sigmoid, averaged over the training templates, enlarged
bilinearly to the size of the upright photo and stored in 8 bits of grey. It is not divided by its maximum: training
does that, and the maximum says how surely the word was found. A photo that has a mask keeps it without `--overwrite`,
be it a file or its own alpha channel.

`--model_weight` is a Hugging Face folder of CLIPSeg (the files of `CIDAS/clipseg-rd64-refined`), or the original
decoder file `rd64-uni-refined.pth` with `--clip`, a CLIP ViT-B/16 in transformers' or OpenAI's layout (the files of
`openai/clip-vit-base-patch16`, or open_clip's), or `pocket`. Nothing is downloaded.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.photos import fill_templates, find_photos
from data.prompts import TEMPLATES
from ldm.util.cli import Parser, batch, find_device, report
from ldm.util.defaults import CLIPSEG
from ldm.util.templates import bare


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description="Masks for a folder of photos, by CLIPSeg.")
    add = parser.add_argument
    add("--image_dir", metavar="DIR", help="folder of photos; gets mask/ and mask/overlay/", required=True)
    add("--super_class", metavar="WORD", type=bare, help="what to mask, such as cat", required=True)
    add("--model_weight", metavar="PATH", help="CLIPSeg: a folder, the decoder file, or pocket", default=CLIPSEG)
    add("--clip", metavar="PATH", help="CLIP ViT-B/16, where --model_weight is the decoder alone")
    add("--config", metavar="FILE", help="config whose network, `clipseg`, --model_weight is a file of")
    add("--templates", nargs="+", metavar="TEXT", help="prompts with {}; None: those of training", default=None)
    add("--batch_size", type=batch, help="photos at a time", default=4)
    add("--device", help="such as cpu or cuda:1; auto: CUDA where there is some", default="auto")
    add("--crop", choices=["subject", "middle"], help="as training will: its key `crop`", default="subject")
    add("--overwrite", action="store_true", help="make masks anew for photos that have one")
    return parser.parse_args(arguments)


@report
def main(arguments: list[str] | None = None) -> None:
    flags = parse(arguments)
    templates = flags.templates or TEMPLATES
    folder = find_photos(flags.image_dir, flags.overwrite)  # mistakes are reported before what takes seconds to import
    fill_templates(flags.super_class, templates)
    device = find_device(flags.device)
    from clipseg.weights import load
    from data.masks import segment_folder, table

    clipseg = load(flags.model_weight, flags.clip, flags.config).to(device)
    print(f"{folder.root}: {folder.report()}")
    how = {"batch_size": flags.batch_size, "overwrite": flags.overwrite, "crop": flags.crop}
    rows = segment_folder(flags.image_dir, flags.super_class, clipseg, templates, **how)
    print(table(rows, flags.super_class))
    made = [row for row in rows if row.made]
    if made:
        print(f"{len(made)} masks written; look at {made[0].mask.parent / 'overlay'}")
    if len(made) < len(rows):
        print(f"{len(rows) - len(made)} kept as they were; --overwrite makes them anew")


if __name__ == "__main__":
    main()
