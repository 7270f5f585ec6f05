"""Write prompts and generate answers: `prompt` lays a conversation out, `generate` continues it."""
