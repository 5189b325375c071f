"""An emulator of CDNA3 (gfx942) and CDNA4 (gfx950), in numpy: no GPU is needed to run a binary."""
