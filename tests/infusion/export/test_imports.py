"""Reading a concept and the adapter need torch, safetensors and diffusers, and what these need themselves."""

import os
import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import torch
from packaging.requirements import Requirement

from infusion.concepts.concept import Concept

ROOT = Path(__file__).parents[3]
USE = """
import sys
from importlib.util import find_spec
import infusion
for name in sys.argv[2:]:
    assert infusion.Concept.load(f"{sys.argv[1]}/{name}").numbers == 12
try:
    infusion.Concept.load(f"{sys.argv[1]}/other")
except ValueError as error:
    print(error)
import infusion.export.diffusers
print(*(name for name in ("transformers", "omegaconf", "open_clip", "pytorch_lightning", "einops") if find_spec(name)))
"""


def needed(*names: str) -> list[Distribution]:
    """Installed distributions, with all that they require without extras."""
    known: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        try:
            found = known.setdefault(name, distribution(name)) if name not in known else None
        except PackageNotFoundError:  # of another platform
            continue
        wanted = [Requirement(line) for line in (found.requires if found else None) or []]
        waiting += [one.name for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})]
    return list(known.values())


def test_a_machine_with_nothing_else(tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    for each in needed("torch", "safetensors", "diffusers"):
        for top in {file.parts[0] for file in each.files if file.parts[0] != ".."}:
            if not (site / top).exists():
                (site / top).symlink_to(each.locate_file(top))
    concept = Concept({"input_blocks.1.1.transformer_blocks.0.attn2": torch.ones(12)}, "cat", ("a {}",), "tiny")
    for form in ("full", "half", "compact"):
        concept.save(tmp_path / form, form)
    (tmp_path / "other").write_bytes((tmp_path / "full").read_bytes().replace(b"infusion-concept", b"x" * 16))
    command = [sys.executable, "-S", "-c", USE, str(tmp_path), "full", "half", "compact"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{site}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, others = done.stdout.split("\n")[:2]
    assert said.endswith("other: no concept file; scripts/inspect_file.py says what it is") and others == ""
