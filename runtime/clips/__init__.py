"""Answer questions about a recording: `clip` asks, `token_sharing` divides tokens among frames."""
