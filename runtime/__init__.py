"""Read frames, turn them into visual tokens and answer questions about them (floor 2)."""
