"""Measures the method on this machine: its cost beside the base model and diffusers.

python scripts/benchmark.py --size sd15 --json outputs/benchmark.json
"""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ldm.util.cli import Parser, UserError, batch, count, find_device, report, words
from scripts.benchmarks.settings import MEMORY, PRECISIONS, RATIOS, SIZES, TIMED, Settings, choose

LATENT = 32  # on a CPU
REPEATS = {"cpu": 5, "cuda": 20}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    usual = Settings()
    parser = Parser(
        description="Measures the method's cost beside the base model and diffusers; all weights are random.",
        epilog=f"Cases: {', '.join((*TIMED, *MEMORY))}. Ratios: {', '.join(RATIOS)}.",
    )
    add = parser.add_argument
    add("--device", help="cpu, or cuda with or without an index; auto: CUDA where there is some", default="auto")
    add("--size", choices=SIZES, help="architecture", default=usual.size)
    add("--latent", type=batch, metavar="N", help=f"side of the latents; None: {LATENT}, on CUDA that of training")
    add("--batch", type=batch, metavar="N", help="images at a time", default=usual.batch)
    add("--precision", choices=PRECISIONS, help="of the UNet", default=usual.precision)
    add("--compile", action="store_true", help="compile the UNets, also those that are compared with")
    add("--repeats", type=count, metavar="N", help=f"rounds; None: {REPEATS['cpu']}, on CUDA {REPEATS['cuda']}")
    add("--only", type=words, metavar="CASE[,CASE]", help="cases, or ratios; None: all but load")
    add("--json", metavar="FILE", help="gets everything that was measured")
    flags = parser.parse_args(arguments)
    flags.chosen = choose(flags.only)
    if flags.json:
        check_target(Path(flags.json))
    return flags


def settle(flags: argparse.Namespace) -> Settings:
    """The settings that the flags and the machine make.

    Raises:
        UserError: a device that cannot be used, or latents that the UNet cannot halve as often as it needs.
    """
    from scripts.benchmarks.cases import sides  # after the flags: it takes seconds

    device = find_device(flags.device)
    if device.type not in REPEATS:
        raise UserError(f"--device: times are taken on cpu and cuda, not on {device.type}")
    multiple, trained = sides(flags.size)
    latent = flags.latent or (trained if device.type == "cuda" else LATENT)
    if latent % multiple:
        raise UserError(f"--latent: must be a multiple of {multiple} for {flags.size}, not {latent}")
    repeats = flags.repeats or REPEATS[device.type]
    return Settings(str(device), flags.size, latent, flags.batch, flags.precision, flags.compile, repeats)


def check_target(path: Path) -> None:
    """Raises UserError for a file that is there already, or cannot be."""
    if path.exists():
        raise UserError(f"--json: {path} is there already; name another file")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--json: {path} cannot be written, because of {folder}")


@report
def main(arguments: list[str] | None = None) -> None:
    flags = parse(arguments)
    settings = settle(flags)
    from ldm.util.files import write
    from scripts.benchmarks.measure import benchmark, measurable, table  # after the flags: it takes seconds

    chosen = measurable(flags.chosen, flags.only is not None, find_device(settings.device))
    command = shlex.join(["python", "scripts/benchmark.py", *(sys.argv[1:] if arguments is None else arguments)])
    result = benchmark(settings, chosen, command, progress=True)
    print(table(result))
    if flags.json:
        text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write(Path(flags.json), text.encode())
        print(f"{flags.json}: all of it")


if __name__ == "__main__":
    main()
