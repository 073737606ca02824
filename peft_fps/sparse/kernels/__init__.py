"""Compiled kernels for the gradient of the values; they are optional and chosen automatically.

`PEFT_FPS_CPU_KERNEL=0` and `PEFT_FPS_TRITON=0` in the environment turn them off. Every call reads these variables.
"""
