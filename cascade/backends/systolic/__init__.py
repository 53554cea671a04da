"""The systolic backend: what a cascade costs on a modelled spatial machine, counted from a mapping."""
