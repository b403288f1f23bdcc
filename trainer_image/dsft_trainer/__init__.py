"""The trainer: one attempt of a run, from DSFT_JOB to committed checkpoints and an exported model."""
