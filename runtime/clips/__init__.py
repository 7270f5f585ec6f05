"""Questions about a recording: `clip` asks them, `token_sharing` says what each frame may cost."""
