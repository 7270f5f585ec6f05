"""The camera loop: answers about live frames; `loop` is where to begin."""
