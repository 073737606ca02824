"""Compiled ways to the gradient of the values: optional, chosen automatically, each with a switch to turn it off.

`PEFT_FPS_CPU_KERNEL=0` and `PEFT_FPS_TRITON=0` in the environment turn them off; both are read at every call.
"""
