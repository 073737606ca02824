"""Time, memory and bytes on disk of FPS beside other methods: `peft-fps benchmark cost`.

`suite` measures one row after another, and writes the results.

| module | subject |
|---|---|
| `suite` | the benchmark as a whole |
| `workload` | what is measured, and how often |
| `random_models`, `methods`, `training_step` | models and batches, the methods on them, one training step |
| `timings`, `sizes`, `selection_costs`, `recipe_costs`, `token_costs`, `model_grid` | the rows, by what they measure |
| `gradient_selection` | selection by gradients, to compare with |
| `clock`, `device_timer` | time and memory of tasks that take turns |
| `figures` | what a row found, beside what was aimed at |
| `cost_tables`, `cost_picture` | results as tables and as a picture |
"""
