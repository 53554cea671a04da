"""Cascades, machines and mappings of the pages in `docs`; `python -m examples.machines` compares them."""
