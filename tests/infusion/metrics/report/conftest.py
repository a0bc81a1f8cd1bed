"""Results as scripts/metrics.py has them, made by hand."""

import torch

IMAGE = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))


def figure(value, stderr=0.02, **more):
    return {"value": value, "stderr": stderr, "n": 4} | more


def run(value, concept="cat", seed=0, group="lora", metric="drift", **more):
    """A result of one metric; None is none."""
    figures = {} if value is None else {metric: value if isinstance(value, dict) else figure(value)}
    said = {"label": f"{group} {concept} {seed} {more}", "group": group, "world_concept": concept, "photos": ""}
    return said | {"superclass": "thing", "training_seed": seed, "anchored": False, "figures": figures} | more


def result(label="cat", method="dreambooth", anchored=False, **changes):
    """A result with everything that a page shows."""
    zero = 0.0 if anchored else 0.25
    figures = {
        "lfd_context": figure(0.5, floor=figure(0.1)),
        "lfd_superclass": figure(zero),
        "w2_clip": figure(1.0, low=0.9, high=1.2, floor=figure(0.4)),
        "clip_i": figure(0.3, base=figure(0.1), ceiling=figure(0.6)),
        "pres": figure(0.2, base=figure(0.1), ceiling=figure(0.6)),
        "drift": figure(zero),
        "right_background": figure(0.96, base=figure(1.0), ceiling=figure(1.0)),
    }
    card = {"prompt": "a <u>cat</u> on sand", "seed": 7, "score": -0.125, "base": IMAGE, "ours": IMAGE}
    return {
        "label": label, "group": method, "method": method, "superclass": "cat", "noun": "sks cat",
        "training_steps": 200, "learning_rate": 0.001, "training_seed": 0, "numbers": 1152,
        "file": "cat.safetensors", "sha256": "f" * 64, "anchored": anchored, "photos": "", "world_concept": "",
        "figures": figures,
        "timesteps": {"context": [{"timestep": t} | figure(0.1) for t in (250.0, 750.0)]},
        "training": {"context": [{"step": n} | figure(n / 1000) for n in (100, 200)]},
        "pictures": {"ranked_by": "clip", "photos": IMAGE[None], "random": [card], "best": [card], "worst": [card]},
    } | changes  # fmt: skip


def described(label="words", **changes):
    """The words of what `result` is of: the untouched model, so without training, LFD and file."""
    own = {"kind": "words", "group": "words", "described": "a red cat", "training_seed": None}
    said = result(label, "words", **own | changes)
    for name in ("lfd_context", "lfd_superclass", "drift", "pres"):
        del said["figures"][name]
    return said | {"training": {}, "timesteps": {}, "sha256": "", "training_samples": None}


def study(**likeness):
    """Six concepts of each group by its mean likeness; the first is the reference, `words` are words.

    LFD around the concept is 0.01 for the reference and doubles from group to group.
    """
    runs = []
    for place, (group, mean) in enumerate(likeness.items()):
        for i in range(6):
            make, name = (described if group == "words" else result), f"thing_{i}"
            one = make(f"{group} {i}", world_concept=name, group=group)
            noise = (0.001, -0.002, 0.003, 0.0, -0.001, -0.001)[(i + place) % 6]
            one["figures"]["clip_i"] = figure(mean + noise, base=figure(0.1), ceiling=figure(0.6))
            if group != "words":
                one["figures"]["lfd_context"] = figure(0.01 * 2**place * (1 + 10 * noise), floor=figure(0.001))
            runs.append(one)
    return runs
