"""What a GPU gives, measured beside its ceilings: `kvstore bench gpu`.

Rows, turns and the report are shared with benchmarks/, which measures all that needs no GPU.
"""
