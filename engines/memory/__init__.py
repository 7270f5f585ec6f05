"""Count the memory that a bundle takes while it answers, part by part, before it is taken."""
