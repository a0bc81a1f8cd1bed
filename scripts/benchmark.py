"""Measures what a concept costs on this machine: time, operations and memory, beside the base model and diffusers.

python scripts/benchmark.py --latent 32 --json outputs/benchmark.json    # SD 1.5 on a CPU
python scripts/benchmark.py --size sdxl --estimate                       # from shapes alone: needs no memory
python scripts/benchmark.py --battery --json results/benchmark/gpu.json  # all that waits for a GPU, in 8 minutes

All weights are random. Cases take turns (A B C A B C …), so that any other load on the machine slows all of them.
"""

import json
import os
import platform
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from infusion.concepts.concept import now
from ldm.util.cli import Parser, batch, count, find_device, report, suggestion, words, written
from ldm.util.files import write
from scripts.benchmarks import battery, measure
from scripts.benchmarks.cases import CASES, DTYPES, RATIOS, Settings, build_model, side_of_latents


def describe(device: torch.device) -> dict[str, object]:
    """Name of the device, cores and threads of the machine, and the version of torch."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__}


@report
def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        description="Measures what a concept costs beside the base model and diffusers; all weights are random.",
        epilog=f"Cases: {', '.join(CASES)}. Ratios: {', '.join(RATIOS)}.",
    )
    add = parser.add_argument
    add("--device", help="such as cpu or cuda:1; auto: CUDA where there is some", default="auto")
    add("--size", choices=("pocket", "pocket_xl", "sd15", "sd21", "sdxl"), help="architecture", default="sd15")
    add("--latent", type=batch, metavar="N", help="side of the latents; None: that of training (64 for sd15)")
    add("--batch", type=batch, metavar="N", help="images at a time", default=1)
    add("--precision", choices=DTYPES, help="of the UNet", default="full")
    add("--steps", type=count, help="sampling steps of the image", default=50)
    add("--repeats", type=count, metavar="N", help="rounds", default=5)
    add("--only", type=words, metavar="CASE[,CASE]", help="cases, or ratios for both of their sides; None: all")
    add("--estimate", action="store_true", help="count operations and memory from shapes; nothing is computed")
    add("--battery", action="store_true", help="SD 1.5 and SDXL in bf16, all that waits for a GPU")
    add("--rehearse", action="store_true", help="the battery with small models and few steps, on a CPU too")
    add("--json", type=written, metavar="FILE", help="new file that gets everything that was measured")
    flags = parser.parse_args(arguments)
    known = [*CASES, *RATIOS]
    if unknown := [name for name in flags.only or () if name not in known]:
        parser.error(f"--only: there is no case `{unknown[0]}`{suggestion(unknown[0], known)}")
    if flags.json and Path(flags.json).exists():
        parser.error(f"--json: {flags.json} is there already; name another file")
    device = torch.device("meta") if flags.estimate else find_device(flags.device)
    if flags.battery and device.type != "cuda":
        parser.error(f"--battery: needs CUDA, not {device.type}; --rehearse runs it with small models")
    typed = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "scripts/benchmark.py", *typed])
    said = {"command": command, "date": now(), "device": describe(device)}

    def save(found: dict) -> None:
        if flags.json:
            write(Path(flags.json), (json.dumps(said | found, indent=2) + "\n").encode())

    print(said["device"])
    if flags.battery or flags.rehearse:
        found = battery.battery(device, flags.rehearse, lambda sizes: save({"sizes": sizes}))
        print(battery.table(found))
        return
    latent = side_of_latents(flags.size, flags.latent)
    settings = Settings(str(device), flags.size, latent, flags.batch, flags.precision, flags.steps, flags.repeats)
    wanted = {case for name in flags.only or CASES for case in RATIOS.get(name, (name,))}
    names = [name for name in CASES if name in wanted]
    act = measure.estimate if flags.estimate else measure.measure
    found = act(build_model(settings), settings, names)
    print(measure.table(found))
    save({"settings": asdict(settings)} | found)


if __name__ == "__main__":
    main()
