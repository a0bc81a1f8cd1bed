"""The commands of docs/regularisers.md, on the tiny model."""

from infusion.concepts.concept import Concept
from ldm.util.config import ROOT

QUICK = ("callbacks.samples=null", "trainer.precision=32-true", "trainer.enable_progress_bar=false")


def test_a_contextualizer_is_trained_resumed_and_used(tiny, photos, command, tmp_path):
    (tmp_path / "captions.txt").write_text("a cat on grass\na dog in a box\nthe red hat\n")
    (tmp_path / "prompts.txt").write_text("a {} on grass\nthe {} in a box\n")
    bases = (tiny, ROOT / "configs/context/captions.yaml")
    options = (f"captions={tmp_path / 'captions.txt'}", "data.params.batch_size=2", *QUICK[1:], "trainer.max_steps=2")
    command("--base", *bases, "-t", "--logdir", tmp_path / "context", *options)
    command("--resume", tmp_path / "context", "-t", "trainer.max_steps=3")
    contextualizer = tmp_path / "context/models/contextualizer.safetensors"

    def train(name, *more):
        files = (
            tiny,
            *(ROOT / f"configs/{file}.yaml" for file in ("method/textual_inversion", "with/diverse_context")),
        )
        own = (f"contextualizer={contextualizer}", f"context_prompts={tmp_path / 'prompts.txt'}", f"data_root={photos}")
        command("--base", *files, "-t", "--logdir", tmp_path / name, *QUICK, *own, "superclass=cat", "mask=none",
                "trainer.max_steps=2", *more)  # fmt: skip
        return Concept.load(tmp_path / name / "models/step=000002.safetensors").tensors["tokens"]

    weight = "model.params.regularisers.diverse_context.params.weight"
    plain = train("off", f"{weight}=0")
    assert (train("on", f"{weight}=10") - plain).abs().max() > 1e-4
