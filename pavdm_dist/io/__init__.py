"""Video, latents, storage and the sidecar; PyAV and fsspec are imported where they are used."""
