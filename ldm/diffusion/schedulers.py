"""The samplers: for each, the name of diffusers' scheduler class and its own arguments.

"leading" with an offset of 1 gives the timesteps of LDM's DDIM (981, 961, … 1 for 50 steps); the last two round theirs
to whole timesteps by themselves. `ldm.diffusion.schedule.Schedule.scheduler` makes the scheduler.
"""

from typing import Any

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}),
    "dpmpp_2m": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": True},
    ),
    "unipc": ("UniPCMultistepScheduler", {}),
}
