"""One module per training framework whose loop calls step() itself. Nothing here is imported unless it is asked for.

Each goes over all micro-batches of a step again where a SAM step was drawn. docs/frameworks.md has a recipe for each.
"""
