"""Videos by HTTP: OpenAI's ``/v1/videos`` over a farm's folder, live streams, and a page to watch them."""
