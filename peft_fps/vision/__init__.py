"""Fine-tuning of image classifiers: what the commands and the benchmarks share.

`finetuning` has the stages of a whole run, `weight_choice` those without training; both begin with `preparation`.
Images: `labelled_images`, `splits`, `digits`, `pixels`. Models: `classifiers`, `timm_models`, `timm_names`,
`default_model`. Work: `training_loop`, `prediction`, `linear_head`, `measurements`. Options: `finetune_options`,
`selection_options`.
"""
