"""The best and the worst of a demo's samples, by likeness to the concept's photos.

python -m scripts.pocket.best_and_worst outputs/demo docs/best-and-worst.png
"""

from pathlib import Path

import torch

from data.pocket.concepts import CONCEPTS
from data.soft_segment import to_tensor
from infusion.sampling.pictures import captioned_grid, png
from ldm.util.cli import Parser, UserError, report
from ldm.util.files import write
from scripts.pocket.evaluate_masks import concept_photos
from scripts.pocket.judge import Judge

SHOWN = 6  # of each


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", metavar="DIR", help="what scripts/demo.py wrote")
    parser.add_argument("out", metavar="PNG")
    flags = parser.parse_args(arguments)
    if Path(flags.out).exists():
        raise UserError(f"{flags.out}: exists already; name another file, or remove it")
    judge, table = Judge.load(), {}
    for name in CONCEPTS:
        files = sorted((Path(flags.demo) / name / "infusion").glob("*.png"))
        if len(files) >= SHOWN:
            images, (photos, _) = torch.cat([to_tensor(file) for file in files]), concept_photos(name)
            order = judge.similarities(images, photos).argsort(descending=True)
            white = torch.ones(max(0, SHOWN - len(photos)), *photos.shape[1:])
            title = name.replace("_", " ")
            table[title] = torch.cat([photos, white])[:SHOWN]
            table |= {f"{title}: best": images[order[:SHOWN]], f"{title}: worst": images[order.flip(0)[:SHOWN]]}
    if not table:
        raise UserError(f"{flags.demo}: holds no samples of a demo; run scripts/demo.py first")
    write(Path(flags.out), png(captioned_grid(table, [""] * SHOWN, side=96)))


if __name__ == "__main__":
    main()
