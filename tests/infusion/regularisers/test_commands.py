"""The commands of docs/regularisers.md, on the tiny model."""

import main
from infusion.concepts.concept import Concept
from ldm.util.config import ROOT, instantiate

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


def test_what_the_papers_ablations_vary_is_reached_by_the_config():
    files = ("backbone/sd15", "method/textual_inversion", "with/diverse_context")
    base = ["--base", *(str(ROOT / f"configs/{file}.yaml") for file in files), "--summary", "learning_rate=0.01"]

    def term(*overrides):
        words = [f"model.params.regularisers.diverse_context.params.{override}" for override in overrides]
        config = main.read_config(main.parse([*base, *words]))
        return instantiate(config.model.params.regularisers.diverse_context, "diverse_context")

    usual = term()
    assert (usual.mask_probability, usual.rows, usual.prompts.chosen) == (0.15, 25, None)
    assert usual.by_method and usual.learning_rate == 0.01
    assert [term(f"mask_probability={p}").mask_probability for p in (0.07, 0.1, 0.2, 0.3)] == [0.07, 0.1, 0.2, 0.3]
    assert [len(term(f"size={n}").prompts.chosen) for n in (1, 5, 10, 50, 100, 1000)] == [1, 5, 10, 50, 100, 1000]
    assert len(term("without=[styles]").prompts.categories) == len(usual.prompts.categories) - 1
    assert term("weight=0.001").weight == 0.001 and not term("weight=0").by_method
