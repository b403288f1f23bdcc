"""Pure decisions: no I/O, no clock, no randomness. What was observed goes in, what to do and what to say comes out."""
