"""Photos of concepts, their masks and latents, and the pocket world."""
