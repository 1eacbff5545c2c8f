"""What the command ends with."""

FAILED = 1
INTERRUPTED = 130
"""As shells have it for a program that Ctrl-C ended."""
