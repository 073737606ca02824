"""Fine-tuning of image classifiers: data, models, training and evaluation, for the commands and the benchmarks."""
