"""The data pipeline: a source becomes rows, rows become tokens in one memory-mapped file, the sampler deals them out.

`sources` -> `checks` -> `tokens` (or `ray_data`) -> `packing` -> `indexed` -> `sampler` -> `collate`. Everything up to the checks
imports neither torch nor transformers, so the driver refuses bad data before a single worker starts.
"""
