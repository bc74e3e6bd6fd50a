"""Real videos as training clips: reading sources, cutting, caching latents, and what training reads."""
