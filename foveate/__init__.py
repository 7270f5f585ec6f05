"""The command `foveate`: every command of the floors below under one name."""
