"""What fine-tuning with FPS costs in time and memory, beside other methods, on one machine.

Nothing of the library imports this package; the command `peft-fps benchmark cost` does, and needs the extra
`benchmark`.
"""
