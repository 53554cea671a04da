"""FuseMax (Nayak et al., MICRO 2024) and what it is compared with: cascades, machines and mappings for one evaluator.

    python -m examples.fusemax_reproduction --config fusemax --length 65536 --json

The five configurations differ in files only. FLAT's mapping is made from its dataflow, which its authors' search chose
for every model and length; the other mappings are files. README.md beside this file says what was published otherwise.
"""
