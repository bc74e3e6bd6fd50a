"""Training: the embedded world, its codec, the PA-VDM objective and the loop. Imports no Ray."""
