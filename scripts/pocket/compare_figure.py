"""One concept of the comparison, learned by every method: the same prompts and seeds side by side.

    python -m scripts.pocket.compare_figure zigzag_hat docs/comparison.png        # after `make compare`

The pictures are among those that were measured: the protocol's first prompts, with the seeds that they have there.
"""

from pathlib import Path

from data.pocket.concepts import CONCEPTS
from infusion.concepts.concept import Concept
from infusion.metrics.run.protocol import CONTEXT, Protocol, plain
from infusion.metrics.run.subject import concept_files
from infusion.sampling.pictures import captioned_grid, png
from infusion.sampling.sample import sample
from infusion.sampling.settings import Settings
from ldm.pipeline import StableDiffusion
from ldm.util.cli import Parser, UserError, find_device, report, suggestion
from ldm.util.defaults import POCKET
from ldm.util.files import write
from scripts.pocket.compare import SCALE, STEPS, Run, methods
from scripts.pocket.evaluate_masks import concept_photos

SHOWN = 8  # prompts
SEED = 0  # of the trainings


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("concept", metavar="CONCEPT", help="of the world")
    add("picture", metavar="PNG", help="what to write")
    add("--work", metavar="DIR", help="of the comparison", default="outputs/compare")
    add("--device", help="such as cpu or cuda:1; auto: CUDA where there is some", default="auto")
    flags = parser.parse_args(arguments)
    if flags.concept not in CONCEPTS:
        raise UserError(f"CONCEPT: there is no `{flags.concept}`{suggestion(flags.concept, list(CONCEPTS))}")
    if Path(flags.picture).exists():
        raise UserError(f"{flags.picture}: exists already; name another file, or remove it")
    runs = {name: Run(name, flags.concept, SEED).folder(Path(flags.work)) for name in methods()}
    concepts = {name: Concept.load(concept_files(folder)[-1]) for name, folder in runs.items()}
    sd = StableDiffusion.from_checkpoint("configs/backbone/pocket.yaml", device=find_device(flags.device))
    noun, settings = CONCEPTS[flags.concept].noun, Settings(STEPS, SCALE)
    templates, seeds = Protocol.of(POCKET).prompts(CONTEXT, noun)[:SHOWN], range(SHOWN)
    prompts = [plain(template, noun) for template in templates]
    rows = {"base model": sample(sd, prompts, settings=settings, seed=seeds)}
    for name, concept in concepts.items():
        rows[name.replace("_", " ")] = sample(sd, templates, [concept], settings, seed=seeds)
    sheet = captioned_grid(rows, prompts, {"photos": concept_photos(flags.concept)[0]}, side=96)
    write(Path(flags.picture), png(sheet, {"concept": flags.concept, "prompts": " | ".join(templates)}))


if __name__ == "__main__":
    main()
