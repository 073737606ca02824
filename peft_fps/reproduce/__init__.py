"""The published recipes of GPS and FPS on VTAB-1k and FGVC, behind `peft-fps reproduce`."""
