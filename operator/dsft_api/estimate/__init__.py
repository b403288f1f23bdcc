"""What a run will need, from numbers alone: pure, no torch, no I/O.

`sizes` has the numbers that model and data give, `memory` the bytes that DeepSpeed ZeRO-3 makes of them, `devices` what GPUs
have, `plan` puts it together and names what will not fit. `dsft plan` shows it.
"""
