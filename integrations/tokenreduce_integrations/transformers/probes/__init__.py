"""Reading signals of a vision tower while it encodes, without eager attention."""

from tokenreduce_integrations.transformers.probes.probe import Probe, ProbeFactory, TowerProbes

__all__ = ["Probe", "ProbeFactory", "TowerProbes"]
