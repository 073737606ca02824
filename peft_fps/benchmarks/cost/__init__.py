"""Time, memory and bytes on disk of FPS beside other methods: `peft-fps benchmark cost`."""
