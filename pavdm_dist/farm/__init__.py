"""Many shots: a manifest, a pool of renderers, and a folder that is the only record of what became of them."""
