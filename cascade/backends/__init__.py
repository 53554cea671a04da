"""Backends: what turns a cascade into code for a machine."""
