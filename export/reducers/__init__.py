"""The registry of token reducers. Adding one is one file and one line here."""
