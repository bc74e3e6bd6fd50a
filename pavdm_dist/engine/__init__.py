"""The distributed engine: stages of a backbone, the links between them, and their life on a Ray cluster."""
