"""Cascades on many devices: simulated in one process, planned on a machine, run by torch.distributed."""
