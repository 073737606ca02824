"""What fine-tuning with FPS costs in time and memory, and how well it does, beside other methods.

Behind the commands `peft-fps benchmark ...`, which need the extra `benchmark`: `cost.suite` is the first, and
`transfer.campaign` the others.
"""
