"""The camera loop: live frames to answers, on time; `loop` is where to begin."""
