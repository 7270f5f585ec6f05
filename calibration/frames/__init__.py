"""Select the user's frames, describe what they cover, and prepare them for a tower."""
