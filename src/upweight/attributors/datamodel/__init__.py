"""Datamodels: what retrained models measured, regressed on what they were trained on."""

from upweight.attributors.datamodel.datamodel import Datamodel

__all__ = ["Datamodel"]
