"""Fine-tuning of image classifiers: what the commands and the benchmarks share.

`finetuning` has the stages of a whole run, `weight_choice` those without training; both begin with `preparation`.

| module | subject |
|---|---|
| `finetuning` | the stages of `peft-fps finetune` |
| `weight_choice` | a selection without training |
| `preparation` | images, a model, and an adapter calibrated on the images |
| `finetune_options`, `selection_options`, `option_types` | options, and what those of several commands share |
| `locations` | what the values of `--model`, `--data` and `--base` stand for |
| `labelled_images`, `splits`, `digits` | labelled images, a split cut in two, the embedded data |
| `pixels`, `labelled_examples` | pixel values of images, and what training and prediction take |
| `classifiers` | the pre-trained model with a new output head, and its image processor |
| `timm_models`, `timm_names` | timm's models as models of transformers, and their names on the command line |
| `pretraining` | pre-trains the embedded model of the folder `default_model` |
| `training_loop`, `default_training`, `rate_trials` | training, its defaults, a learning rate found by trial |
| `prediction` | logits and frozen features of a split |
| `linear_head` | the baseline: a linear classifier on frozen features |
| `measurements` | time, memory and versions of a run |
| `output_folders` | folders written whole or not at all |
| `upstream_noise` | warnings of PEFT and transformers that users can do nothing about |
"""
