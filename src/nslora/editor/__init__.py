"""The external LLM: client, local server, record and replay."""
