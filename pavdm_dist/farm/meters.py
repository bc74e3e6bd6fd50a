"""What a farm counts, for Prometheus (``cluster/grafana/farm.json`` draws it)."""

from __future__ import annotations

from pavdm_dist.cluster.metrics import Meters

ABOUT = {
    "pavdm_farm_frames": "frames written",
    "pavdm_farm_chunks": "chunks written",
    "pavdm_farm_rows": "rows sampled for written chunks",
    "pavdm_farm_shots_done": "shots complete",
    "pavdm_farm_shots_failed": "shots failed for good",
    "pavdm_farm_shots_again": "shots that went back to the queue, their renderer lost or silent",
    "pavdm_farm_shots_aside": "shots found in the hands of another process",
    "pavdm_farm_shots_unfit": "shots begun by other versions, on other devices or with other settings, left to these",
    "pavdm_farm_shots_otherwise": "shots that another process has completed, not as they are asked for",
    "pavdm_farm_shots_cancelled": "shots cancelled or skipped",
    "pavdm_farm_shots_saved": "shots saved unfinished by an ending farm",
    "pavdm_farm_renderers_lost": "renderers that ended by a fault",
    "pavdm_farm_waiting": "shots that wait for a renderer",
    "pavdm_farm_running": "shots in renderers' hands",
    "pavdm_farm_renderers": "renderers, those coming up among them",
    "pavdm_farm_idle_share": "share of renderers' time with no shot though some waited",
}


def make_meters() -> Meters:
    """Those of one farm."""
    return Meters(ABOUT)
