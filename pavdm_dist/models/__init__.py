"""Backbones, each written for one device, behind the contract of :mod:`pavdm_dist.models.base`."""
