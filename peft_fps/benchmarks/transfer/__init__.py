"""Accuracy of selection methods and of other ways to fine-tune, on many small image tasks.

One cell is a method on a task with a seed. Cells run side by side in processes. They are kept as lines of JSON, so
that a run that was stopped goes on where it was.

`campaign` coordinates: `worker_pool` runs the cells that `plan` names, `cell_run` runs one of them, `store` keeps it,
and `transfer_tables` makes tables.

| module | subject |
|---|---|
| `campaign`, `transfer_options` | the commands as a whole, and their options |
| `cells`, `plan`, `store` | what is run, which is next, and what is finished |
| `worker_pool` | cells run side by side in processes |
| `cell_run`, `attached_model` | one cell: select, train, evaluate; the model of a method |
| `tasks`, `text_tasks`, `derived_tasks`, `image_puzzles` | images or texts, and tasks made of other tasks' images |
| `arms` | the methods that are compared |
| `method_configs`, `arm_training` | their PEFT configs, and how they are trained |
| `retired_arms` | methods that were tried and have left; tables of their cells stay |
| `linear_head_cell` | the cell of a linear head |
| `estimates`, `soft_score` | means and paired differences; one number for accuracy and costs |
| `transfer_tables`, `transfer_picture`, `step_picture` | results as tables and pictures |
| `selection_agreement` | how far selections agree |
"""
