"""An emulator of CDNA3 (gfx942) and CDNA4 (gfx950), in numpy: no GPU is needed to run a binary.

    asm       text to instructions, labels, descriptor; hsaco the same from a code object's bytes
    effects   what an instruction reads and writes, and which counter says when it is done
    machine   waves in lockstep, registers, deferred loads, barriers
    memory    global memory with bounds; LDS with the order of its accesses
    scalar, vector (functions, operands, packed, lanes), matrix, access: what instructions do
    launch    arguments, grid, start of a wave
    compiler, kernels, shipped: the host code's launches, compiled for a GPU that is not there
    gate, limits: what can be said of a binary without running it

Not modelled: time, caches, the no-ops that hazards between instructions want, denormal modes, and
the order in which a matrix instruction adds.
"""
