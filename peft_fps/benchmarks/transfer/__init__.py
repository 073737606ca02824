"""Accuracy of selection methods and of other ways to fine-tune, on many small image tasks.

One cell is a method on a task with a seed. Cells run in processes of one thread each and are kept as lines of JSON, so
that a run that was stopped goes on where it was.
"""
