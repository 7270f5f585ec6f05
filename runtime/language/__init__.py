"""Tokens become an answer: `prompt` lays a conversation out, `generate` writes what comes next."""
