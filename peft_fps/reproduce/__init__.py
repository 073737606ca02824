"""The published recipes of GPS and FPS on VTAB-1k and FGVC, behind `peft-fps reproduce`.

`reproduction` has the stages of a run, `recipes` the numbers, `deviations` what is done otherwise than in the papers.
"""
