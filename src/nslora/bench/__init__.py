"""Speed and memory beside the tools that our parts replace."""
