"""Where the server will live: the aligned policy behind an OpenAI-compatible API. Nothing is here yet, and nothing is installed of it."""
