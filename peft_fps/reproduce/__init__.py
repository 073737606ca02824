"""The published recipes of GPS and FPS on VTAB-1k and FGVC, behind `peft-fps reproduce`.

`reproduction` has the stages of a run, `recipes` the numbers, `deviations` what is done otherwise than in the papers.

| module | subject |
|---|---|
| `reproduction` | the stages, in order |
| `reproduce_options` | what one run is asked to do |
| `recipes` | how each task is trained, as plain data |
| `deviations` | what is done otherwise, or is open in the sources |
| `task_images` | the images of a task |
| `vtab`, `fgvc`, `listings` | the files of the benchmarks, and what their lists have in common |
| `recipe_model` | the pre-trained model of a recipe |
| `recipe_training` | what the Trainer is given |
| `crops`, `mixing` | crops of single images, Mixup and CutMix of batches |
| `epochs` | the best epoch and averaged weights |
"""
